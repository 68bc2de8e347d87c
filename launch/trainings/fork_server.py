"""The process that ranks are forked from: it has imported what they need, and forks them on demand.

Orders come in as lines of JSON, and what became of them goes out as such. It ends with its standard input.
"""

import gc
import json
import os
import runpy
import selectors
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, TextIO

PRELOADED = (
    "deepspeed.module_inject.auto_ep_layer",  # this and the next two are DeepSpeed's, in an engine
    "fsspec",
    "functorch.compile",
    "matplotlib.backends.backend_agg",
    "matplotlib.pyplot",  # for the timeline of a step, as rank 0 of every pipeline draws it
    "torch._dynamo.testing",
    "conf.schema",
    "parallel.deepspeed_engine",
    "train.data.build",
    "train.like",
    "train.loop",
    "train.pretrain",  # a rank runs it anew, and finds what it imports
)


def main() -> None:
    """Import, then fork what is ordered until standard input ends."""
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports or forks print must not look like an answer
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # of a terminal or a host's end: ranks get their own
        signal.signal(number, signal.SIG_IGN)
    _preload()
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fd == sys.stdin.fileno():
                if not (line := sys.stdin.readline()):
                    return
                order = json.loads(line)
                talk.write(json.dumps({"started": [_fork(order, rank, talk) for rank in range(order["num"])]}) + "\n")
            else:
                os.read(woken, 4096)
                _reap(talk)


def _preload() -> None:
    from hydra.core.plugins import Plugins

    from conf.schema import register

    for name in PRELOADED:
        import_module(name)
    register()
    Plugins.instance()
    gc.collect()
    gc.freeze()  # a rank that collects garbage would go through all of this, and copy the pages it lies on


def _reap(talk: TextIO) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        talk.write(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}) + "\n")


def _fork(order: Mapping[str, Any], rank: int, talk: TextIO) -> int:
    """Fork a rank; return its process id."""
    if pid := os.fork():
        return pid
    with exits():
        signal.set_wakeup_fd(-1)
        os.close(talk.fileno())  # whose end tells that this process has ended, and not what it has forked
        for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        os.setpgid(0, 0)
        how = os.O_APPEND if order["append"] else os.O_TRUNC
        log = os.open(Path(order["logs"]) / f"rank{rank}.log", os.O_WRONLY | os.O_CREAT | how)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["environment"], RANK=str(rank), LOCAL_RANK=str(rank))
        sys.argv = [order["module"], *order["arguments"]]
        runpy.run_module(order["module"], run_name="__main__")
    raise AssertionError("a rank that has ended goes on")


@contextmanager
def exits() -> Iterator[None]:
    """End this process, which was forked, with what is run within, and with its exit code, as an interpreter ends."""
    code = 1
    try:
        yield
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
