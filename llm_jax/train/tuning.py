"""What runs share that go on from a trained language model: where it starts, and what of it trains."""

import dataclasses
import functools
import math
from collections.abc import Callable
from pathlib import Path

import jax
from jax.sharding import Mesh

from llm_jax.checkpoint.peft import export_peft, peft_modules
from llm_jax.checkpoint.workdir import begin_run
from llm_jax.config import TrainConfig, TuneConfig
from llm_jax.data.loader import PackedLoader, this_host
from llm_jax.data.packing import Batch
from llm_jax.distributed import on_main
from llm_jax.models import Params, Trainable
from llm_jax.models.lora import LoraModel
from llm_jax.sharding import fetch
from llm_jax.train.pretrained import Pretrained, load_pretrained


@dataclasses.dataclass(frozen=True)
class Tuned:
    """The part of a pretrained model that trains: all of it, or adapters beside it."""

    model: Trainable
    start: Callable[[jax.Array], Params]  # key -> its first parameters
    frozen: tuple[Params, ...]  # what `model.bind` takes besides

    @property
    def num_parameters(self) -> int:
        """Numbers that train."""
        return sum(math.prod(s.shape) for s in jax.tree.leaves(self.model.shapes))


def load_base(config: TuneConfig, mesh: Mesh) -> Pretrained:
    """The model that the run starts from, with the config's chat template where it has one."""
    base = load_pretrained(config.init_from, mesh, field="init_from")
    if config.chat_template:
        base.tokenizer.chat_template = config.chat_template
    return base


def begin_tuning(config: TuneConfig, base: Pretrained, workdir: Path) -> None:
    """Begin or continue a run in `workdir`, as `begin_run` does, and put the tokenizer there."""
    dtypes = {"param_dtype": "", "compute_dtype": "", "cache_dtype": ""}  # those of who serves it
    begin_run(workdir, config, dataclasses.replace(base.model.config, **dtypes))
    on_main("tokenizer", functools.partial(base.tokenizer.save, workdir / "tokenizer"))


def tuned(config: TuneConfig, base: Pretrained, mesh: Mesh) -> Tuned:
    """What of `base` trains, by `config.lora`. The whole model starts as the arrays of `base`
    themselves, which the first step consumes.
    """
    if config.lora is None:
        return Tuned(base.model, lambda _: base.params, ())
    lora = LoraModel(base.model, config.lora)
    peft_modules(lora)  # raises where the adapters could not be written after the training
    return Tuned(lora, functools.partial(lora.init, base.params, mesh), (base.params,))


def rows_loader(rows: Batch, config: TrainConfig, mesh: Mesh) -> PackedLoader:
    """This host's rows of every batch."""
    return PackedLoader(rows, config.batch_size, config.seed, **this_host(mesh))


def export_adapter(directory: Path, model: Trainable, params: Params, *, base: str) -> None:
    """Write `directory` as PEFT reads it, once, if it is adapters that were trained, beside `base`."""
    if not isinstance(model, LoraModel):
        return
    adapters = fetch(params)

    def write() -> None:
        if not directory.exists():
            export_peft(directory, model, adapters, base=base)

    on_main("adapter", write)
