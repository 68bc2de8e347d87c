"""Checkpoints that fit any layout: what is in them, when they are written, how a run goes on from one."""
