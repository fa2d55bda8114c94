"""What each script would run, word by word; flags that gcloud has; mistakes that are refused by name."""

import re
import shlex
from pathlib import Path

import pytest

FLAGS = dict(
    line.split(": ", 1)
    for line in (Path(__file__).parent / "flags.txt").read_text().splitlines()
    if not line.startswith("#")
)
SLICE = ["--tpu=demo", "--zone=us-west4-a", "--project=lab"]
TAIL = "--zone=us-west4-a --project=lab"
QUEUED = "gcloud compute tpus queued-resources"
NODE = "gcloud compute tpus tpu-vm"
JOB = "bash llm_jax/launch/worker/job.sh"
IDLE = f"{{ [ ! -f llm_jax/launch/worker/job.sh ] || {JOB} idle; }}"
UNPACK = "mkdir -p llm_jax && cd llm_jax && { [ ! -f .code_files ] || xargs -0 rm -f <.code_files; }"
UNPACK += " && tar -xzf ../code.tar.gz"
LOOK = [
    f"{QUEUED} describe demo '--format=value(state.state)' {TAIL}",
    f"{NODE} describe demo '--format=value(state)' {TAIL}",
]


def ssh(worker, command):
    flags = f"--worker={worker} --ssh-flag=-oConnectTimeout=30 --ssh-flag=-oServerAliveInterval=30"
    return f"{NODE} ssh demo {flags} '--command={command}' {TAIL}"


# Accelerator types and runtime versions: cloud.google.com/tpu/docs/{v4,v5e,v5p,v6e,runtimes}.
CREATE = {
    "v4:2x2x1": ("v4-8", "tpu-ubuntu2204-base"),
    "v4:4x4x4": ("v4-128", "tpu-ubuntu2204-base"),
    "v5e:1x1": ("v5litepod-1", "v2-alpha-tpuv5-lite"),
    "v5e:4x4": ("v5litepod-16", "v2-alpha-tpuv5-lite"),
    "v5e:16x16": ("v5litepod-256", "v2-alpha-tpuv5-lite"),
    "v5p:2x2x1": ("v5p-8", "v2-alpha-tpuv5"),
    "v5p:4x8x8": ("v5p-512", "v2-alpha-tpuv5"),
    "v6e:2x4": ("v6e-8", "v2-alpha-tpuv6e"),
    "v6e:8x8": ("v6e-64", "v2-alpha-tpuv6e"),
}


@pytest.mark.parametrize("topology", CREATE)
def test_create(cloud, topology):
    accelerator, runtime = CREATE[topology]
    run = cloud.run("create", *SLICE, f"--topology={topology}", "--spot", "--dry_run")
    assert run.returncode == 0, run.stderr
    flags = f"--node-id=demo --accelerator-type={accelerator} --runtime-version={runtime} --spot"
    assert commands(run) == [f"{QUEUED} create demo {flags} {TAIL}", *LOOK]
    assert cloud.calls() == []


def test_create_from_a_reservation_with_further_flags(cloud):
    more = "--gcloud_flags=--network=net --internal-ips"
    run = cloud.run(
        "create", *SLICE, "--topology=v6e:4x4", "--reservation=r1", "--valid_for=6h", more, "--dry_run"
    )
    flags = "--node-id=demo --accelerator-type=v6e-16 --runtime-version=v2-alpha-tpuv6e"
    flags += " --valid-until-duration=6h --reservation=r1 --network=net --internal-ips"
    assert commands(run)[0] == f"gcloud alpha compute tpus queued-resources create demo {flags} {TAIL}"


SCRIPTS = {
    "status": (
        [],
        [
            *LOOK,
            f"{NODE} describe demo '--format=value(acceleratorType,runtimeVersion,health,"
            f"networkEndpoints[].ipAddress)' {TAIL}",
            ssh("all", f"{JOB} status"),
        ],
    ),
    "setup": (
        ["--bucket=lab"],
        [
            f"{NODE} scp FOLDER/code.tar.gz demo:code.tar.gz --worker=all {TAIL}",
            ssh("all", f"{IDLE} && {UNPACK} && bash launch/worker/setup.sh tpu lab"),
        ],
    ),
    "run": (
        ["train", "--", "python", "scripts/train.py", "--workdir=a b"],
        [
            ssh("all", f"{JOB} idle"),
            ssh("all", f"{JOB} start train python scripts/train.py '\\''--workdir=a b'\\''"),
            ssh("0", f"{JOB} follow train +1"),
            ssh("all", f"{JOB} wait train"),
        ],
    ),
    "logs": (["train", "--worker=3"], [ssh("3", f"{JOB} follow train 100")]),
    "stop": (["train"], [ssh("all", f"{JOB} stop train")]),
    "fetch": (
        ["runs/x/"],
        ["mkdir -p runs", f"{NODE} scp demo:llm_jax/runs/x runs --recurse --worker=0 {TAIL}"],
    ),
    "delete": ([], [f"{QUEUED} delete demo --force --quiet {TAIL}"]),
}


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_other_scripts(cloud, script):
    words, expected = SCRIPTS[script]
    run = cloud.run(script, *SLICE, "--dry_run", *words)
    assert run.returncode == 0, run.stderr
    assert commands(run) == expected
    assert cloud.calls() == []


def test_setup_from_a_repository(cloud):
    run = cloud.run("setup", *SLICE, "--repository=https://example.org/a.git", "--dry_run")
    clone = "{ [ -d llm_jax/.git ] || git clone -q https://example.org/a.git llm_jax; } && cd llm_jax"
    clone += " && git fetch -q origin main && git checkout -q FETCH_HEAD"
    assert commands(run) == [ssh("all", f"{IDLE} && {clone} && bash launch/worker/setup.sh tpu")]


def test_fetch_from_a_bucket_needs_no_slice(cloud):
    run = cloud.run("fetch", "gs://lab/x", "--to=here", "--dry_run")
    assert commands(run) == ["mkdir -p here", "gcloud storage rsync --recursive gs://lab/x here/x"]


def test_keep(cloud):
    words = [
        "train",
        "--topology=v5e:4x4",
        "--spot",
        "--bucket=lab",
        "--dry_run",
        "--",
        "python",
        "x.py",
    ]
    run = cloud.run("keep", *SLICE, *words)
    assert run.returncode == 0, run.stderr
    verbs = [verb for line in commands(run) for verb in re.findall(r"(?:resources|tpu-vm) (\w+)", line)]
    once = ["create", "describe", "describe", "scp", "ssh", "ssh", "ssh"]
    assert verbs == [*once, "describe", "describe", "ssh", "delete"]
    assert cloud.calls() == []


@pytest.mark.parametrize("script", [*SCRIPTS, "create", "keep"])
def test_every_flag_is_one_that_gcloud_has(cloud, script):
    words = {"create": ["--topology=v4:2x2x1"], "keep": ["a", "--topology=v6e:2x2", "--", "true"]}
    arguments = [*SLICE, "--dry_run", *words.get(script, SCRIPTS.get(script, ([],))[0])]
    for line in commands(cloud.run(script, *arguments)):
        words_of_line = shlex.split(line)
        if words_of_line[0] != "gcloud":
            continue
        verb = next(verb for verb in FLAGS if " ".join(words_of_line[1:]).startswith(verb))
        used = {word.partition("=")[0] for word in words_of_line if word.startswith("--")}
        assert used <= set(FLAGS[verb].split()), line


def commands(run):
    """What a dry run printed, without comments."""
    return [line for line in run.stdout.splitlines() if not line.startswith("#")]


REFUSED = {
    "a generation": ("create --topology=v9:2x2", "v9:2x2: expected GENERATION:SHAPE"),
    "no generation": ("create --topology=4x4", "expected GENERATION:SHAPE, such as v5e:4x4"),
    "a shape": ("create --topology=v5e:3x3", "the shapes of v5e are 1x1 2x2 2x4 4x4"),
    "a flat shape of v5p": ("create --topology=v5p:4x4", "the shapes of v5p are 2x2x1"),
    "tpu7x": ("create --topology=tpu7x:2x2x1", "the Cloud TPU API has no tpu7x; use launch/gke/"),
    "two tiers": ("create --topology=v4:2x2x1 --spot --reserved", "exclude each other"),
    "no topology": ("create", "--topology is missing"),
    "an interval": ("create --topology=v4:2x2x1 --poll=soon", "--poll=soon: expected a whole number"),
    "an unknown flag": ("create --topolgy=v4:2x2x1", "flag --topolgy: unknown"),
    "a switch with a value": (
        "delete --yes=1",
        "flag --yes: unknown, or --NAME=VALUE where",
    ),
    "a flag without a value": ("logs a --worker", "flag --worker: unknown, or --NAME=VALUE where"),
    "a word": ("delete demo", "unexpected: demo"),
    "no name": ("run -- true", "expected the name of a run, and got: none"),
    "a path as a name": ("run a/b -- true", "name a/b: letters, digits"),
    "no command": ("run a", "there is no command: put it after a lone --"),
    "dry run too late": ("run a -- true --dry_run", "put --dry_run before the lone --"),
    "lines": ("logs a --lines=some", "--lines=some: expected a number"),
    "a reference": ("setup --ref=main", "--ref=main: only with --repository"),
    "nothing to fetch": ("fetch", "expected one folder or file, and got: none"),
    "a whole disk": ("fetch /", "fetching the whole disk"),
    "restarts": (
        "keep a --topology=v4:2x2x1 --max_restarts=-1 -- true",
        "--max_restarts=-1: expected",
    ),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_refused_by_name(cloud, mistake):
    line, message = REFUSED[mistake]
    script, *words = line.split()
    run = cloud.run(script, *words)
    assert run.returncode == 2
    assert message in run.stderr
    assert cloud.calls() == []


def test_slice_and_zone_are_needed(cloud):
    del cloud.environment["ZONE"]
    run = cloud.run("status")
    assert run.returncode == 2 and "--zone is missing" in run.stderr


@pytest.mark.parametrize("script", [*SCRIPTS, "create", "keep"])
def test_help_is_the_header(cloud, script):
    run = cloud.run(script, "--help")
    assert run.returncode == 0
    assert f"bash launch/{script}.sh" in run.stdout
    assert "--dry_run" in run.stdout and "--zone=ZONE" in run.stdout
    assert "set -euo" not in run.stdout
