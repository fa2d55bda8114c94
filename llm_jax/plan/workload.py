"""What is to be quoted: a model, its precision, how many sequences of what length; and prices."""

import dataclasses
import functools
import json
import math
from pathlib import Path

from llm_jax.checkpoint.hf import load_config
from llm_jax.compress.quantize import SCHEMES
from llm_jax.config import OPTIMIZERS, ModelConfig, nearest
from llm_jax.config.checks import choice, require
from llm_jax.kernels.chips import RULES
from llm_jax.models.families import from_hf
from llm_jax.tpu.chips import chip_of
from llm_jax.tpu.links import LINKS

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
WEIGHTS = {"bf16": "bfloat16", "int8": "int8", "w8a8": "w8a8", "f32": "float32"}
CACHES = {"bf16": "bfloat16", "int8": "int8", "fp8": "float8_e4m3fn", "f32": "float32"}
STEPS = ("prefill", "decode", "train")


@dataclasses.dataclass(frozen=True)
class Workload:
    """What a slice is to do.

    Attributes:
        model: a name of configs/models, or a directory with a config.json.
        batch: sequences that run at once, on all devices together; of training, rows of a batch.
        context: tokens of each, prompt and answer; of training, tokens of a row.
        weights: of the steps that serve, one of `WEIGHTS`; training keeps float32.
        cache: of keys and values, one of `CACHES`.
        page_size: tokens of a page of the cache.
        prefill_tokens: of prompts that one step reads on each data shard, at most.
        remat: what a layer keeps for its backward pass; see `ModelConfig.remat`.
        optimizer: of training; see `OptimConfig.optimizer`.
        microbatches: of training in stages; see `ModelConfig.microbatches`.
    """

    model: str
    batch: int = 8
    context: int = 2048
    weights: str = "bf16"
    cache: str = "bf16"
    page_size: int = 32
    prefill_tokens: int = 2048
    remat: str = "full"
    optimizer: str = "adamw"
    microbatches: int = 0

    def __post_init__(self):
        for name in ("batch", "context", "page_size", "prefill_tokens"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        choice("weights", self.weights, tuple(WEIGHTS))
        choice("optimizer", self.optimizer, tuple(OPTIMIZERS))
        dataclasses.replace(self.config, remat=self.remat, microbatches=self.microbatches)  # or refuses
        choice("cache", self.cache, tuple(CACHES))
        most = self.config.max_positions
        require(self.context <= most, "context", self.context, f"at most the model's {most} positions")

    @property
    def config(self) -> ModelConfig:
        """The model as it is served."""
        kept = "float32" if self.weights == "f32" else "bfloat16"
        served = {"param_dtype": kept, "compute_dtype": "bfloat16", "cache_dtype": "bfloat16"}
        return dataclasses.replace(model_config(self.model), **served)

    @property
    def scheme(self) -> str:
        """By which weights are rounded, one of `compress.quantize.SCHEMES`, or ""."""
        return self.weights if self.weights in SCHEMES else ""

    @property
    def pages(self) -> int:
        """Of one sequence."""
        return -(-self.context // self.page_size)

    def rows(self, shards: int) -> int:
        """Sequences on each data shard."""
        return -(-self.batch // shards)

    def prefill_steps(self, shards: int) -> int:
        """Steps that read the prompts of all sequences, as if prompts were the whole context."""
        return math.ceil(self.rows(shards) * self.context / self.prefill_tokens)


@functools.lru_cache(maxsize=32)
def model_config(name: str) -> ModelConfig:
    """The config of a preset or of a directory. Raises ValueError for a name that is neither."""
    if Path(name).is_dir():
        return load_config(name)
    path = CONFIGS / "models" / f"{name}.json"
    if not path.is_file():
        known = presets()
        raise ValueError(
            f"model={name!r} is neither a directory nor a preset{nearest(name, known)}; presets: "
            f"{', '.join(known)}"
        )
    return from_hf(json.loads(path.read_text()))


def presets() -> tuple[str, ...]:
    """Names of the public shapes in configs/models, as their authors publish them (config.json)."""
    return tuple(sorted(path.stem for path in (CONFIGS / "models").glob("*.json")))


def price_of(topology: str) -> float | None:
    """US dollars for an hour of one chip by configs/tpu_prices.json; None where that has no price."""
    return json.loads((CONFIGS / "tpu_prices.json").read_text())["usd_per_chip_hour"].get(
        chip_of(topology).name
    )


def chips(topology: str) -> int:
    """Chips of "v5e:4x4"."""
    chip_of(topology)
    shape = topology.partition(":")[2]
    if not shape or not all(n.isdigit() and int(n) for n in shape.split("x")):
        raise ValueError(f"topology={topology!r}: expected a shape, such as {topology}:2x2")
    return math.prod(int(n) for n in shape.split("x"))


def devices(topology: str) -> int:
    """JAX devices of "v5e:4x4"."""
    return chips(topology) * LINKS[chip_of(topology).name].devices


def device_kind(topology: str) -> str:
    """As JAX names the devices of "v5e:4x4"."""
    return next(kind for kind, rule in RULES.items() if rule.name == chip_of(topology).name)
