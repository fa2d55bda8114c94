"""A pretended cloud: gcloud is bin/gcloud, workers are folders, and what ssh runs there really runs."""

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(__file__).parent / "bin"


class Cloud:
    """Runs the scripts of launch/ with gcloud played; `folder` is what bin/gcloud calls $FAKE."""

    def __init__(self, folder: Path, workers: int = 2):
        self.folder = folder
        self.environment = {
            "PATH": f"{BIN}:{os.environ['PATH']}",
            "HOME": str(folder),
            "FAKE": str(folder),
            "TPU": "slice",
            "ZONE": "us-west4-a",
            "POLL": "0",
        }
        for worker in range(workers):
            self.home(worker).mkdir()

    def home(self, worker: int) -> Path:
        return self.folder / f"worker-{worker}"

    def bring_code(self) -> None:
        """What setup.sh leaves on each worker, as far as job.sh needs it."""
        for home in self.folder.glob("worker-*"):
            shutil.copytree(ROOT / "launch" / "worker", home / "llm_jax" / "launch" / "worker")

    def states(self, *lines: str, created: int = 0) -> None:
        """The states to come, now or after the n-th creation."""
        name = f"created.{created}" if created else "ahead"
        (self.folder / name).write_text("".join(f"{line}\n" for line in lines))

    def start(self, script: str, *words: str, root: Path = ROOT, stdin=subprocess.DEVNULL):
        """bash launch/SCRIPT.sh WORDS, in a session of its own, with pipes for its output."""
        command = ["bash", root / "launch" / f"{script}.sh", *words]
        pipes = {"stdin": stdin, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(
            command, env=self.environment, text=True, start_new_session=True, **pipes
        )

    def run(self, script: str, *words: str, **options) -> subprocess.CompletedProcess:
        """The same, to its end."""
        with self.start(script, *words, **options) as process:
            stdout, stderr = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, stdout, stderr)

    def calls(self) -> list[str]:
        """The command lines that gcloud got so far."""
        file = self.folder / "calls"
        return file.read_text().splitlines() if file.exists() else []

    def verbs(self) -> list[str]:
        """Of those that change or use the slice, the verb: create, ssh, scp, delete."""
        return [word for call in self.calls() for word in call.split()[4:5] if word != "describe"]

    def kill_runs(self) -> None:
        for file in self.folder.glob("worker-*/llm_jax_runs/*/pid"):
            process = Path("/proc") / file.read_text().strip()
            with contextlib.suppress(OSError):  # it has ended
                if b"llm_jax_run" in (process / "cmdline").read_bytes():
                    os.killpg(int(process.name), signal.SIGKILL)


@pytest.fixture
def cloud(tmp_path):
    """A slice of two workers that is ACTIVE."""
    cloud = Cloud(tmp_path)
    cloud.states("ACTIVE READY")
    yield cloud
    cloud.kill_runs()


@pytest.fixture
def repository(tmp_path):
    """A small copy of this repository, with a file that is not committed and one that was removed."""
    root = tmp_path / "repository"
    shutil.copytree(ROOT / "launch", root / "launch")
    (root / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "env.sh", root / "scripts")
    for name in ("setup.py", "gone.py", "changed.py", ".gitignore"):
        (root / name).write_text("ignored.py\n")
    (root / "ignored.py").write_text("")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *words], cwd=root, check=True)
    (root / "gone.py").unlink()
    (root / "changed.py").write_text("changed\n")
    (root / "new file.py").write_text("new\n")
    return root
