"""A module run in another working directory than the process that it is forked from: a main of `tests.ranks`."""

import os
import runpy
import sys

if __name__ == "__main__":
    folder, module, *arguments = sys.argv[1:]
    os.chdir(folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__")
