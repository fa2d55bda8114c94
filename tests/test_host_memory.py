"""Programs that train on a CPU begin again with huge pages, once, and only where that helps."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from llm_jax.host_memory import SETTINGS, SYSTEM

SCRIPT = """
import os, sys
from pathlib import Path
from llm_jax import cli, host_memory
if len(sys.argv) > 2:
    host_memory.SYSTEM = Path(sys.argv[2])
host_memory.ACCELERATORS = (os.environ.get("DEVICE_FILES", "/absent*"),)
print("begins", os.getpid(), flush=True)
def main(argv):
    print(os.environ.get("GLIBC_TUNABLES"), *argv[1:], sys.flags.dont_write_bytecode)
    if len(argv) == 2:
        held = b"x" * (64 << 20)  # and no array of numpy, which asks for huge pages by itself
        print(*[line.strip() for line in open("/proc/self/smaps_rollup") if "AnonHuge" in line])
cli.run(main, huge_pages=True)
"""


@pytest.fixture
def script(tmp_path):
    """A function that runs SCRIPT with a system that says `mode`, and returns its lines."""

    def run(mode, **environment):
        (tmp_path / "small.py").write_text(SCRIPT)
        arguments = [sys.executable, "-B", str(tmp_path / "small.py"), "a b"]
        if mode is not None:
            (tmp_path / "enabled").write_text(mode)
            arguments.append(str(tmp_path / "enabled"))
        env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "JAX_PLATFORMS")}
        env |= {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        done = subprocess.run(arguments, capture_output=True, text=True, env=env | environment)
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


@pytest.fixture
def glibc():
    """Skips the test where the setting cannot help, whatever the system says."""
    name = os.confstr("CS_GNU_LIBC_VERSION") if sys.platform == "linux" else ""
    version = [int(part) for part in (name or "").removeprefix("glibc ").split(".") if part.isdecimal()]
    if version < [2, 35]:
        pytest.skip("needs glibc 2.35 or later")


@pytest.mark.usefixtures("glibc")
def test_it_begins_again_once_with_the_same_arguments_and_number(script):
    first, second, says = script("always [madvise] never\n", JAX_PLATFORMS="cpu")
    assert first == second and first.startswith("begins")
    assert says.startswith(f"{':'.join(SETTINGS)} a b ") and says.endswith(" 1")


@pytest.mark.parametrize(
    ("mode", "environment", "tunables"),
    [
        ("[always] madvise never\n", {"JAX_PLATFORMS": "cpu"}, "None"),
        ("always madvise [never]\n", {"JAX_PLATFORMS": "cpu"}, "None"),
        ("always [madvise] never\n", {"JAX_PLATFORMS": "cuda,cpu"}, "None"),
        ("always [madvise] never\n", {"JAX_PLATFORMS": "cpu", "GLIBC_TUNABLES": ""}, ""),
    ],
)
def test_it_goes_on_where_it_would_not_help_or_was_decided(script, mode, environment, tunables):
    begins, says = script(mode, **environment)
    assert begins.startswith("begins") and says.startswith(f"{tunables} a b")


@pytest.mark.usefixtures("glibc")
def test_the_kernel_gives_huge_pages(script):
    """By what it says of a process with an array of 64 MiB."""
    if not SYSTEM.exists() or "[madvise]" not in SYSTEM.read_text():
        pytest.skip(f"{SYSTEM} says that huge pages are not given on request")
    *_, huge = script(None, JAX_PLATFORMS="cpu")
    assert int(huge.split()[1]) >= 60 << 10  # kB
    *_, small = script(None, JAX_PLATFORMS="cpu", GLIBC_TUNABLES="")
    assert int(small.split()[1]) < int(huge.split()[1]) / 2


@pytest.mark.usefixtures("glibc")
def test_where_the_environment_does_not_say_the_device_files_do(script, tmp_path):
    """JAX takes the accelerator that it finds."""
    assert script("[madvise]")[-1].startswith(SETTINGS[0])
    (tmp_path / "accel0").touch()
    assert script("[madvise]", DEVICE_FILES=f"{tmp_path}/accel[0-9]*")[-1].startswith("None")


@pytest.mark.slow  # imports all that trains
@pytest.mark.parametrize("name", ["train", "benchmark"])
def test_the_scripts_that_train_ask_for_them(name):
    ask = (
        "import runpy, sys\nfrom llm_jax import cli\n"
        "cli.run = lambda main, **options: print(options)\n"
        "runpy.run_path(sys.argv[1], run_name='__main__')\n"
    )
    file = Path(__file__).resolve().parents[1] / "scripts" / f"{name}.py"
    said = subprocess.check_output([sys.executable, "-c", ask, str(file)], text=True)
    assert said == "{'huge_pages': True}\n"
