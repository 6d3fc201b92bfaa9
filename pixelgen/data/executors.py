"""Where images are decoded for a rank: in its own process, or in some of their own. (On Ray: `pipeline.readers`.)"""

import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from pixelgen.errors import UserError

SINGLE = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # numpy's own threads would only take memory
MOST = 16  # processes of a rank where nobody says how many: each has decoded images in hand
SERVE = "from pixelgen.data.executors import serve; serve()"


class Result(Protocol):
    def result(self) -> Any:
        """What a task returned, once it is done; raises what it raised."""


class Executor(Protocol):
    ahead: int  # tasks to submit beside those that are waited for; 0: the caller does them, so there is no use in it

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> Result:
        """Have a function of a module called."""


class InProcess:
    """Calls right here, so that a debugger can stop there."""

    ahead = 0

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> "Future[Any]":
        done: Future[Any] = Future()
        done.set_result(function(*arguments))
        return done


class Processes:
    """Calls in child processes. For each one, a thread here sends tasks and receives results."""

    def __init__(self, pool: ThreadPoolExecutor, free: list["subprocess.Popen[bytes]"]):
        self.pool, self.free, self.ahead = pool, free, 2 * len(free)

    def submit(self, function: Callable[..., Any], /, *arguments: Any) -> "Future[Any]":
        return self.pool.submit(self._call, pickle.dumps((function, arguments)))

    def _call(self, data: bytes) -> Any:
        process = self.free.pop()
        assert process.stdin and process.stdout
        try:
            process.stdin.write(data)
            process.stdin.flush()
            raised, value = pickle.load(process.stdout)
        except (BrokenPipeError, EOFError, pickle.UnpicklingError):
            raise UserError(f"process {process.pid}, which decodes images, was killed: if there was too little memory, "
                            "let fewer of them work (readers)") from None
        self.free.append(process)
        if raised:
            raise value
        return value


def processors_left(ranks: int, threads: int) -> int:
    """Of this machine's processors, those that may decode for each of its ranks, which take `threads` themselves."""
    return min(max(len(os.sched_getaffinity(0)) // ranks - threads, 1), MOST)


@contextmanager
def processes(workers: int) -> Iterator[Processes]:
    """An executor of so many processes, which end with the block, or with this process, however it ends."""
    environment = os.environ | SINGLE | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with ExitStack() as stack:
        started = [stack.enter_context(subprocess.Popen([sys.executable, "-c", SERVE], stdin=subprocess.PIPE,
                                                        stdout=subprocess.PIPE, env=environment))
                   for _ in range(workers)]
        pool = ThreadPoolExecutor(workers, "readers")
        try:
            yield Processes(pool, [*started])
        finally:
            pool.shutdown(cancel_futures=True)


def serve() -> None:
    """The main loop of a child process: run the calls that are read from standard input until it closes. Signals to the
    whole group are for the parent, which may still need batches to reach its end."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = sys.stdout.buffer
    sys.stdout = sys.stderr  # whatever a library prints
    while True:
        try:
            function, arguments = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        try:
            data = pickle.dumps((False, function(*arguments)), pickle.HIGHEST_PROTOCOL)
        except Exception as error:
            error.add_note(f"in a process that decodes images:\n{traceback.format_exc()}")
            data = pickle.dumps((True, error))
        answers.write(data)
        answers.flush()
