"""Many processes, one program: how they start, agree, wait for each other, and notice that one is lost.

Every process runs the same script on its own devices, and arrays span them all: JAX's multi-controller
runtime (https://docs.jax.dev/en/latest/multi_process.html). What it leaves to programs is here:

    member                 every script runs inside: start-up, and an end that the others are told of
    agree                  the same code, command line and settings in all of them, or none goes on
    arrive, barrier        places with names, by which a process that hangs is reported
    main_first, on_main, from_main     what is done once, on a file system that all of them see
    preempted              whether any of them was told to stop: the same answer in all, at the same step

They talk through the key-value store of jax.distributed, which process 0 serves. In a process that is
alone none of this does anything.
"""

import contextlib
import ctypes
import dataclasses
import faulthandler
import hashlib
import itertools
import json
import os
import platform
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NoReturn, Protocol, TypeVar

import jax
from jax._src import distributed as runtime  # its key-value store has no public name
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

T = TypeVar("T")

LOST = os.EX_UNAVAILABLE  # 69: this process ended because another one did, or hung
RESUMABLE = os.EX_TEMPFAIL  # 75: told to stop; the same command goes on
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
CLUSTERS = ("slurm", "ompi", "gketpu", "gcetpu")  # whose variables jax.distributed reads by itself
TIMEOUT = "LLM_JAX_BARRIER_TIMEOUT"  # seconds that the others wait for a process at most places
DEFAULT_TIMEOUT = 300.0
ALONE = 3600.0  # seconds for what process 0 does while the others wait

BEAT = 2.0  # seconds between two signs of life
SILENCE = 20.0  # seconds without one, after which a process counts as dead
# The same of jax.distributed's own signs, which tell of process 0. They come every half of it, so it
# notices after half of it at the earliest: later than the watch, whose message says more.
RUNTIME_SILENCE = 56
GRACE = 5.0  # seconds that a process has to end by itself when another one says that it failed
# How errors begin that the runtime raises when it cannot talk to a process: JaxRuntimeError, and
# ValueError of gloo.
BROKEN = re.compile("(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED|DATA_LOSS): ")
LINGER = 15.0  # seconds that process 0 serves the store after its failure, so that the others read of it


class Store(Protocol):
    """What is used of `jaxlib`'s DistributedRuntimeClient."""

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None: ...
    def key_value_dir_get(self, key: str) -> Sequence[tuple[str, str]]: ...
    def blocking_key_value_get(self, key: str, timeout_in_ms: int) -> str: ...
    def wait_at_barrier(self, barrier_id: str, timeout_in_ms: int) -> None: ...


@dataclasses.dataclass(frozen=True)
class Place:
    """Somewhere that all processes come by, in the same order."""

    number: int
    name: str
    since: float  # when this process arrived, by its monotonic clock
    timeout: float  # seconds that it waits for the others there


@dataclasses.dataclass(frozen=True)
class Sign:
    """What a process last wrote about itself."""

    beat: int = 0  # grows with every sign
    place: int = 0  # number of the last place where it arrived
    who: str = ""  # process and machine
    status: int | None = None  # its exit status, when it ends
    reason: str = ""  # and why it ends


class Watch:
    """Tells the other processes how far this one is, and ends it when one of them is lost.

    A thread does both every `BEAT` seconds. Lost is a process that says that it failed; one whose sign
    has not changed for `SILENCE` seconds; and one that is not where this one has waited for it for
    longer than the place allows.
    """

    def __init__(self, store: Store, index: int, count: int, timeout: float):
        self.store, self.index, self.count, self.timeout = store, index, count, timeout
        self._places = (Place(0, "start", time.monotonic(), timeout),)  # the newest ones
        self._sign = Sign(who=f"pid {os.getpid()} on {socket.gethostname()}")
        self._seen: dict[int, tuple[Sign, float]] = {}  # newest sign of each process, since when
        self._heard = time.monotonic()  # when the store was last read
        self._over, self._ending = threading.Event(), threading.Lock()
        self._thread = threading.Thread(target=self._run, name="watch", daemon=True)

    def begin(self) -> None:
        """Start the thread, and say something when the runtime aborts, as it does without process 0."""
        self._thread.start()
        faulthandler.enable()  # or absl would do it later, in place of what follows
        # Handlers of `signal.signal` run in the main thread, and it is another one that aborts. The
        # runtime has a callback for this, but none in Python (jaxlib 0.10.2: std::bad_cast).
        self._handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(self._aborted)
        ctypes.CDLL(None).signal(signal.SIGABRT, self._handler)

    def arrive(self, name: str, timeout: float | None = None) -> Place:
        """Note that this process is at the next place."""
        number = self._places[-1].number + 1
        place = Place(number, name, time.monotonic(), timeout or self.timeout)
        self._places = (*self._places[-99:], place)
        return place

    def problems(self, signs: Mapping[int, Sign], now: float) -> list[str]:
        """What is wrong with the others, in words, by their newest signs."""
        found = []
        for process in (p for p in range(self.count) if p != self.index):
            sign = signs.get(process, Sign())
            if self._seen.get(process, (None,))[0] != sign:
                self._seen[process] = sign, now
            problem = self._problem(sign, now - self._seen[process][1], now)
            if problem:
                found.append(f"process {process} ({self._who(process)}) {problem}")
        return found

    def _problem(self, sign: Sign, quiet: float, now: float) -> str:
        if sign.status is not None:
            failed = sign.status != 0 and quiet > GRACE
            return f"ended with status {sign.status}: {sign.reason}" if failed else ""
        if quiet > SILENCE:  # its place may be older than it is itself; this one waits at the right one
            where = f"It is missed at {self._places[-1].name!r}"
            return f"has given no sign of life for {quiet:.0f} s: it was killed, or is frozen. {where}"
        missed = next((place for place in self._places if place.number > sign.place), None)
        if missed is not None and now - missed.since > missed.timeout:
            waited = f"this one has waited for {now - missed.since:.0f} s"
            return f"lives, but hangs: {waited}. It is missed at {missed.name!r}"
        return ""

    def finish(self) -> None:
        """Tell the others that this process is done."""
        self._over.set()
        self._thread.join()
        self._tell(status=0)

    def leave(self, status: int, reason: str) -> NoReturn:
        """Tell the others why this process ends, and end it at once; nothing else is cleaned up."""
        with self._ending:  # which is never left: the first thread that comes here ends the process
            self._over.set()
            if threading.current_thread() is not self._thread:
                self._thread.join(BEAT)
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # where process 0 is gone
                self._tell(status=status, reason=reason)
                if self.index == 0:
                    self._linger()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)

    def _linger(self) -> None:
        """Serve the store until all others that live have ended, or should have."""
        end = time.monotonic() + LINGER
        while time.monotonic() < end:
            signs, now = self._read(), time.monotonic()
            self.problems(signs, now)  # for `_seen`
            living = [p for p, (sign, since) in self._seen.items() if now - since < SILENCE]
            if all(signs[p].status is not None for p in living if p in signs):
                return
            time.sleep(0.2)

    def _run(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._tell()
                signs, self._heard = self._read(), time.monotonic()
            except jax.errors.JaxRuntimeError:
                continue  # the store is gone, and process 0 with it: the runtime aborts in a moment
            if found := self.problems(signs, time.monotonic()):
                self._announce("; ".join(found))
                self.leave(LOST, "; ".join(found))

    def _announce(self, problem: str) -> None:
        message = f"process {self.index} of {self.count} ends (status {LOST}): {problem}"
        print(f"{message}. Start all of them again to go on", file=sys.stderr, flush=True)

    def _aborted(self, _: int) -> NoReturn:
        """Called where the runtime aborts, as it does when its leader, process 0, is lost."""
        if self._ending.acquire(blocking=False):  # else this process has said why it ends
            where = f". It is missed at {self._places[-1].name!r}"
            self._announce(self._cause_of_abort() + where)
        os._exit(LOST)

    def _cause_of_abort(self) -> str:
        now = time.monotonic()
        if self.index:
            leader = f"process 0 ({self._who(0)}), through which all of them talk,"
            host, _, port = str(runtime.global_state.coordinator_address).rpartition(":")
            try:
                socket.create_connection((host, int(port)), timeout=BEAT).close()
            except OSError:
                return f"{leader} is gone"
            if now - self._heard > 3 * BEAT:
                return f"{leader} does not answer"
        quiet = [p for p, (sign, since) in self._seen.items() if now - since > 3 * BEAT]
        lost = (f"process {p} ({self._who(p)}) has given no sign of life" for p in quiet)
        return "; ".join(lost) or "the runtime aborted, as it says above"

    def _who(self, process: int) -> str:
        sign, _ = self._seen.get(process, (Sign(), 0.0))
        return sign.who or "never heard of"

    def _tell(self, **changes: Any) -> None:
        beat, place = self._sign.beat + 1, self._places[-1].number
        self._sign = dataclasses.replace(self._sign, beat=beat, place=place, **changes)
        text = json.dumps(dataclasses.asdict(self._sign))
        self.store.key_value_set(f"llm_jax/signs/{self.index}", text, allow_overwrite=True)

    def _read(self) -> dict[int, Sign]:
        found = self.store.key_value_dir_get("llm_jax/signs/")
        return {int(key.rpartition("/")[2]): Sign(**json.loads(text)) for key, text in found}


_watch: Watch | None = None  # of this process, when there are several
_calls = itertools.count()  # of `preempted`


@contextlib.contextmanager
def member() -> Iterator[None]:
    """The program inside is one of several processes, where the environment describes them.

    Must be entered before jax is used. When the program ends with an error the others are told why, and
    this process ends at once. Raises ValueError for variables that describe no process, and OSError when
    the others do not come.
    """
    global _watch
    _watch = _start()
    if _watch is None:
        yield
        return
    _leave_standard_output_to_process_0()
    try:
        yield
    except BaseException as error:
        if not isinstance(error, SystemExit) or error.code not in (None, 0, RESUMABLE):
            _end(_watch, error)
        raise
    finally:
        barrier("the end of the program")
        _watch.finish()


def is_main() -> bool:
    """Whether this is process 0, the one that writes what is written once."""
    return _watch is None or _watch.index == 0


def arrive(name: str) -> None:
    """Note that this process is where all of them come by, such as a step; it does not wait."""
    if _watch is not None:
        _watch.arrive(name)


def barrier(name: str, timeout: float | None = None) -> None:
    """Wait for all processes; one that does not come ends the program, which says its number and `name`.

    timeout: seconds; when not given, what the environment's LLM_JAX_BARRIER_TIMEOUT says, or 300.
    """
    if _watch is not None:
        place = _watch.arrive(name, timeout)
        _watch.store.wait_at_barrier(f"llm_jax/{place.number} {name}", _patience(place))


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """The body runs in process 0, and then in the others, which find the files that it has written."""
    if not is_main():
        barrier(name, ALONE)
    yield
    if is_main():
        barrier(name, ALONE)


def from_main(name: str, function: Callable[[], T]) -> T:
    """What `function` returns in process 0, to all of them; a JSON value."""
    if _watch is None:
        return function()
    text = json.dumps(function()) if is_main() else ""
    place = _watch.arrive(name, ALONE)
    key = f"llm_jax/from_main/{place.number}"
    if is_main():
        _watch.store.key_value_set(key, text)
    return json.loads(text or _watch.store.blocking_key_value_get(key, _patience(place)))


def on_main(name: str, action: Callable[[], object]) -> None:
    """Run `action` in process 0, and have the others wait for it."""

    def act() -> None:
        action()

    from_main(name, act)


def agree(what: str, values: Mapping[str, Any], remedy: str) -> None:
    """ValueError in every process when `values` (nested; of JSON) are not the same in all.

    It names the values that differ, the processes that have each, and the `remedy`.
    """
    if _watch is None:
        return
    place = _watch.arrive(what)
    mine = {key: json.dumps(value, ensure_ascii=False) for key, value in _flat(values).items()}
    where = f"llm_jax/agree/{place.number}/"
    _watch.store.key_value_set(f"{where}{_watch.index}", json.dumps(mine))
    _watch.store.wait_at_barrier(where, _patience(place))
    found = _watch.store.key_value_dir_get(where)
    given = {int(key.rpartition("/")[2]): json.loads(text) for key, text in found}
    if differences := _differences(given):
        raise ValueError(f"the processes differ in their {what}:\n{differences}\n{remedy}")


def code() -> dict[str, str]:
    """What computes: a hash of this package's sources, and the versions of what is below it."""
    package, digest = Path(__file__).parent, hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    versions = {name: metadata.version(name) for name in ("jax", "jaxlib")}
    return {"sources": digest.hexdigest()[:16], "python": platform.python_version(), **versions}


def preempted() -> bool:
    """Whether a SIGTERM came to any process: the same in all of them, at the same call.

    All processes must call it equally often, once a step say. It may take a few calls to tell.
    """
    return multihost_utils.reached_preemption_sync_point(next(_calls))


def _start() -> Watch | None:
    """Join the other processes; None where there are none."""
    arguments = _environment()
    if arguments is None:
        return None
    text = os.environ.get(TIMEOUT, str(DEFAULT_TIMEOUT))
    if not text.replace(".", "", 1).isdigit() or not float(text):
        raise ValueError(f"{TIMEOUT}={text!r}: expected seconds, more than 0")
    jax.config.update("jax_cpu_enable_async_dispatch", False)  # queued collectives can deadlock on CPUs
    try:
        jax.distributed.initialize(**arguments, heartbeat_timeout_seconds=RUNTIME_SILENCE)
    except jax.errors.JaxRuntimeError as error:
        raise OSError(f"the processes did not come together: {error}") from error
    state = runtime.global_state
    watch = Watch(state.client, state.process_id, state.num_processes, float(text))
    watch.begin()
    return watch


def _leave_standard_output_to_process_0() -> None:
    """What the other processes print is dropped; what libraries print (gloo does) goes to stderr."""
    saved = os.dup(1) if is_main() else os.open(os.devnull, os.O_WRONLY)
    sys.stdout.flush()
    sys.stdout = open(saved, "w", encoding=sys.stdout.encoding, buffering=1)
    os.dup2(2, 1)


def _environment() -> dict[str, Any] | None:
    """How `jax.distributed.initialize` is to be called; None where there is one process only."""
    given = {name: os.environ.get(name, "") for name in (COUNT, INDEX)}
    if any(given.values()):
        for name, value in given.items():
            if not value.isdigit():
                raise ValueError(
                    f"{name}={value!r}: expected a number, as {COUNT} and {INDEX} go together"
                )
        count, index = int(given[COUNT]), int(given[INDEX])
        if index >= max(count, 1) or not os.environ.get(ADDRESS):
            address = os.environ.get(ADDRESS, "")
            raise ValueError(
                f"{COUNT}={count}, {INDEX}={index}, {ADDRESS}={address!r}: expected an index from 0 to "
                "the count - 1, and HOST:PORT of process 0"
            )
        return {"num_processes": count, "process_id": index} if count > 1 else None
    for cluster in ClusterEnv._cluster_types:
        name = getattr(cluster, "name", "")  # in jax 0.8 one has none
        if name in CLUSTERS and cluster.is_env_present() and cluster.get_process_count() > 1:
            return {"cluster_detection_method": name}
    return None


def _end(watch: Watch, error: BaseException) -> NoReturn:
    """End this process because of `error`; first see whether another one is the cause of it."""
    if _from_runtime(error):
        print(f"process {watch.index}: looking for what broke: {error}", file=sys.stderr, flush=True)
        time.sleep(SILENCE + 3 * BEAT)  # in which the watch finds a process that is lost, if one is
    status, reason = 1, f"{type(error).__name__}: {error}"
    if isinstance(error, SystemExit):
        status = error.code if isinstance(error.code, int) else 1
        reason = str(error.__context__ or error)
    else:
        traceback.print_exception(error)
    watch.leave(status, reason)


def _from_runtime(error: BaseException | None) -> bool:
    """Whether it began with an error of jax's runtime, as when a process is gone that it talks to."""
    while error is not None:
        if BROKEN.match(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _patience(place: Place) -> int:
    """Milliseconds after which waiting fails, if nothing else has ended it."""
    return int(1000 * (place.timeout + 2 * SILENCE))


def _differences(given: Mapping[int, Mapping[str, str]]) -> str:
    """A line for each key whose value is not the same in all processes; "" when there is none."""
    lines = []
    for key in sorted(set().union(*given.values())):
        holders = defaultdict(list)
        for process, values in sorted(given.items()):
            holders[values.get(key, "nothing")].append(str(process))
        if len(holders) > 1:
            sides = (f"{value} in {_processes(numbers)}" for value, numbers in holders.items())
            lines.append(f"  {key}: {'; '.join(sides)}")
    return "\n".join(lines)


def _processes(numbers: Sequence[str], most: int = 8) -> str:
    if len(numbers) > most:
        return f"processes {', '.join(numbers[:most])} and {len(numbers) - most} more"
    return f"process{'es' * (len(numbers) > 1)} {', '.join(numbers)}"


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{'optim.b1': 0.9, ...} of nested settings; lists are values."""
    if not isinstance(values, Mapping):
        return {prefix: values}
    parts = (_flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in values.items())
    return {key: value for part in parts for key, value in part.items()}
