"""Kubernetes, SLURM and SkyPilot: files against the schemas of their readers; the SLURM script, run."""

import functools
import json
import os
import re
import stat
import subprocess
from pathlib import Path

import jsonschema
import pytest
import yaml
from jax._src.clusters import SlurmCluster

from tests.launch.conftest import ROOT

HERE = Path(__file__).parent
NEEDED = ["--name=demo", "--topology=v6e:4x4", "--image=lab/llm_jax:1"]


@functools.cache
def validator(name):
    schema = yaml.safe_load((HERE / f"{name}.schema.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


def check(document, schema):
    validator(schema).validate(document)


def render(*words):
    return subprocess.run(
        ["bash", ROOT / "launch" / "gke" / "render.sh", *words], capture_output=True, text=True
    )


def jobset(*words):
    """The JobSet, checked, and its one pod."""
    run = render(*NEEDED, *words)
    assert run.returncode == 0, run.stderr
    assert "$" not in run.stdout.replace("$HOME", "")
    document = yaml.safe_load(run.stdout)
    check(document, "jobset")
    return document, document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]


# Machines: cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus.
GKE = {
    "v4:2x2x4": ("tpu-v4-podslice", 4, 4),
    "v5e:1x1": ("tpu-v5-lite-podslice", 1, 1),
    "v5e:4x8": ("tpu-v5-lite-podslice", 8, 4),
    "v5p:4x8x8": ("tpu-v5p-slice", 64, 4),
    "v6e:2x2": ("tpu-v6e-slice", 1, 4),
    "v6e:2x4": ("tpu-v6e-slice", 1, 8),
    "tpu7x:2x2x1": ("tpu7x", 1, 4),
    "tpu7x:4x4x4": ("tpu7x", 16, 4),
}


@pytest.mark.parametrize("topology", GKE)
@pytest.mark.parametrize("more", [[], ["--spot", "--bucket=lab", "--service_account=runner"]])
def test_jobset(topology, more):
    accelerator, hosts, chips = GKE[topology]
    document, pod = jobset(f"--topology={topology}", *more, "--", "python", "x.py")
    job = document["spec"]["replicatedJobs"][0]["template"]["spec"]
    assert job["completions"] == job["parallelism"] == hosts
    (container,) = pod["containers"]
    resources = container["resources"]
    assert resources["limits"] == resources["requests"] == {"google.com/tpu": chips}
    selector = pod["nodeSelector"]
    assert selector["cloud.google.com/gke-tpu-accelerator"] == accelerator
    assert selector["cloud.google.com/gke-tpu-topology"] == topology.split(":")[1]
    assert ("annotations" in document["metadata"]) == (hosts > 1)
    assert ("cloud.google.com/gke-spot" in selector) == ("tolerations" in pod) == bool(more)
    assert (
        ("volumes" in pod)
        == ("volumeMounts" in container)
        == ("serviceAccountName" in pod)
        == bool(more)
    )


def test_the_command_arrives_as_it_is():
    words = ["a  b", "'", '"', "\\n", "$HOME & ${NAME}", "#: [x]", "我喜欢", "-"]
    run = render(*NEEDED, "--", *words)
    document = yaml.safe_load(run.stdout)
    pod = document["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]
    assert pod["containers"][0]["command"] == words


def test_two_machines_of_four_chips_for_a_slice_of_eight():
    document, pod = jobset("--topology=v6e:2x4", "--chips_per_host=4", "--", "true")
    assert document["spec"]["replicatedJobs"][0]["template"]["spec"]["completions"] == 2
    assert pod["containers"][0]["resources"]["limits"] == {"google.com/tpu": 4}


REFUSED = {
    "no name": (["--name="], "--name is missing"),
    "a name": (["--name=Demo"], "--name=Demo: lower-case letters"),
    "a long name": ([f"--name={'a' * 41}"], "at most 40"),
    "no image": (["--image="], "--image is missing"),
    "a topology": (["--topology=v6e:4x5"], "the shapes of v6e are"),
    "machines": (["--chips_per_host=3"], "--chips_per_host=3: expected 1, 4 or 8, a divisor of 16"),
    "a bucket alone": (["--bucket=lab"], "--bucket=lab: needs --service_account"),
    "restarts": (["--max_restarts=many"], "--max_restarts=many: expected a whole number"),
    "a flag": (["--nam=x"], "flag --nam: unknown"),
    "a line break": (["--", "a\nb"], "has a line break"),
    "no command": (["--"], "there is no command"),
}


@pytest.mark.parametrize("mistake", REFUSED)
def test_render_refuses_by_name(mistake):
    words, message = REFUSED[mistake]
    run = render(*NEEDED, *words, *([] if "--" in words else ["--", "true"]))
    assert run.returncode == 2 and message in run.stderr and not run.stdout


def test_render_has_help():
    run = render("--help")
    assert run.returncode == 0 and "--chips_per_host=4" in run.stdout


def test_the_schema_knows_what_the_api_does_not():
    document, pod = jobset("--", "true")
    for place, name in [(document["spec"], "restartPolicy"), (pod, "nodeSelectors")]:
        place[name] = {}
        with pytest.raises(jsonschema.ValidationError, match=name):
            check(document, "jobset")
        del place[name]


def test_skypilot():
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    check(task, "skypilot")
    used = set(
        re.findall(r"\$\{?([A-Z]+)", task["setup"] + task["run"] + json.dumps(task["file_mounts"]))
    )
    assert used == set(task["envs"])
    assert (ROOT / task["setup"].split()[1]).exists()


def test_dockerfile_copies_what_setup_py_reads():
    text = (ROOT / "launch" / "gke" / "Dockerfile").read_text()
    copied = [name for line in re.findall(r"^COPY (.+) \S+$", text, re.M) for name in line.split()]
    assert copied[-1] == "." and all((ROOT / name).exists() for name in copied)
    read = re.findall(r'ROOT / "(\w+)" / "(\S+?)"|ROOT / "(\S+?)"', (ROOT / "setup.py").read_text())
    assert {"/".join(filter(None, names)) for names in read} <= set(copied)


@pytest.fixture
def slurm(tmp_path):
    """train.sbatch with srun, which notes its words and ends with a status, and scontrol played."""
    for name, script in {
        "srun": 'printf "%s\\n" "$@" >"$LOG/srun"; exit "$STATUS"',
        "scontrol": 'echo "$@" >"$LOG/scontrol"; exit "$REFUSE"',
    }.items():
        path = tmp_path / name
        path.write_text(f"#!/usr/bin/env bash\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def run(status, *words, restarts=0, refuse=0):
        (tmp_path / "scontrol.log").unlink(missing_ok=True)
        environment = {
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "LOG": str(tmp_path / "log"),
            "STATUS": str(status),
            "REFUSE": str(refuse),
            "SLURM_SUBMIT_DIR": str(tmp_path),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "a[1-2]",
            "SLURM_RESTART_COUNT": str(restarts),
            "VENV": str(tmp_path),
        }
        (tmp_path / "log").mkdir(exist_ok=True)
        (tmp_path / "log" / "scontrol").unlink(missing_ok=True)
        (tmp_path / "bin").mkdir(exist_ok=True)
        script = ROOT / "launch" / "slurm" / "train.sbatch"
        run = subprocess.run(["bash", script, *words], env=environment, capture_output=True, text=True)
        requeued = (tmp_path / "log" / "scontrol").exists()
        return run.returncode, requeued, (tmp_path / "log" / "srun").read_text().splitlines()

    return run


def test_slurm_requeues_what_was_told_to_end(slurm):
    status, requeued, words = slurm(75, "--workdir=a b", "--mesh=fsdp:16")
    assert (status, requeued) == (75, True)
    assert words[-4:] == ["python", "scripts/train.py", "--workdir=a b", "--mesh=fsdp:16"]
    assert slurm(75, restarts=19)[:2] == (75, True)
    assert slurm(75, restarts=20)[:2] == (75, False)
    assert slurm(75, refuse=1)[:2] == (75, True)  # SLURM has done it


@pytest.mark.parametrize("status", [0, 1, 2, 137])
def test_slurm_leaves_other_ends(slurm, status):
    assert slurm(status)[:2] == (status, False)


def test_slurm_options():
    text = (ROOT / "launch" / "slurm" / "train.sbatch").read_text()
    options = dict(re.findall(r"^#SBATCH --([\w-]+)=?(\S*)$", text, re.M))
    assert options["ntasks-per-node"] == options["gpus-per-node"]  # jax gives process n of a node GPU n
    assert options["signal"] == "TERM@120"  # without B: to the processes, not to the script
    assert "requeue" in options and "gpus-per-task" not in options
    first = next(n for n, line in enumerate(text.splitlines()) if line and not line.startswith("#"))
    last = max(n for n, line in enumerate(text.splitlines()) if line.startswith("#SBATCH"))
    assert last < first, "sbatch reads no option after the first command"


def test_jax_finds_the_processes_of_slurm(monkeypatch):
    """What train.sbatch says of jax.distributed: the first node, one process for a GPU."""
    variables = {
        "SLURM_JOB_ID": "70000",
        "SLURM_STEP_NODELIST": "gpu[017-018],gpu20",
        "SLURM_NTASKS": "16",
        "SLURM_PROCID": "9",
        "SLURM_LOCALID": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present()
    host, port = SlurmCluster.get_coordinator_address(60, None).split(":")
    assert host == "gpu017" and 1024 < int(port) < 65536
    assert SlurmCluster.get_process_count() == 16 and SlurmCluster.get_process_id() == 9
    assert SlurmCluster.get_local_process_id() == 1
