"""Errors of the scripts read like advice: one line, status 2, and a traceback only on request."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(*arguments):
    command, env = [sys.executable, *map(str, arguments)], os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=env)


@pytest.fixture
def script(tmp_path):
    """A function that runs a small script whose main does as told."""

    def run(body, *arguments):
        (tmp_path / "small.py").write_text(
            f"from llm_jax import cli\ndef main(argv):\n    {body}\ncli.run(main)\n"
        )
        return python(tmp_path / "small.py", *arguments)

    return run


@pytest.mark.slow  # imports all that trains
def test_train_names_the_nearest_task(tmp_path):
    config = """
        import ml_collections
        def get_config():
            return ml_collections.ConfigDict({"task": "classificaton"})
    """
    (tmp_path / "config.py").write_text(textwrap.dedent(config))
    train = [
        ROOT / "scripts" / "train.py",
        f"--config={tmp_path}/config.py",
        f"--workdir={tmp_path}/run",
    ]
    done = python(*train)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.startswith("train.py: config.task='classificaton': expected one of")
    assert done.stderr.endswith("did you mean classification? (--verbosity=1 shows the traceback)\n")
    assert done.stderr.count("\n") == 1


def test_the_traceback_is_there_on_request(script):
    done = script("open('absent.txt')", "-v=1")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1] == "small.py: [Errno 2] No such file or directory: 'absent.txt'"


def test_bugs_keep_their_traceback(script):
    done = script("[][0]")
    assert done.returncode == 1
    assert "Traceback" in done.stderr and done.stderr.endswith("IndexError: list index out of range\n")


def test_an_unknown_flag_suggests_the_nearest(script):
    done = script("pass", "--verbosty=1")
    assert done.returncode == 1
    assert "Unknown command line flag 'verbosty'. Did you mean: verbosity ?" in done.stderr


def test_a_group_of_settings_is_not_replaced_by_none(tmp_path):
    """The script says what to do instead; the text "None" is one."""
    (tmp_path / "config.py").write_text(
        "import ml_collections\n"
        "def get_config():\n"
        "    stage = {'steps': 3, 'epochs': 1.0}\n"
        "    return ml_collections.ConfigDict({'name': 'x', 'pretrain': stage}, type_safe=False)\n"
    )
    (tmp_path / "small.py").write_text(
        "from ml_collections import config_flags\n"
        "from llm_jax import cli\n"
        "CONFIG = config_flags.DEFINE_config_file('config')\n"
        "cli.run(lambda argv: print(CONFIG.value.name))\n"
    )
    command = (tmp_path / "small.py", f"--config={tmp_path}/config.py")
    for none in (["--config.pretrain=None"], ["--config.pretrain", "None"]):
        done = python(*command, *none)
        assert done.returncode == 2 and not done.stdout
        assert "say --config.pretrain.epochs=0 --config.pretrain.steps=0" in done.stderr
        assert done.stderr.startswith("small.py: --config.pretrain=None: ")
    assert python(*command, "--config.name=None").stdout == "None\n"


@pytest.mark.parametrize("arguments, shown", [([], "worrying"), (["-v=0"], "calm worrying")])
def test_warnings_are_logged(script, arguments, shown):
    """And more when asked for."""
    body = "from logging import info, warning; info('calm'); warning('worrying')"
    done = script(body, *arguments)
    assert done.returncode == 0
    assert " ".join(line.split()[-1] for line in done.stderr.splitlines()) == shown
