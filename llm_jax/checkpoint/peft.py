"""LoRA adapters as the directory of the PEFT library: adapter_config.json and its tensors.

https://huggingface.co/docs/peft: tensors base_model.model.MODULE.lora_A.weight [R, C] and
.lora_B.weight [O, R] for a target, base_model.model.MODULE.weight for a module that is trained whole.
"""

import json
import logging
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from llm_jax.checkpoint.new_directory import new_directory
from llm_jax.checkpoint.tensor_file import TensorFile, write_tensors
from llm_jax.models import Model, Params
from llm_jax.models.families import canonical_name, family, has_prefix, sources
from llm_jax.models.key_heads import own
from llm_jax.models.lora import LoraModel
from llm_jax.ops.linear import LowRank
from llm_jax.tree import flatten

logger = logging.getLogger(__name__)

_TASKS = {"lm": "CAUSAL_LM", "classifier": "SEQ_CLS", "embedding": "FEATURE_EXTRACTION"}
_HEADS = ("classifier.", "score.")  # what PEFT saves whole for SEQ_CLS, whatever the config says
# Keys of adapter_config.json that change the computation -> the values that mean ours.
_SUPPORTED: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "bias": ("none", None),
    "modules_to_save": (None, []),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others move the base
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "use_dora": (False, None),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "lora_bias": (False, None),
    "kasa_config": (None, {}),
    "velora_config": (None, {}),
    "monteclora_config": (None, {}),
    "arrow_config": (None, {}),
}
_READ = frozenset({"r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern"})
_HARMLESS = frozenset(
    """
    auto_mapping base_model_name_or_path corda_config ensure_weight_tying eva_config exclude_modules
    fan_in_fan_out inference_mode layers_pattern layers_to_transform loftq_config lora_dropout
    lora_ga_config megatron_config megatron_core peft_version qalora_group_size revision runtime_config
    target_modules task_type
    """.split()
)
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])\.weight")


def export_peft(directory: str | Path, lora: LoraModel, adapters: Params, *, base: str = "") -> Path:
    """Write the adapters so that `peft.PeftModel.from_pretrained(base model, directory)` has them.

    base: name or directory of the Hugging Face model they belong to, for the reader's information. The
    directory appears complete or not at all; ValueError when it holds something, or when PEFT has no
    form for an adapter (GPT-2 keeps query, key and value in one matrix).
    """
    names = peft_modules(lora)
    config = _config(lora, names) | {"base_model_name_or_path": base}
    tensors = dict(_tensors(lora, jax.device_get(flatten(adapters)), names))
    with new_directory(directory) as temporary:
        (temporary / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        layout = {name: (value.dtype, value.shape) for name, value in tensors.items()}
        write_tensors(temporary / "adapter_model.safetensors", layout, tensors.__getitem__)
    return Path(directory)


def load_peft(directory: str | Path, model: Model) -> dict[str, LowRank]:
    """{path: LowRank without its base} of an adapter that PEFT saved, float32: a [L, R, C], b [L, O, R].

    model: as it is described, or as it is `served`; b has each key head once for both.
    Scales are in b, so `scale` is 1; layers without an adapter have zeros, those of a smaller rank too.
    GPT-2's adapter of query, key and value in one matrix becomes three with the same a. ValueError with
    the file, and what in it is no low-rank change of weights of this model.
    """
    directory, model = Path(directory), own(model)
    config, file = _read_config(directory), _adapter_file(directory)
    reader = _Reader(config, file, model)
    pairs = dict(reader.pairs())
    if not pairs:
        raise ValueError(f"{file.path} holds no adapter; expected tensors NAME.lora_A.weight")
    paths = {path for path, _ in pairs}
    return {
        path: _stacked({layer: pairs[p, layer] for p, layer in pairs if p == path}, path, model)
        for path in flatten(model.shapes)
        if path in paths
    }


def _read_config(directory: Path) -> dict[str, Any]:
    """adapter_config.json, with nothing in it that we cannot do."""
    path = directory / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; expected a directory that PEFT saved") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    for key, allowed in _SUPPORTED.items():
        if key in config and config[key] not in allowed:
            raise ValueError(
                f"{path}: {key}={config[key]!r} is no low-rank change of weights alone; expected "
                f"{' or '.join(map(repr, allowed))}: merge the adapter with PEFT's merge_and_unload"
            )
    known = _READ | _HARMLESS | set(_SUPPORTED)
    if unknown := sorted(key for key in config if key not in known and config[key]):
        logger.warning(
            "%s: unknown keys %s were not used; check that they do not change the model",
            path,
            ", ".join(f"{key}={config[key]!r}" for key in unknown),
        )
    for key in ("r", "lora_alpha"):
        value = config.get(key, 8)
        if not isinstance(value, int | float) or value <= 0:
            raise ValueError(f"{path}: {key}={value!r}: expected a number above 0")
    return config


def _adapter_file(directory: Path) -> TensorFile:
    path = directory / "adapter_model.safetensors"
    if not path.exists():
        found = sorted(p.name for p in directory.glob("adapter_model*"))
        raise ValueError(
            f"{path} is missing{f', there is {found}' if found else ''}; pickles can run code and are "
            "not read: save the adapter again with PEFT's save_pretrained (safetensors is its default)"
        )
    return TensorFile(path)


class _Reader:
    """The tensors of an adapter, matched with the weights of a model."""

    def __init__(self, config: Mapping[str, Any], file: TensorFile, model: Model):
        self.config, self.file = config, file
        self.family = family(model.config.family)
        contract = flatten(model.contract, is_leaf=_is_names)
        self.shapes = {
            path: tuple(shape.shape[path.startswith("layers/") :])
            for path, shape in flatten(model.shapes).items()
            if contract[path]
        }
        self.layers = model.config.num_layers
        self.homes: dict[str, list[tuple[str, Any]]] = {}
        for path, source in sources(model.config, flatten(model.shapes)).items():
            if path in self.shapes:
                self.homes.setdefault(source.name.removesuffix(".weight"), []).append((path, source))

    def pairs(self):
        """((path, layer or None), (a [R, C], b [O, R] times the scale)) of each adapter, float32."""
        halves: dict[str, dict[str, str]] = {}
        for name in self.file.names:
            found = _TENSOR.fullmatch(name)
            if found is None:
                raise ValueError(
                    f"{self.file.path}: tensor {name} is no part of a low-rank change of a weight; "
                    "merge the adapter with PEFT's merge_and_unload"
                )
            halves.setdefault(found[1], {})[found[2]] = name
        for module, names in halves.items():
            if len(names) != 2:
                raise ValueError(
                    f"{self.file.path}: {module} has {[*names.values()]} alone, expected A and B"
                )
            a, b = (self.file.view(names[part]).astype(np.float32) for part in "AB")
            scale = self._scale(module, a, b)
            homes, layer = self._homes(module)
            for path, source in homes:
                part = b.reshape(source.parts, -1, b.shape[1])[source.part] if _splits(b, source) else b
                yield (path, layer), (a, self._fitting(module, path, a, scale * part))

    def _homes(self, module: str) -> tuple[list[tuple[str, Any]], int | None]:
        """Our parameters that a module holds, and the layer."""
        name = canonical_name(self.family, f"{module}.weight").removesuffix(".weight")
        for pattern, homes in self.homes.items():
            before, layered, after = pattern.partition("{layer}")
            found = re.fullmatch(
                re.escape(before) + (r"(\d+)" if layered else "") + re.escape(after), name
            )
            if found and (not layered or int(found[1]) < self.layers):
                return homes, int(found[1]) if layered else None
        raise ValueError(
            f"{self.file.path}: {module} is no weight of a product in this model of "
            f"{self.layers} layers ({self.family.architectures[0][1]}); it is of another model, "
            "or has to be merged (PEFT's merge_and_unload)"
        )

    def _scale(self, module: str, a: np.ndarray, b: np.ndarray) -> np.float32:
        rank = self._setting("r", "rank_pattern", module)
        if a.ndim != 2 or b.ndim != 2 or not a.shape[0] == b.shape[1] == rank:
            raise ValueError(
                f"{self.file.path}: {module} has lora_A {a.shape} and lora_B {b.shape}, expected rank "
                f"{rank} as adapter_config.json says: [rank, in] and [out, rank]"
            )
        alpha = self._setting("lora_alpha", "alpha_pattern", module)
        return np.float32(alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank))

    def _setting(self, key: str, patterns: str, module: str) -> Any:
        """A number for a module: of the first pattern that its name ends with, as PEFT has it."""
        for pattern, value in (self.config.get(patterns) or {}).items():
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        return self.config.get(key, 8)  # PEFT's default of both

    def _fitting(self, module: str, path: str, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """b [O, R] with the axes of O that the weight has."""
        *out, inner = self.shapes[path]
        if (a.shape[1], b.shape[0]) != (inner, math.prod(out)):
            raise ValueError(
                f"{self.file.path}: {module} has lora_A {a.shape} and lora_B {b.shape}, expected "
                f"[rank, {inner}] and [{math.prod(out)}, rank] for {path}; it is of another model"
            )
        return b.reshape(*out, -1)


def _splits(b: np.ndarray, source: Any) -> bool:
    return source.parts > 1 and b.shape[0] % source.parts == 0


def _stacked(
    layers: Mapping[int | None, tuple[np.ndarray, np.ndarray]], path: str, model: Model
) -> LowRank:
    """One change of the adapters by layer; zeros where there is none."""
    if None in layers:
        return LowRank(None, *layers[None], 1.0)
    rank = max(b.shape[-1] for _, b in layers.values())
    a, b = next(iter(layers.values()))
    count = model.config.num_layers
    all_a = np.zeros((count, rank, a.shape[-1]), np.float32)
    all_b = np.zeros((count, *b.shape[:-1], rank), np.float32)
    for layer, (a, b) in layers.items():
        all_a[layer, : len(a)], all_b[layer, ..., : len(a)] = a, b
    return LowRank(None, all_a, all_b, 1.0)


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
