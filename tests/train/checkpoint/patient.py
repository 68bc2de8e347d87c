"""One rank of a run that makes all saves that are due, however slow the machine is: none is left out for another."""

import sys

from train.checkpoint.saver import Saver
from train.pretrain import main


def saves_are_waited_for():
    save = Saver.save

    def save_at_once(self, *arguments, **more):
        save(self, *arguments, **more)
        self._thread.join()

    Saver.save = save_at_once


if __name__ == "__main__":
    saves_are_waited_for()
    main(sys.argv[1:])
