"""A trained model to go on from: a Hugging Face directory or hub id, or the workdir of a run."""

import dataclasses
from pathlib import Path

from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_hf, resolve
from llm_jax.checkpoint.workdir import is_run, load_trained, trained_config, workdir_of
from llm_jax.config import ModelConfig
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.data.tokenizer_base import Tokenizer
from llm_jax.models import Model, Params, describe


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """What is there before training starts."""

    model: Model
    params: Params  # float32 master weights, sharded over the mesh
    tokenizer: Tokenizer


def load_pretrained(path: str, mesh: Mesh, *, field: str) -> Pretrained:
    """The causal language model in `path`, a directory or hub id; `field` is named in errors.

    Raises ValueError when it is not a causal language model.
    """
    if is_run(path):
        trained = load_trained(path, mesh, param_dtype="float32")
        found = Pretrained(trained.model, trained.params, load_tokenizer(trained.tokenizer))
    else:
        directory = resolve(path)
        model = describe(dataclasses.replace(load_config(directory), param_dtype="float32"))
        found = Pretrained(model, load_hf(directory, model, mesh), load_tokenizer(directory))
    config = found.model.config
    if config.head != "lm" or not config.causal:
        raise ValueError(
            f"{field}={path!r} is a {config.family!r} model with head={config.head!r}; expected a "
            "causal language model"
        )
    return found


@dataclasses.dataclass(frozen=True)
class Start:
    """A trained model that is given another head; `checkpoint.workdir.load_start` has its weights."""

    path: str  # as the settings name it
    config: ModelConfig  # of the model there; dtypes are those of who trains
    tokenizer: Path  # for `load_tokenizer`

    def check(self, field: str, tokens: int, tokenizer: Tokenizer) -> None:
        """ValueError when rows of `tokens` (the setting `field`) or the tokenizer do not fit it."""
        if tokens > self.config.max_positions:
            raise ValueError(
                f"{field}={tokens}: expected at most the {self.config.max_positions} positions of "
                f"{self.path}"
            )
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ValueError(
                f"the tokenizer in {self.tokenizer} has {tokenizer.vocab_size} tokens, the model in "
                f"{self.path} {self.config.vocab_size}; expected the tokenizer that the model was "
                "trained with"
            )


def find_start(path: str) -> Start:
    """What `path` holds: a workdir or one of its checkpoints, a Hugging Face directory or a hub id.

    Raises ValueError where there is no model of a kind that can be loaded.
    """
    if is_run(path):
        config, tokenizer = trained_config(path), workdir_of(path) / "tokenizer"
    else:
        tokenizer = resolve(path)
        config = load_config(tokenizer)
    dtypes = {"param_dtype": "", "compute_dtype": "", "cache_dtype": ""}
    return Start(path, dataclasses.replace(config, **dtypes), tokenizer)
