"""Imports what ranks need, then forks them on demand: orders come in as lines of JSON, what became of them goes out."""

import gc
import json
import os
import runpy
import selectors
import signal
import sys
from pathlib import Path


def main():
    talk = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what imports or forks print must not look like an answer

    import deepspeed.module_inject.auto_ep_layer  # noqa: F401 - this and the next two are DeepSpeed's, in an engine
    import fsspec  # noqa: F401
    import functorch.compile  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.pyplot  # noqa: F401 - for the timeline of a step, as rank 0 of every pipeline draws it
    import torch._dynamo.testing  # noqa: F401
    from hydra.core.plugins import Plugins

    import conf.schema
    import parallel.deepspeed_engine
    import train.data.build
    import train.like
    import train.loop
    import train.pretrain  # noqa: F401 - a rank runs it anew, and finds what it imports

    conf.schema.register()
    Plugins.instance()
    # A rank asks for it, and each would ask the compiler anew what this machine can build.
    parallel.deepspeed_engine.deepspeed.ops.__compatible_ops__  # noqa: B018
    gc.collect()
    gc.freeze()  # a rank that collects garbage would go through all of this, and copy the pages it lies on

    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.signal(signal.SIGCHLD, lambda number, frame: None)
    signal.set_wakeup_fd(wake)
    selector = selectors.DefaultSelector()
    selector.register(sys.stdin, selectors.EVENT_READ)
    selector.register(woken, selectors.EVENT_READ)
    while True:
        for key, _ in selector.select():
            if key.fileobj is sys.stdin:
                if not (line := sys.stdin.readline()):
                    return
                order = json.loads(line)
                talk.write(json.dumps({"started": [rank(order, i) for i in range(order["num"])]}) + "\n")
            else:
                os.read(woken, 4096)
                reap(talk)


def reap(talk):
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if not pid:
            return
        talk.write(json.dumps({"ended": pid, "code": os.waitstatus_to_exitcode(status)}) + "\n")


def rank(order, number):
    """Fork one; its process id."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        os.setpgid(0, 0)
        log = os.open(Path(order["logs"]) / f"rank{number}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.environ.update(order["environment"], RANK=str(number), LOCAL_RANK=str(number))
        sys.argv = [order["module"], *order["arguments"]]
        runpy.run_module(order["module"], run_name="__main__")
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    main()
