"""LoRA adapters as the directory that the PEFT library reads: adapter_config.json and its tensors.

https://huggingface.co/docs/peft: tensors base_model.model.MODULE.lora_A.weight [R, C] and
.lora_B.weight [O, R] for a target, base_model.model.MODULE.weight for a module that is trained whole.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np

from llm_jax.checkpoint.tensor_file import write_tensors
from llm_jax.models import Params
from llm_jax.models.families import family, has_prefix, sources
from llm_jax.models.lora import LoraModel
from llm_jax.tree import flatten

_TASKS = {"lm": "CAUSAL_LM", "classifier": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}
_HEADS = ("classifier.", "score.")  # what PEFT saves whole for SEQ_CLS, whatever the config says


def export_peft(directory: str | Path, lora: LoraModel, adapters: Params, *, base: str = "") -> Path:
    """Write the adapters so that `peft.PeftModel.from_pretrained(base model, directory)` has them.

    base: name or directory of the Hugging Face model they belong to, for the reader's information. The
    directory appears complete or not at all; ValueError when it holds something, or when PEFT has no
    form for an adapter (GPT-2 keeps query, key and value in one matrix).
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists already and is not empty; remove it or name another")
    names = peft_modules(lora)
    config = _config(lora, names) | {"base_model_name_or_path": base}
    tensors = dict(_tensors(lora, jax.device_get(flatten(adapters)), names))
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    temporary.mkdir(parents=True)
    try:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        layout = {name: (value.dtype, value.shape) for name, value in tensors.items()}
        write_tensors(temporary / "adapter_model.safetensors", layout, tensors.__getitem__)
        os.replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary)
        raise
    return target


def peft_modules(lora: LoraModel) -> dict[str, tuple[str, str]]:
    """Our path -> (module with {layer} for its number, "weight" or "bias") in the Hugging Face model.

    ValueError when PEFT has no form for an adapter.
    """
    cfg = lora.model.config
    table = sources(cfg, flatten(lora.model.shapes))
    modules = {}
    for path in (*lora.targets, *lora.whole):
        source = table[path]
        if source.parts > 1:
            raise ValueError(
                f"{path}: {cfg.family} keeps {source.parts} weights in {source.name}, which has one "
                "adapter in PEFT; leave it out of lora.targets, or merge and export the whole model"
            )
        prefix = family(cfg.family).prefix if has_prefix(cfg, path) else ""
        module, _, kind = (prefix + source.name).rpartition(".")
        modules[path] = (module, kind)
    return modules


def _config(lora: LoraModel, modules: dict[str, tuple[str, str]]) -> dict[str, object]:
    cfg = lora.model.config
    table = sources(cfg, flatten(lora.model.shapes))
    head = {path for path, source in table.items() if source.name.startswith(_HEADS)}
    together = head <= set(lora.whole)  # a part of it can only be saved without naming the task
    whole = {path: modules[path][0] for path in lora.whole}
    if together:
        whole |= {path: modules[path][0].partition(".")[0] for path in head}
    return {
        "peft_type": "LORA",
        "task_type": _TASKS.get(cfg.head) if together else None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(table[path].transposed for path in lora.targets),
        "target_modules": _endings(modules[path][0] for path in lora.targets),
        "modules_to_save": _endings(whole.values()) or None,
        "inference_mode": True,
    }


def _endings(modules: Iterable[str]) -> list[str]:
    """What names a module in every layer: what follows the layer's number."""
    return sorted({module.rpartition("{layer}.")[2] for module in modules})


def _tensors(lora: LoraModel, flat: dict[str, np.ndarray], modules: dict[str, tuple[str, str]]):
    """(name, array) of every tensor, layer by layer."""
    for path in lora.targets:
        a, b = flat[f"{path}/a"], flat[f"{path}/b"]
        rank = b.shape[-1]
        for layer, one in _layers(path, len(b)):
            module = f"base_model.model.{modules[path][0].format(layer=layer)}"
            yield f"{module}.lora_A.weight", a[one].reshape(rank, -1)
            yield f"{module}.lora_B.weight", b[one].reshape(-1, rank)
    split = {path: len(names) for path, names in flatten(lora.contract, is_leaf=_is_names).items()}
    for path in lora.whole:
        module, kind = modules[path]
        for layer, one in _layers(path, len(flat[path])):
            value = flat[path][one]
            rows = math.prod(value.shape[: value.ndim - split[path]])
            value = value.reshape(rows, -1) if split[path] else value.reshape(-1)
            yield f"base_model.model.{module.format(layer=layer)}.{kind}", value


def _layers(path: str, size: int) -> list[tuple[int | None, object]]:
    """(number, index) of each layer of a stacked array; of another, one index for the whole."""
    return [(i, i) for i in range(size)] if path.startswith("layers/") else [(None, ...)]


def _is_names(leaf: object) -> bool:
    return isinstance(leaf, tuple)
