"""How far a GPU has come in the passes of a step that its host has told it to run, for the rank's heartbeat.

A host launches a whole step within milliseconds and then waits at one point for all of it; where it is tells nothing of
a hang. The events that mark each pass do.
"""

import threading
import weakref
from bisect import bisect_left
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from parallel.heartbeat import Heart, Phase
from parallel.schedules import Action, source_of

if TYPE_CHECKING:
    from parallel.pipeline import Pipeline

EVERY = 1.0
"""Seconds from one look at the device to the next."""
Marks = Sequence[tuple[Action, Any, Any]]
"""Passes in the order in which they were launched, each with the events at its begin and end."""


def follow(pipeline: "Pipeline", heart: Heart) -> None:
    """Have a thread say where this rank's GPU is, as long as the pipeline lives."""
    alive, device = weakref.ref(pipeline), torch.cuda.current_device()

    def watch() -> None:
        torch.cuda.set_device(device)  # a new thread is on the first one, which would get a context of each rank's
        pause = threading.Event()
        while not pause.wait(EVERY):
            if (still := alive()) is None:
                return
            say(still, heart)
            del still

    threading.Thread(target=watch, daemon=True, name="device-progress").start()


def say(pipeline: "Pipeline", heart: Heart) -> None:
    """Say where the device is, where passes are launched that it has not ended, or all of them are and it has."""
    (marks, program, place), placement = pipeline.under_way, pipeline.placement
    ended = num_ended(marks)
    if program.actions and ended == len(program.actions):
        heart.device_in(place, Phase.AGREE, program.actions[-1], ended - 1)
    elif ended < len(marks):
        action, begin, _ = marks[ended]
        source = source_of(action, placement)
        if begin.query() or source is None or placement.rank_of(source.stage) == pipeline.rank:
            heart.device_in(place, Phase.PASS, action, ended)
        else:
            sender = pipeline.ranks[placement.rank_of(source.stage)]
            heart.device_in(place, Phase.RECEIVE, source, ended, sender, program.index[source])


def num_ended(marks: Marks) -> int:
    """Count the passes that the device has ended; it ends them in order."""
    return bisect_left(marks, True, key=lambda mark: not mark[2].query())
