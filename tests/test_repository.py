"""What holds for the repository as a whole: scripts, configs, requirements, links, licence."""

import ast
import fnmatch
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# A requirement's import name, where it is not the requirement's own in lower case with underscores.
IMPORT_NAMES = {
    "absl-py": "absl",
    "orbax-checkpoint": "orbax",
    "pyyaml": "yaml",
    "tensorboardX": "tensorboardX",
}
OURS = {"llm_jax", "configs", "tests", "scripts"}


def project_files() -> list[Path]:
    """Files that git tracks or would track; every file below ROOT outside hidden folders without git."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    if shutil.which("git") and (ROOT / ".git").exists():
        output = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
        paths = [ROOT / name for name in output.split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if not path.relative_to(ROOT).parts[0].startswith(".")]
    return sorted(path for path in paths if path.is_file())


FILES = project_files()


def files(pattern: str) -> list[str]:
    """Project files whose path from ROOT matches a pattern (`*` crosses folders)."""
    return fnmatch.filter([path.relative_to(ROOT).as_posix() for path in FILES], pattern)


def requirements() -> dict[str, dict[str, str]]:
    """Bounds in setup.py: extra ("" = always) -> requirement name -> what follows the name."""
    lists = {}
    for node in ast.parse((ROOT / "setup.py").read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]).endswith("_REQUIRE"):
            lists |= ast.literal_eval(node.value)
        elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "INSTALL_REQUIRES":
            lists[""] = ast.literal_eval(node.value)
    split = re.compile(r"([\w-]+)(?:\[[\w,]+\])?(.*)")
    return {extra: dict(split.fullmatch(r).groups() for r in listed) for extra, listed in lists.items()}


def imported(folder: str) -> set[str]:
    """Top-level packages, neither ours nor the standard library's, imported below a folder."""
    names = set()
    for file in FILES:
        if file.suffix == ".py" and file.relative_to(ROOT).parts[0] == folder:
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.level == 0:
                    names.add(node.module.partition(".")[0])
    return names - OURS - set(sys.stdlib_module_names)


def import_names(*extras: str) -> set[str]:
    """Import names of the requirements of some extras."""
    listed = {name for extra in extras for name in requirements()[extra]}
    return {IMPORT_NAMES.get(name, name.lower().replace("-", "_")) for name in listed}


def test_what_is_imported_is_required():
    product = imported("llm_jax") | imported("scripts") | imported("configs")
    # scripts/{verify,benchmark}.py compare with the peers; who sets wandb_project has wandb.
    peers = {"torch", "transformers", "ctranslate2", "gguf", "llama_cpp", "wandb"}
    peers.add("jaxlib")  # which jax requires, of its own version
    assert product - import_names("", "data", "serve", "eval", "structured") <= peers
    extras = ("", "data", "serve", "eval", "structured", "test")
    assert imported("tests") <= import_names(*extras) | {"setuptools"}


def test_what_is_required_is_imported():
    product = imported("llm_jax") | imported("scripts") | imported("configs")
    unused = import_names("") - product
    assert not unused, f"setup.py requires {sorted(unused)}, which nothing imports"


def test_requirements_are_lower_bounds_and_oldest_txt_has_them():
    bounds = requirements()
    for extra, listed in bounds.items():
        for name, bound in listed.items():
            assert re.fullmatch(r"(>=[\d.]+)?", bound), f"[{extra}] {name}{bound}: lower bounds only"
    lines = (ROOT / ".ci" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    oldest = dict(line.split("==") for line in lines if not line.startswith("#"))
    wanted = bounds[""] | bounds["data"] | bounds["serve"] | bounds["eval"] | bounds["structured"]
    assert oldest == {name: bound.removeprefix(">=") for name, bound in wanted.items()}


def test_shell_scripts_pass_shellcheck():
    shellcheck = Path(sys.executable).parent / "shellcheck"
    scripts = [*files("*.sh"), *files("*.sbatch"), *files("tests/launch/bin/*"), ".ci/run"]
    run = subprocess.run(
        [shellcheck, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("script", files("scripts/*.py"))
def test_script_is_short_and_explained(script):
    text = (ROOT / script).read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert len(text.splitlines()) < 100, "parse, call, print; the rest belongs in llm_jax/"
    assert f"python {script}" in docstring, "the docstring shows the command"


@pytest.mark.parametrize("config", files("configs/*.py"))
def test_config_has_a_docstring_and_get_config(config):
    tree = ast.parse((ROOT / config).read_text(encoding="utf-8"))
    assert ast.get_docstring(tree), "the docstring gives command, hardware, time and expected number"
    assert "get_config" in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_only_the_assets_are_not_text():
    for path in FILES:
        name = path.relative_to(ROOT)
        assert b"\0" not in path.read_bytes() or name.is_relative_to("llm_jax/assets"), f"{name}: binary"


def test_no_file_names_the_machine_it_was_written_on():
    absolute = re.compile(r"(?<![\w.:/$}-])/(?:root|home|work|Users)/\w")
    suffixes = {".py", ".sh", ".md", ".toml", ".yaml", ".yml", ""}
    for path in FILES:
        if path.suffix in suffixes:
            found = absolute.search(path.read_text(encoding="utf-8"))
            assert not found, f"{path.relative_to(ROOT)}: absolute path {found.group()!r}"


@pytest.mark.parametrize("document", files("*.md"))
def test_relative_links_resolve(document):
    path = ROOT / document
    text = re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not re.match(r"[a-z]+:|#", target):
            assert (path.parent / target.partition("#")[0]).exists(), f"{document} links to {target}"


def test_licence():
    text = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert "Apache License" in text and "The llm_jax Authors" in text
    assert 'license="Apache-2.0"' in (ROOT / "setup.py").read_text(encoding="utf-8")
