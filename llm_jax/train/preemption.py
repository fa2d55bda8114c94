"""Signals that end a run early: the step is finished, a checkpoint committed, and the process says so.

SIGTERM is what schedulers and cloud machines send half a minute before they take a machine away, and
the first SIGINT is Ctrl-C. The handler sets `requested`, which the loop reads after each step. It does
not wait in vain: until the first step has returned there is nothing to save, and a thread ends the
process at once (Python runs handlers only when a compilation is over, which may take minutes); an
evaluation is broken off. A second SIGINT acts as in any program.

With several processes a SIGTERM to any of them is enough: JAX's runtime takes it, and `due` says so in
all of them after the same step, which they save together. Nothing is cut short then, as the others would
wait.
"""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

import jax
from absl import logging

from llm_jax.checkpoint.store import Checkpoints
from llm_jax.distributed import RESUMABLE, preempted

EXIT_STATUS = RESUMABLE  # 75: the same command goes on where this one stopped
SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Preempted(SystemExit):
    """The run was told to stop and can be resumed; uncaught, it ends the process with status 75."""

    def __init__(self, number: signal.Signals, step: int, checkpoints: Checkpoints):
        """Waits until the checkpoint of `step` is committed, or has failed."""
        checkpoints.wait()
        end = checkpoints.lost or f"step {step} is saved"
        logging.warning("%s: %s; the same command goes on from there", number.name, end)
        super().__init__(EXIT_STATUS)


class Preemption:
    """Takes the signals while it is entered; in threads other than the main one it does nothing.

    Nor does it in one of several processes, where `due` asks JAX's runtime.
    """

    def __init__(self):
        self.requested: signal.Signals | None = None
        self.unsaved = False  # a step has been taken: there is something to save
        self._breakable = False
        self._several = jax.process_count() > 1
        self._main = threading.current_thread() is threading.main_thread() and not self._several

    def __enter__(self) -> "Preemption":
        if self._main:
            self._handlers = {number: signal.signal(number, self._handle) for number in SIGNALS}
            reader, self._writer = os.pipe()
            os.set_blocking(self._writer, False)
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            threading.Thread(target=self._watch, args=(reader,), daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if self._main:
            signal.set_wakeup_fd(self._wakeup)
            for number, handler in self._handlers.items():
                signal.signal(number, handler)
            os.close(self._writer)  # ends the thread

    def due(self) -> signal.Signals | None:
        """The signal after which the run is to end now, asked once after each step."""
        if self._several:
            return signal.SIGTERM if preempted() else None
        return self.requested

    @contextlib.contextmanager
    def breakable(self) -> Iterator[None]:
        """What runs inside is broken off by a signal, without an error; it must change nothing."""
        self._breakable = True
        try:
            try:
                yield
            finally:
                self._breakable = False
        except _Broken:
            pass

    def _handle(self, number: int, _: FrameType | None) -> None:
        if self.requested is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        first, self.requested = self.requested is None, signal.Signals(number)
        if first and self._breakable:
            raise _Broken

    def _watch(self, reader: int) -> None:
        """Read what the C part of the signal handler writes, at once, whatever Python is doing."""
        with open(reader, "rb", buffering=0) as numbers:
            while number := numbers.read(1):
                if number[0] in SIGNALS and not self.unsaved:
                    name = signal.Signals(number[0]).name
                    os.write(2, f"{name} before the first step was done: nothing to save\n".encode())
                    os._exit(EXIT_STATUS)


class _Broken(Exception):
    """Ends what runs in `Preemption.breakable`."""
