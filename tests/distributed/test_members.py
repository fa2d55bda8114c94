"""What processes say of each other, without any: start-up by the environment, agreement, lost ones."""

import dataclasses
import subprocess
from pathlib import Path

import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from llm_jax import distributed, sharding
from llm_jax.distributed import GRACE, SILENCE, Sign, Watch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def watch():
    """That of process 0 of three, which has arrived at "step 1" and, 10 s ago, at "step 2"."""
    made = Watch(store=None, index=0, count=3, timeout=60.0)
    made.arrive("step 1")
    made.arrive("step 2")
    return made


def now(watch, later=0.0):
    return watch._places[-1].since + later


def signs(**others):
    """Signs of processes 1 and 2, both at the second place if not said otherwise."""
    fine = Sign(beat=1, place=2, who="pid 7 on host")
    return {n: dataclasses.replace(fine, **others.get(f"p{n}", {})) for n in (1, 2)}


def test_all_is_well_while_signs_change_and_all_have_arrived(watch):
    for beat in range(40):
        assert not watch.problems(signs(p1={"beat": beat}, p2={"beat": beat}), now(watch, 4.0 * beat))


def test_a_silent_process_is_lost_and_the_place_it_missed_is_named(watch):
    for later in (0.0, SILENCE - 1):
        assert not watch.problems(signs(p1={"place": 1}, p2={"beat": int(later)}), now(watch, later))
    (problem,) = watch.problems(signs(p1={"place": 1}, p2={"beat": 99}), now(watch, SILENCE + 1))
    assert problem.startswith("process 1 (pid 7 on host) has given no sign of life for 21 s")
    assert problem.endswith("It is missed at 'step 2'")


def test_a_process_that_was_never_heard_of_is_lost_too(watch):
    assert not watch.problems({}, now(watch))
    problems = watch.problems({}, now(watch, SILENCE + 1))
    assert [problem.split(" has")[0] for problem in problems] == [
        "process 1 (never heard of)",
        "process 2 (never heard of)",
    ]
    assert all("It is missed at 'step 2'" in problem for problem in problems)


def test_a_process_that_lives_and_does_not_come_hangs(watch):
    for beat, later in enumerate((0.0, 20.0, 40.0, 59.0)):
        assert not watch.problems(
            signs(p1={"beat": beat}, p2={"beat": beat, "place": 1}), now(watch, later)
        )
    late = signs(p1={"beat": 9}, p2={"beat": 9, "place": 1})
    (problem,) = watch.problems(late, now(watch, 61.0))
    assert "process 2 (pid 7 on host) lives, but hangs: this one has waited for 61 s" in problem
    assert problem.endswith("It is missed at 'step 2'")


def test_a_place_may_give_more_time(watch):
    watch.arrive("the tokenizer", 3600.0)
    for beat in range(10):
        assert not watch.problems(signs(p1={"beat": beat}, p2={"beat": beat}), now(watch, 300.0 * beat))


def test_who_failed_is_told_after_a_while_and_who_is_done_is_not_missed(watch):
    failed = {"status": 2, "reason": "data is missing"}
    for later in (0.0, GRACE - 1):
        assert not watch.problems(signs(p1=failed, p2={"status": 0}), now(watch, later))
    (problem,) = watch.problems(signs(p1=failed, p2={"status": 0}), now(watch, GRACE + 1))
    assert problem == "process 1 (pid 7 on host) ended with status 2: data is missing"
    done = signs(p1={"status": 0}, p2={"status": 0})
    assert not watch.problems(done, now(watch, 1000.0))


def test_differences_name_values_and_processes():
    given = {
        0: {"seed": "1", "optim.b1": "0.9"},
        1: {"seed": "1"},
        2: {"seed": "2", "optim.b1": "0.9"},
    }
    assert distributed._differences(given) == (
        "  optim.b1: 0.9 in processes 0, 2; nothing in process 1\n"
        "  seed: 1 in processes 0, 1; 2 in process 2"
    )
    assert distributed._differences({n: given[0] for n in range(5)}) == ""


def test_errors_of_the_runtime_are_told_from_others():
    gloo = ValueError("UNKNOWN: Gloo all-reduce failed: Connection reset by peer")
    lost = OSError("the checkpoint could not be written")
    lost.__cause__ = RuntimeError("INTERNAL: Barrier failed")
    end = SystemExit(2)
    end.__context__ = gloo
    assert all(map(distributed._from_runtime, (gloo, lost, end)))
    memory = MemoryError("a step does not fit")
    memory.__cause__ = RuntimeError("RESOURCE_EXHAUSTED: Out of memory")
    assert not any(map(distributed._from_runtime, (memory, ValueError("no label"), SystemExit(2))))


def test_nested_settings_are_flat():
    flat = distributed._flat({"optim": {"b1": 0.9, "b2": [1, 2]}, "seed": None})
    assert flat == {"optim.b1": 0.9, "optim.b2": [1, 2], "seed": None}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID=''"),
        ({"JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES=''"),
        ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "JAX_NUM_PROCESSES='two'"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}, "JAX_COORDINATOR_ADDRESS=''"),
        ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"}, "JAX_PROCESS_ID=2"),
    ],
)
def test_variables_that_describe_no_process_are_refused(given, message, monkeypatch):
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed._environment()


def test_one_process_needs_no_others(monkeypatch):
    assert distributed._environment() is None
    monkeypatch.setenv("JAX_NUM_PROCESSES", "1")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "localhost:1234")
    assert distributed._environment() is None
    with distributed.member():
        distributed.agree("numbers", {"a": object()}, "")
        distributed.barrier("here")
        with distributed.main_first("there"):
            assert distributed.from_main("a", lambda: 3) == 3 and distributed.is_main()


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for a device of one of several processes."""

    id: int
    process_index: int
    platform: str = "cpu"
    device_kind: str = "cpu"


def devices(processes, each):
    return np.array([Device(n, n // each) for n in range(processes * each)], object)


@pytest.mark.parametrize(
    ("processes", "each", "shape", "shares"),
    [
        (4, 2, (4, 1, 2), [(0, 4), (1, 4), (2, 4), (3, 4)]),
        (2, 4, (2, 2, 2), [(0, 2), (1, 2)]),
        (4, 2, (2, 1, 4), [(0, 2), (0, 2), (1, 2), (1, 2)]),
        (2, 2, (1, 1, 4), [(0, 1), (0, 1)]),
        (1, 8, (2, 2, 2), [(0, 1)]),
    ],
)
def test_processes_hold_equal_parts_of_a_batch(processes, each, shape, shares, monkeypatch):
    mesh = fake_mesh(devices(processes, each).reshape(shape))
    for process, share in enumerate(shares):
        monkeypatch.setattr(sharding.jax, "process_index", lambda process=process: process)
        assert sharding.host_share.__wrapped__(mesh) == share


def test_unequal_parts_are_refused(monkeypatch):
    mesh = fake_mesh(devices(3, 2).reshape(2, 1, 3))
    with pytest.raises(ValueError, match="3 processes unequally"):
        sharding.host_share.__wrapped__(mesh)


def fake_mesh(array):
    """A mesh of devices [data, fsdp, tensor], its other axes of size 1."""
    sizes = dict.fromkeys(sharding.MESH_AXES, 1)
    sizes |= dict(zip(("data", "fsdp", "tensor"), array.shape, strict=True))
    whole = array.reshape(tuple(sizes.values()))
    return Mesh(whole, sharding.MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


@pytest.mark.parametrize("arguments", [(), ("2",), ("0", "true"), ("--devices=x", "2", "true")])
def test_local_tells_how_it_is_called(arguments):
    done = subprocess.run([ROOT / "launch" / "local.sh", *arguments], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("usage: launch/local.sh")


def test_local_numbers_lines_and_gives_the_first_failure(tmp_path):
    script = (
        'echo "out $JAX_PROCESS_ID/$JAX_NUM_PROCESSES"; echo "err" >&2; exit $((JAX_PROCESS_ID * 3))'
    )
    command = [ROOT / "launch" / "local.sh", "2", "bash", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 3
    assert sorted(done.stdout.splitlines()) == ["[0] out 0/2", "[1] out 1/2"]
    assert "[local] process 1 ended with status 3" in done.stderr.splitlines()


def test_local_ends_all_when_it_is_told_to(tmp_path):
    script = 'trap "exit 75" TERM; touch "$0/$JAX_PROCESS_ID"; while true; do sleep 0.1; done'
    command = [ROOT / "launch" / "local.sh", "2", "bash", "-c", script, tmp_path]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while len(list(tmp_path.iterdir())) < 2:
            assert process.poll() is None
        process.terminate()
        assert process.wait(30) == 75
