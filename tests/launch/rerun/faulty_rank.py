"""A rank of a rerun on a device that computes wrongly: ``python -m tests.launch.rerun.faulty_rank FOLDER``.

``RERUN_FAULT`` names the device and when it does: ``process 1, always``, ``process 0, attempt 2``.
"""

import json
import os
import sys
from pathlib import Path

import torch

from launch.rerun import notes
from launch.rerun.rank import main
from model.transformer import Block

ATTEMPTS = [0]


def computes_wrongly():
    """One bit of the output of each block is flipped on the device that is named."""
    device, when = os.environ["RERUN_FAULT"].split(", ")
    order = json.loads((Path(sys.argv[1]) / f"order-{os.environ['RANK']}.json").read_text())
    if order["device"] != device:
        return
    forward, begin = Block.forward, notes.Notes.begin

    def flipped(self, *arguments):
        y = forward(self, *arguments)
        if when == "always" or when == f"attempt {ATTEMPTS[0]}":
            bits = torch.zeros_like(y, dtype=torch.int32)
            bits.view(-1)[5] = 1 << 20
            wrong = (y.detach().view(torch.int32) ^ bits).view(torch.float32)
            y = y + (wrong - y.detach())
        return y

    def counted(self):
        ATTEMPTS[0] += 1
        begin(self)

    Block.forward, notes.Notes.begin = flipped, counted


if __name__ == "__main__":
    if "RERUN_FAULT" in os.environ:
        computes_wrongly()
    main()
