"""Runs set side by side: their settings, their losses at the same tokens, their speeds (`deepnarrow compare`)."""
