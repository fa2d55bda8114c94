"""Imports go one way: each room uses those below it; heavy packages stay in the files that need them."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "llm_jax"

GROUND = {"config", "distributed", "sharding", "tree"}
MODEL_ROOMS = GROUND | {"kernels", "ops", "models", "cache", "compress"}
RUN_ROOMS = MODEL_ROOMS | {"checkpoint", "data"}
ENGINE_ROOMS = RUN_ROOMS | {"train", "infer", "engine"}
BELOW = {  # room: the rooms it may import besides itself
    "config": set(),
    "cli": {"config", "distributed", "host_memory"},  # for scripts alone
    "distributed": set(),
    "host_memory": set(),
    "sharding": {"config"},
    "tree": {"config", "sharding"},
    "kernels": set(),  # jax only, so that they can be lifted out
    "tpu": set(),  # likewise
    "data": GROUND,
    "ops": GROUND | {"kernels"},
    "models": GROUND | {"kernels", "ops"},
    "cache": GROUND | {"kernels", "ops"},
    "compress": GROUND | {"kernels", "ops"},
    "checkpoint": MODEL_ROOMS,
    "train": RUN_ROOMS - {"cache"},  # so no gradient ever goes through pages
    "infer": RUN_ROOMS,
    "engine": ENGINE_ROOMS,
    "serve": ENGINE_ROOMS,
    "eval": ENGINE_ROOMS,
    "plan": ENGINE_ROOMS | {"serve", "eval", "tpu"},
    "bench": ENGINE_ROOMS | {"serve", "eval", "tpu"},
}
ONLY_IN = {  # package: the files that may import it
    "aiohttp": {"serve/server.py"},
    "ctranslate2": {"bench/runtimes.py"},
    "gguf": {"bench/runtimes.py"},
    "llama_cpp": {"bench/runtimes.py"},
    "llguidance": {"engine/structured.py"},
    "orbax": {"checkpoint/store.py"},
    "safetensors": set(),  # the format is read by checkpoint/tensor_file.py
    "tensorflow": set(),
    "torch": set(),
    "transformers": set(),
}
HOST_ONLY = {  # never jax
    f"engine/{name}.py"
    for name in ("beams", "request", "pages", "prefix", "plan", "scheduler", "trace", "whatif")
}
DEFERRED = {  # (file, module): why this import may stand inside a function
    ("bench/runtimes.py", "ctranslate2"): "a peer of benchmarks, imported only where one asks for it",
    ("bench/runtimes.py", "gguf"): "likewise",
    ("bench/runtimes.py", "llama_cpp"): "likewise",
    ("data/sources.py", "pyarrow"): "the extra `data`: 100 MB that only .zst files need",
    ("data/sources.py", "pyarrow.parquet"): "likewise, for Parquet files",
    ("train/metrics_log.py", "wandb"): "an optional service, imported only where the config asks for it",
}


def imports(tree: ast.AST) -> set[str]:
    """Dotted names that a syntax tree imports; `from llm_jax import x` counts as llm_jax.x."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: imports are absolute here"
            bare = node.module == "llm_jax"
            names |= {f"llm_jax.{alias.name}" for alias in node.names} if bare else {node.module}
    return names


def deferred(tree: ast.AST) -> set[str]:
    """Dotted names imported inside functions."""
    functions = (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    return set().union(*(imports(function) for function in functions))


FILES = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py"))]


@pytest.mark.parametrize("file", FILES)
def test_imports(file):
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    names = imports(tree)
    tops = {name.partition(".")[0] for name in names}
    rooms = {name.split(".")[1] for name in names if name.startswith("llm_jax.")}
    if file == "__init__.py":
        assert tops <= {"importlib", "typing"}, "importing llm_jax must cost nothing"
        return
    room = file.split("/")[0].removesuffix(".py")
    assert room in BELOW, f"{room} is a new room: give it a place in BELOW and in docs/architecture.md"
    assert rooms <= BELOW[room] | {room}, f"{file} may not import {sorted(rooms - BELOW[room] - {room})}"
    for package, allowed in ONLY_IN.items():
        assert package not in tops or file in allowed, f"{file}: {package} belongs in {sorted(allowed)}"
    assert file not in HOST_ONLY or "jax" not in tops, f"{file} runs on the host only: no jax"
    late = {name for name in deferred(tree) if (file, name) not in DEFERRED}
    assert not late, f"{file} imports {sorted(late)} inside a function"


def test_rooms_have_no_ring():
    """The table itself is a direction: some order puts every room after all the rooms it may import."""
    placed, left = set(), dict(BELOW)
    while left:
        free = {room for room, below in left.items() if below - {room} <= placed}
        assert free, f"rooms in a ring: {sorted(left)}"
        placed |= free
        left = {room: below for room, below in left.items() if room not in free}
