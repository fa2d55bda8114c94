"""The scripts for TPU VMs, really run: gcloud is played, workers are folders, see conftest.py."""

import os
import pty
import signal
import subprocess
import time

import pytest

from tests.launch.conftest import ROOT

CREATE = ["--topology=v5e:4x4", "--spot"]


@pytest.fixture
def ready(cloud):
    """A slice with the code on its workers."""
    cloud.bring_code()
    return cloud


def test_create_waits_until_active(cloud):
    cloud.states(
        "WAITING_FOR_RESOURCES",
        "WAITING_FOR_RESOURCES",
        "PROVISIONING",
        "ACTIVE CREATING",
        "ACTIVE READY",
        created=1,
    )
    run = cloud.run("create", *CREATE)
    assert run.returncode == 0, run.stderr
    said = [line.split()[-1] for line in run.stderr.splitlines()[1:]]
    assert said == ["WAITING_FOR_RESOURCES", "PROVISIONING", "CREATING", "ACTIVE"]


@pytest.mark.parametrize("end", ["FAILED", "SUSPENDED", "ACTIVE PREEMPTED"])
def test_create_says_what_it_ended_in(cloud, end):
    cloud.states("PROVISIONING", end, created=1)
    run = cloud.run("create", *CREATE)
    assert run.returncode == 3
    assert end.split()[-1] in run.stderr and "queued-resources describe slice" in run.stderr


def test_create_bears_failures_of_gcloud_for_a_while(cloud):
    cloud.states(*["ERROR"] * 9, "ACTIVE READY", created=1)
    assert cloud.run("create", *CREATE).returncode == 0
    cloud.states(*["ERROR"] * 30, created=2)
    run = cloud.run("create", *CREATE)
    assert run.returncode == 1 and "UNAVAILABLE" in run.stderr


def test_create_fails_with_gcloud(cloud):
    run = cloud.run("create", *CREATE, "--gcloud_flags=--no-such-flag")
    assert run.returncode != 0 and "unrecognized arguments: --no-such-flag" in run.stderr
    assert len(cloud.calls()) == 1


def test_run_on_all_workers(ready):
    """The words of the command arrive as they are; its folder, PATH and log are the promised ones."""
    words = ["a  b", "$HOME", "it's", '"', "*", "我"]
    run = ready.run(
        "run", "x", "--", "bash", "-c", 'echo "${PATH%%:*}"; pwd; printf "<%s>" "$@"; echo', "-", *words
    )
    assert run.returncode == 0, run.stderr
    for worker in range(2):
        code = ready.home(worker) / "llm_jax"
        log = (ready.home(worker) / "llm_jax_runs" / "x" / "log").read_text().splitlines()
        assert log[0].startswith("== ") and log[1:] == [
            f"{code}/.venv/bin",
            str(code),
            "".join(f"<{word}>" for word in words),
        ]
    assert "<it's>" in run.stdout  # the log of worker 0
    assert run.stdout.splitlines()[-2:] == ["worker-0: x: exit status 0", "worker-1: x: exit status 0"]


def test_run_ends_with_the_exit_status(ready):
    script = 'echo of "$HOSTNAME"; [[ $HOSTNAME == worker-0 ]] || exit 75'
    run = ready.run("run", "x", "--", "bash", "-c", script)
    assert run.returncode == 75
    assert "worker-1: of worker-1" in run.stdout.splitlines()  # the end of the log that failed
    assert ready.run("run", "x", "--", "true").returncode == 0  # the same name again
    log = (ready.home(1) / "llm_jax_runs" / "x" / "log").read_text()
    assert log.count("== ") == 2


def test_run_is_refused_while_one_is_going_on(ready):
    assert ready.run("run", "long", "--detach", "--", "sleep", "60").returncode == 0
    run = ready.run("run", "other", "--", "true")
    assert run.returncode == 1
    assert "long is running: wait for it (launch/logs.sh) or end it (launch/stop.sh)" in run.stdout
    assert not list(ready.folder.glob("worker-*/llm_jax_runs/other"))


def test_a_run_that_does_not_start_everywhere_is_stopped(ready):
    (ready.home(1) / "llm_jax_runs" / "x").mkdir(parents=True)
    (ready.home(1) / "llm_jax_runs" / "x" / "command").mkdir()  # cannot be written
    run = ready.run("run", "x", "--", "sleep", "60")
    assert run.returncode == 1 and "did not start everywhere" in run.stderr
    assert (ready.home(0) / "llm_jax_runs" / "x" / "exit_status").read_text() == "143\n"


def test_status_and_stop(ready):
    """SIGTERM reaches the command, whose own exit status is kept."""
    script = 'trap "echo saved; exit 75" TERM; echo up; while true; do sleep 0.1; done'
    ready.run("run", "x", "--detach", "--", "bash", "-c", script)
    log = ready.home(1) / "llm_jax_runs" / "x" / "log"
    wait_for(lambda: "up" in log.read_text())
    status = ready.run("status")
    assert "slice: ACTIVE" in status.stdout and "worker-1: x: running: bash -c" in status.stdout
    stop = ready.run("stop", "x")
    assert stop.stdout.splitlines() == ["worker-0: x: exit status 75", "worker-1: x: exit status 75"]
    assert log.read_text().endswith("saved\n")
    assert "worker-0: x: 75:" in ready.run("status").stdout


def test_a_run_that_left_no_status(ready):
    """As after a restart of the VM; also where another process has its number since."""
    ready.run("run", "x", "--detach", "--", "sleep", "60")
    ready.kill_runs()
    wait_for(lambda: "x: running" not in ready.run("status").stdout)
    with subprocess.Popen(["sleep", "60"], start_new_session=True) as other:
        (ready.home(1) / "llm_jax_runs" / "x" / "pid").write_text(f"{other.pid}\n")
        status = ready.run("status").stdout
        other.kill()
    assert "worker-0: x: lost:" in status and "worker-1: x: lost:" in status
    assert ready.run("run", "y", "--", "true").returncode == 0


def test_logs(ready):
    ready.run("run", "x", "--", "bash", "-c", "seq 9; sleep 0.3; echo end of $HOSTNAME")
    assert ready.run("logs", "x", "--lines=2").stdout.splitlines() == ["9", "end of worker-0"]
    all_workers = ready.run("logs", "x", "--worker=all", "--lines=1")
    assert all_workers.stdout.splitlines() == [f"worker-{n}: end of worker-{n}" for n in range(2)]
    assert ready.run("logs", "y").returncode == 2


def test_logs_follow(ready):
    """What is written after logs.sh was called is shown."""
    gate = ready.folder / "gate"
    script = f"echo first; until [[ -e {gate} ]]; do sleep 0.05; done; echo second"
    ready.run("run", "x", "--detach", "--", "bash", "-c", script)
    with ready.start("logs", "x") as logs:
        lines = iter(logs.stdout)
        assert next(lines).startswith("== ") and next(lines) == "first\n"
        gate.touch()
        assert next(lines) == "second\n" and not list(lines)


def test_fetch(ready, tmp_path):
    checkpoint = ready.home(0) / "llm_jax" / "runs" / "x" / "checkpoint"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_text("of worker 0")
    there = tmp_path / "there"
    assert ready.run("fetch", "runs/x", f"--to={there}").returncode == 0
    assert (there / "x" / "checkpoint").read_text() == "of worker 0"
    (ready.folder / "bucket").mkdir()
    (ready.folder / "bucket" / "results.json").write_text("{}")
    (there / "y").mkdir()
    assert ready.run("fetch", "gs://lab/y/", f"--to={there}").returncode == 0
    assert (there / "y" / "results.json").exists()


def test_delete_asks(cloud):
    refused = cloud.run("delete")
    assert refused.returncode == 2 and "add --yes to delete slice" in refused.stderr
    assert cloud.calls() == []
    assert at_terminal(cloud, "n\n") == 2 and "delete" not in cloud.verbs()
    assert at_terminal(cloud, "y\n") == 0 and cloud.verbs()[-1] == "delete"
    assert cloud.run("delete", "--yes").returncode == 0


def at_terminal(cloud, answer):
    """Exit status of delete.sh at a terminal where this is typed."""
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    run = cloud.run("delete", stdin=theirs)
    os.close(ours), os.close(theirs)
    return run.returncode


def test_setup_brings_this_folder(cloud, repository):
    run = cloud.run("setup", root=repository)
    assert run.returncode == 0, run.stderr
    for worker in range(2):
        code = cloud.home(worker) / "llm_jax"
        assert (code / "changed.py").read_text() == "changed\n" and (code / "new file.py").exists()
        assert not (code / "gone.py").exists() and not (code / "ignored.py").exists()
        assert (code / ".venv" / "bin" / "python").exists()
        assert "--editable .[tpu]" in (cloud.home(worker) / "pip").read_text()
    assert run.stderr.count("process 0 of 1: 4 of 4 devices") == 2
    assert "all workers have code version" in run.stderr


def test_setup_again_removes_what_is_gone_and_keeps_the_rest(cloud, repository):
    cloud.run("setup", root=repository)
    result = cloud.home(1) / "llm_jax" / "runs" / "x"
    result.mkdir(parents=True)
    (repository / "new file.py").unlink()
    run = cloud.run("setup", root=repository)
    assert run.returncode == 0, run.stderr
    assert not (cloud.home(1) / "llm_jax" / "new file.py").exists() and result.exists()
    assert len((cloud.home(1) / "pip").read_text().splitlines()) == 2  # upgraded and installed once


def test_setup_mounts_a_bucket(cloud, repository):
    assert cloud.run("setup", "--bucket=lab", root=repository).returncode == 0
    words = (cloud.home(1) / "gcsfuse").read_text().split()
    assert words[-2:] == ["lab", str(cloud.home(1) / "bucket")] and (cloud.home(1) / "bucket").is_dir()


def test_setup_notices_other_code_on_a_worker(cloud, repository):
    """Here the set-up itself changes a file on one of the workers."""
    script = repository / "launch" / "worker" / "setup.sh"
    script.write_text(
        script.read_text().replace(
            "python -", "[[ $HOSTNAME == worker-0 ]] || echo >>changed.py\npython -"
        )
    )
    run = cloud.run("setup", root=repository)
    assert run.returncode == 2 and "the workers should all have one code version" in run.stderr


def test_setup_is_refused_during_a_run(cloud, repository):
    cloud.run("setup", root=repository)
    cloud.run("run", "x", "--detach", "--", "sleep", "60")
    run = cloud.run("setup", root=repository)
    assert run.returncode == 1 and "x is running" in run.stderr


def test_setup_clones_a_repository(cloud, repository):
    branch = subprocess.run(
        ["git", "branch", "--show-current"], cwd=repository, check=True, capture_output=True, text=True
    )
    words = [f"--repository={repository}", f"--ref={branch.stdout.strip()}"]
    for _ in range(2):
        run = cloud.run("setup", *words, root=repository)
        assert run.returncode == 0, run.stderr
    code = cloud.home(1) / "llm_jax"
    assert (code / "gone.py").exists() and not (code / "new file.py").exists()  # as it was committed


@pytest.fixture
def spot(cloud, repository):
    """No slice yet; `keep` runs keep.sh of the small repository with a command."""
    cloud.states("NONE")

    def keep(command, *flags, run=cloud.run):
        words = ["x", *CREATE, "--max_restarts=2", *flags, "--", "bash", "-c", command]
        return run("keep", *words, root=repository)

    cloud.keep = keep
    return cloud


def test_keep_recreates_a_lost_slice(spot):
    """The first slice goes away during the run, the second does not come, on the third the run ends."""
    spot.states("PROVISIONING", *["ACTIVE READY"] * 6, "ACTIVE PREEMPTED", created=1)
    spot.states("FAILED", created=2)
    spot.states("ACTIVE READY", created=3)
    count = spot.folder / "count"  # outlives the slices, as a bucket does
    command = f"echo >>{count}; (( $(wc -l <{count}) > 2 )) || sleep 60"
    run = spot.keep(command)
    assert run.returncode == 0, run.stderr
    verbs = [verb for verb in spot.verbs() if verb != "ssh"]
    assert verbs == ["create", "scp", "delete", "create", "delete", "create", "scp"]
    said = [line for line in run.stderr.splitlines() if line.startswith("[keep] ")]
    assert (
        "[keep] x: PREEMPTED" in said
        and "[keep] x: FAILED" in said
        and "[keep] restart 2 of at most 2" in said
    )
    assert said[-1] == "[keep] x: 0"


def test_keep_goes_on_with_a_run_that_is_there(spot):
    """keep.sh may be ended and started again; it never deletes a slice whose state it cannot know."""
    spot.states("ACTIVE READY", "ACTIVE READY", "ERROR", created=1)
    gate = spot.folder / "gate"
    command = f"until [[ -e {gate} ]]; do sleep 0.05; done"
    with spot.keep(command, run=spot.start) as first:
        wait_for(lambda: len(spot.calls()) > 30)
        os.killpg(first.pid, signal.SIGKILL)
    assert spot.verbs().count("create") == 1 and "delete" not in spot.verbs()
    spot.states("ACTIVE READY")
    seen = len(spot.calls())
    with spot.keep(command, run=spot.start) as again:
        wait_for(lambda: len(spot.calls()) > seen + 3)
        gate.touch()
        again.communicate(timeout=60)
    assert again.returncode == 0
    assert spot.verbs().count("scp") == 1


def test_keep_replaces_a_slice_that_does_not_answer(spot):
    spot.states("ACTIVE READY", created=1)
    unreachable = spot.folder / "unreachable"
    count = spot.folder / "count"
    run = spot.keep(
        f"echo >>{count}; (( $(wc -l <{count}) > 2 )) || touch {unreachable}; [[ ! -e {unreachable} ]]"
    )
    assert run.returncode == 0, run.stderr
    assert "[keep] x: UNREACHABLE" in run.stderr


def test_keep_gives_up(spot):
    for created in range(1, 5):
        spot.states("ACTIVE READY", "ACTIVE READY", "SUSPENDED", created=created)
    run = spot.keep("sleep 60", "--delete")
    assert run.returncode == 3 and "gave up after 2 restarts" in run.stderr
    assert spot.verbs().count("create") == 3 and spot.verbs()[-1] == "delete"


@pytest.mark.parametrize("end", ["exit 75", "exit 69", "kill -KILL $PPID $$"])
def test_keep_runs_again_what_was_told_to_end_or_lost(spot, end):
    spot.states("ACTIVE READY", "ACTIVE REPAIRING", "ACTIVE READY", created=1)
    count = spot.folder / "count"
    run = spot.keep(f"echo >>{count}; (( $(wc -l <{count}) > 2 )) || {end}")
    assert run.returncode == 0, run.stderr
    assert spot.verbs().count("create") == 1


@pytest.mark.parametrize("command", ["exit 2", "[[ $HOSTNAME == worker-0 ]] && exit 69; exit 2"])
def test_keep_does_not_repeat_a_failure(spot, command):
    run = spot.keep(command)
    assert run.returncode == 2
    assert spot.verbs().count("create") == 1 and "delete" not in spot.verbs()


def test_keep_does_not_repeat_what_gcloud_refuses(spot):
    run = spot.keep("true", "--gcloud_flags=--no-such-flag")
    assert run.returncode == 1 and spot.verbs() == ["create"]


def test_keep_waits_for_a_slice_that_was_requested_before(spot):
    spot.states("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE READY")
    assert spot.keep("true").returncode == 0
    assert "create" not in spot.verbs()


def wait_for(condition):
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_run_that_dies_before_it_is_seen_has_started_and_is_lost(tmp_path):
    job, environment = ROOT / "launch" / "worker" / "job.sh", os.environ | {"HOME": str(tmp_path)}

    def run(*words):
        command = ["bash", job, *words]
        return subprocess.run(
            command, env=environment, timeout=30, check=True, capture_output=True, text=True
        ).stdout

    for i in range(20):
        assert "has started" in run("start", f"r{i}", "bash", "-c", "kill -KILL $PPID")
        # It may also be seen before it is killed.
        wait_for(lambda i=i: run("result", f"r{i}") == "lost\n")
        assert f"r{i}: exit status lost" in run("stop", f"r{i}")
