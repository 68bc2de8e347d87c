"""Processes that work on the units of a corpus: started for it, light, and gone when whoever started them is.

They are not those of `multiprocessing`, which would import the script of the run, and PyTorch with it, into each.
"""

import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from model.problems import BadInput

_ROOT = str(Path(__file__).resolve().parents[2])


class WorkerDied(RuntimeError):
    """A process that worked on a unit was killed."""


class Worker:
    """A process that calls functions of this package, one at a time.

    Args:
        state: is made once in the process and given to each call as the first argument: a function of this package
            and its arguments.
    """

    def __init__(self, state: tuple[Callable[..., Any], tuple[Any, ...]]):
        # A worker has one core; the threads of a tokenizer would take those of the others.
        environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
        # In front of the path instead of the working directory, where a file may have the name of a package of ours.
        self._process = subprocess.Popen(
            [sys.executable, "-c", f"import sys; sys.path[0] = {_ROOT!r}; from {__name__} import serve; serve()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
        )
        self._send(state)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Return what a function of this package returns in the process.

        Raises:
            WorkerDied: the process ended instead.
            Exception: what the function raises.
        """
        self._send((function, arguments))
        assert self._process.stdout is not None
        try:
            failed, answer = pickle.load(self._process.stdout)
        except (EOFError, pickle.UnpicklingError) as error:
            raise self._died() from error
        if failed:
            raise answer
        return answer

    def _send(self, message: Any) -> None:
        assert self._process.stdin is not None
        try:
            pickle.dump(message, self._process.stdin)
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise self._died() from error

    def _died(self) -> WorkerDied:
        code = self._process.wait()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return WorkerDied(f"a process that tokenises {how}; where memory is short, a smaller data.workers would work")

    def close(self) -> None:
        """End the process, whatever it is doing."""
        with suppress(OSError):
            self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            with suppress(OSError):
                pipe.close() if pipe else None

    def __enter__(self) -> "Worker":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def serve() -> None:
    """Work for the process that started this one, until it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):  # those go to the whole group; it is the other that ends this one
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints
    messages: queue.Queue[Any] = queue.Queue()
    threading.Thread(target=_read, args=(sys.stdin.buffer, messages), daemon=True).start()
    make, given = messages.get()
    state: Any = None
    while True:
        function, arguments = messages.get()
        try:
            state = make(*given) if state is None else state
            answer = (False, function(state, *arguments))
        except Exception as error:
            answer = (True, _portable(error))
        pickle.dump(answer, answers)
        answers.flush()


def _read(source: BinaryIO, messages: "queue.Queue[Any]") -> None:
    """Read ahead of the work, to know at once when the other process is gone."""
    while True:
        try:
            messages.put(pickle.load(source))
        except (EOFError, pickle.UnpicklingError):
            os._exit(1)


def _portable(error: Exception) -> Exception:
    """An error as another process can take it in; whatever it does not know of it stands in its text."""
    if isinstance(error, BadInput):
        return error
    if isinstance(error, OSError) and error.errno is not None:
        return type(error)(error.errno, error.strerror, error.filename)
    return RuntimeError(f"{type(error).__name__}: {error}")


def work_through(
    state: tuple[Callable[..., Any], tuple[Any, ...]],
    workers: int,
    next_call: Callable[[], tuple[Any, ...] | None],
    take: Callable[[Any], None],
) -> None:
    """Have workers make calls as long as there are any.

    Args:
        state: as `Worker` takes it.
        workers: how many processes; 1 makes the calls here.
        next_call: returns a function and its arguments, or None when there are no more; called from any thread.
        take: is given what each call returns; from any thread, one at a time.

    Raises:
        Exception: the first that any call raises; the others are given up.
    """
    taking = threading.Lock()

    def loop(call: Callable[..., Any]) -> None:
        while not failures and (asked := next_call()) is not None:
            answer = call(*asked)
            with taking:
                take(answer)

    failures: list[BaseException] = []
    if workers == 1:
        made = state[0](*state[1])
        loop(lambda function, *arguments: function(made, *arguments))
        return

    def work(worker: Worker) -> None:
        try:
            loop(worker.call)
        except BaseException as error:
            failures.append(error)

    with ExitStack() as stack:  # ends them, and with them what the threads wait for, whatever is raised here
        started = [stack.enter_context(Worker(state)) for _ in range(workers)]
        threads = [threading.Thread(target=work, args=(worker,), daemon=True) for worker in started]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failures:
            for thread in threads:
                thread.join(0.05)
    if failures:
        raise failures[0]


def default_workers() -> int:
    """Count the cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
