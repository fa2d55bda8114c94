"""Hugging Face configurations and tensor names <-> ours: the rules that read family_tables.

`from_hf` turns the content of a config.json into a `ModelConfig`, `to_hf` is its inverse, `sources`
says where a checkpoint keeps each of our parameters. Keys that change the computation in a way we do
not have are refused by name; keys that we do not know are named in a warning.
"""

import dataclasses
import logging
import math
from collections.abc import Iterable, Mapping
from typing import Any

from llm_jax.config import ModelConfig, from_dict, nearest, to_dict
from llm_jax.models.family_tables import (
    ACTIVATIONS,
    FAMILIES,
    HARMLESS,
    SUPPORTED,
    Family,
    Source,
)

logger = logging.getLogger(__name__)

_ROPE_KEYS = frozenset({"rope_theta", "rope_scaling", "rope_parameters", "rope_type"})
# rope_scaling key -> RopeScaling field, by rope_type
_ROPE_FIELDS = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_position_embeddings": "original_max_positions",
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "attention_factor": "attention_factor",
        "original_max_position_embeddings": "original_max_positions",
    },
}
_ROPE_READ = frozenset({"type", "rope_type", "rope_theta", "mscale", "mscale_all_dim", "finetuned"})
_ROPE_SUPPORTED = {"partial_rotary_factor": (1, None), "truncate": (True, None)}


def family(model_type: str) -> Family:
    """The tables of a model_type; ValueError with the nearest name when there is none."""
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        hint = nearest(model_type, FAMILIES).partition("; known")[0]
        raise ValueError(
            f"model_type={model_type!r} is not a model family of llm_jax{hint}; known: {known}"
        )
    return FAMILIES[model_type]


def from_hf(hf: Mapping[str, Any], *, pooling: str | None = None, pooler: bool = True) -> ModelConfig:
    """The `ModelConfig` of a config.json.

    pooling: how sentence vectors are made ("cls" | "mean" | "max" | "last"), when files beside
        config.json say so; the model then has an embedding head, whatever its architecture.
    pooler: whether the checkpoint of a headless encoder holds BERT's pooler.
    Raises ValueError naming the key, its value and what is supported.
    """
    hf = _text_part(hf)
    model_type = hf.get("model_type")
    if not isinstance(model_type, str):
        raise ValueError("config.json has no model_type; expected one of " + ", ".join(FAMILIES))
    fam = family(model_type)
    hf = {**hf, **{key: hf[other] for other, key in fam.aliases.items() if other in hf}}
    values = {**fam.defaults, **hf}
    _check_keys(fam, hf, values)
    rope = _rope(fam, values)
    values.update(rope)
    fields: dict[str, Any] = {"family": model_type, **fam.fixed}
    fields.update({field: values.get(key) for field, key in fam.keys.items()})
    fields.update(_derived(fam, fields, values))
    if fields.get("positions") == "rope":
        fields["rope_scaling"] = values["rope_scaling"]
    fields["windows"] = _windows(values, fields["num_layers"])
    fields.update(_head(fam, hf, fields, pooling, pooler))
    return from_dict(ModelConfig, fields, "config.json")


def to_hf(cfg: ModelConfig) -> dict[str, Any]:
    """The config.json that transformers reads, with architectures; inverse of `from_hf`.

    Rotary settings are written as rope_theta and rope_scaling, which every version reads. Token ids
    are null, except RoBERTa's padding, which its positions depend on.
    Raises ValueError naming the fields that the family cannot express.
    """
    fam = family(cfg.family)
    hf: dict[str, Any] = {"model_type": cfg.family, "architectures": [_architecture(fam, cfg)]}
    hf.update({"bos_token_id": None, "eos_token_id": None, "pad_token_id": None})
    hf.update({key: getattr(cfg, field) for field, key in fam.keys.items()})
    hf[fam.keys["activation"]] = _hf_activation(fam, cfg.activation)
    if "pad_token_id" in fam.defaults:
        hf["pad_token_id"] = cfg.position_offset - 1
        hf["max_position_embeddings"] = cfg.max_positions + cfg.position_offset
    if "query_pre_attn_scalar" in hf:
        scale = cfg.attn_scale
        hf["query_pre_attn_scalar"] = cfg.head_dim if scale is None else round(scale**-2)
    if cfg.positions == "rope":
        hf["rope_scaling"] = _hf_rope_scaling(cfg)
    hf.update(_hf_windows(fam, cfg))
    if cfg.head == "classifier":
        labels = cfg.labels or _default_labels(cfg.num_classes)
        hf["id2label"] = {str(i): name for i, name in enumerate(labels)}
        hf["label2id"] = {name: i for i, name in enumerate(labels)}
    hf["torch_dtype"] = cfg.param_dtype or "float32"
    _check_expressible(cfg, hf)
    return hf


def sources(cfg: ModelConfig, paths: Iterable[str]) -> dict[str, Source]:
    """Our parameter path -> where a checkpoint of the config's family keeps it (prefix left out).

    Raises ValueError naming the parameters that the family's checkpoints have no place for.
    """
    fam = family(cfg.family)
    table = {**fam.trunk, **_head_table(fam, cfg)}
    if homeless := [path for path in paths if path not in table]:
        raise ValueError(
            f"family={cfg.family!r} with head={cfg.head!r} has no tensors for {', '.join(homeless)}; "
            "change the config so that the model fits the family"
        )
    return {path: table[path] for path in paths}


def has_prefix(cfg: ModelConfig, path: str) -> bool:
    """Whether export writes the family's prefix before the tensor of this parameter."""
    fam = family(cfg.family)
    return cfg.head != "embedding" and path not in _head_table(fam, cfg)


def canonical_name(fam: Family, name: str) -> str:
    """A checkpoint's tensor name as the tables have it: no prefix, today's endings."""
    for prefix in (*fam.other_prefixes, fam.prefix):
        if name.startswith(prefix):
            name = name[len(prefix) :]
            break
    for old, new in fam.renames.items():
        if name.endswith(old):
            name = name[: -len(old)] + new
    return name


def uses_sentence_files(cfg: ModelConfig) -> bool:
    """Whether the pooling has to be written beside config.json (sentence-transformers' layout)."""
    return cfg.head == "embedding" and not cfg.pooler


def _head_table(fam: Family, cfg: ModelConfig) -> dict[str, Source]:
    untied = {} if cfg.tie_embeddings else fam.heads.get(f"untied {cfg.head}", {})
    return {**fam.heads.get(cfg.head, {}), **untied}


def _text_part(hf: Mapping[str, Any]) -> Mapping[str, Any]:
    """The language model's config of Gemma 3's multimodal checkpoints; others as they are."""
    if hf.get("model_type") != "gemma3":
        return hf
    text = dict(hf.get("text_config") or {})
    logger.warning("config.json describes a multimodal Gemma 3: only its text part is used")
    return {**text, "model_type": "gemma3_text", "architectures": hf.get("architectures")}


def _check_keys(fam: Family, hf: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Refuse unsupported values of known keys, warn of keys nobody here has heard of."""
    supported = {**SUPPORTED, **fam.supported}
    for key, allowed in supported.items():
        if key in values and values[key] not in allowed:
            raise ValueError(
                f"config.json: {key}={values[key]!r} is not supported for model_type="
                f"{hf['model_type']!r}; expected {' or '.join(repr(a) for a in allowed)}"
            )
    known = HARMLESS | fam.harmless | set(fam.defaults) | set(fam.keys.values()) | set(supported)
    known |= _ROPE_KEYS | set(fam.aliases) | {"original_max_position_embeddings"}
    if unknown := sorted(set(hf) - known):
        logger.warning(
            "config.json: unknown keys %s were not used; check that they do not change the model",
            ", ".join(f"{key}={hf[key]!r}" for key in unknown),
        )


def _derived(fam: Family, fields: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields that are computed from others, or named differently."""
    derived: dict[str, Any] = {}
    activation, width, heads = fields["activation"], fields["embed_dim"], fields["num_heads"]
    if activation not in ACTIVATIONS:
        raise ValueError(
            f"config.json: {fam.keys['activation']}={activation!r} is not supported"
            f"{nearest(str(activation), ACTIVATIONS)}"
        )
    derived["activation"] = ACTIVATIONS[activation]
    derived["num_kv_heads"] = fields.get("num_kv_heads") or heads
    derived["head_dim"] = fields.get("head_dim") or _divide(width, heads)
    derived["mlp_dim"] = fields["mlp_dim"] or 4 * width
    if fields.get("attn_scale") is not None:
        scalar = fields["attn_scale"]
        derived["attn_scale"] = None if scalar == derived["head_dim"] else scalar**-0.5
    if "pad_token_id" in fam.defaults:  # RoBERTa counts positions from the one after padding's
        derived["position_offset"] = values["pad_token_id"] + 1
        derived["max_positions"] = fields["max_positions"] - derived["position_offset"]
    return derived


def _divide(width: int, heads: int) -> int:
    if width % heads:
        raise ValueError(
            f"config.json: hidden size {width} is not a multiple of {heads} attention heads, "
            "and no head_dim is given"
        )
    return width // heads


def _head(
    fam: Family, hf: Mapping[str, Any], fields: Mapping[str, Any], pooling: str | None, pooler: bool
) -> dict[str, Any]:
    """Head, pooling, pooler and labels, from the architecture and the files beside config.json."""
    if pooling is not None:
        return {"head": "embedding", "pooling": pooling}
    names = hf.get("architectures") or [fam.architectures[0][1]]
    heads = {name: head for head, name in fam.architectures}
    if names[0] not in heads:
        raise ValueError(
            f"config.json: architectures={names!r} is not supported for model_type="
            f"{hf['model_type']!r}; expected one of {', '.join(heads)}"
        )
    head = heads[names[0]]
    encoder = not fields.get("causal", True)
    if head == "embedding":
        return {"head": head, "pooler": encoder and pooler}
    if head == "masked_lm" and "lm_head.dense.weight" in {s.name for s in fam.heads[head].values()}:
        if fields["activation"] != "gelu":
            raise ValueError(
                f"config.json: hidden_act={hf.get('hidden_act')!r} with {names[0]}, whose head "
                "always uses gelu, is not supported; expected 'gelu'"
            )
    if head != "classifier":
        return {"head": head}
    if hf.get("problem_type") not in (None, "single_label_classification"):
        raise ValueError(
            f"config.json: problem_type={hf['problem_type']!r} is not supported; expected "
            "'single_label_classification' (one class for each text)"
        )
    labels = _labels(hf)
    return {"head": head, "pooler": encoder, "num_classes": len(labels), "labels": labels}


def _labels(hf: Mapping[str, Any]) -> tuple[str, ...]:
    """Class names in order of their ids; two unnamed classes when nothing is said, as in HF."""
    names = {int(key): str(name) for key, name in (hf.get("id2label") or {}).items()}
    if not names:
        return _default_labels(hf.get("num_labels") or 2)
    if sorted(names) != list(range(len(names))):
        raise ValueError(f"config.json: id2label has ids {sorted(names)}; expected 0, 1, 2, ...")
    return tuple(names[i] for i in range(len(names)))


def _default_labels(count: int) -> tuple[str, ...]:
    return tuple(f"LABEL_{i}" for i in range(count))


def _windows(values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Sliding window of each layer: layer_types, or the rule of the family when they are not listed."""
    if "sliding_window" not in values:
        return ()
    window = values["sliding_window"] or 0
    if not values.get("use_sliding_window", True):
        window = 0
    types = values.get("layer_types")
    if types is None:
        windowed = [window > 0 and slides for slides in _pattern(values, layers)]
        types = ["sliding_attention" if w else "full_attention" for w in windowed]
    if len(types) != layers or set(types) - {"sliding_attention", "full_attention"}:
        raise ValueError(
            f"config.json: layer_types={types!r}: expected {layers} entries, each "
            "'full_attention' or 'sliding_attention'"
        )
    if "sliding_attention" in types and not window:
        raise ValueError(
            "config.json: layer_types has sliding_attention, but sliding_window="
            f"{values['sliding_window']!r}, use_sliding_window={values.get('use_sliding_window')!r}; "
            "expected a window of one token or more"
        )
    windows = tuple(window if kind == "sliding_attention" else 0 for kind in types)
    return windows if any(windows) else ()


def _pattern(values: Mapping[str, Any], layers: int) -> list[bool]:
    """Which layers are windowed: all but every n-th, those from a depth on, or all."""
    if every := values.get("sliding_window_pattern"):
        return [(i + 1) % every != 0 for i in range(layers)]
    return [i >= values.get("max_window_layers", 0) for i in range(layers)]


def _rope(fam: Family, values: Mapping[str, Any]) -> dict[str, Any]:
    """rope_theta, rope_local_base_freq and rope_scaling (ours), from either way to write them.

    transformers 4 has rope_theta and rope_scaling; 5 has rope_parameters, one dict, or one for each
    kind of layer.
    """
    if "rope_theta" not in fam.defaults:
        return {}
    given = dict(values.get("rope_parameters") or {})
    old = dict(values.get("rope_scaling") or {})
    result: dict[str, Any] = {"rope_theta": values["rope_theta"]}
    if "rope_local_base_freq" in fam.defaults:
        local = dict(given.get("sliding_attention") or {})
        _check_rope_keys(local)
        if _rope_type(local) != "default":
            raise ValueError(
                f"config.json: rope_parameters.sliding_attention has rope_type={_rope_type(local)!r}; "
                "expected 'default' (windowed layers are not stretched)"
            )
        local_theta = local.get("rope_theta", values["rope_local_base_freq"])
        result["rope_local_base_freq"] = local_theta
        given = dict(given.get("full_attention") or {})
    elif any(isinstance(v, Mapping) for v in given.values()):
        raise ValueError(
            f"config.json: rope_parameters differ by layer ({', '.join(given)}), which "
            f"model_type={values['model_type']!r} does not have; expected one set of parameters"
        )
    rope = {**given, **old}
    if rope.get("rope_theta") is not None:
        result["rope_theta"] = rope["rope_theta"]
    result["rope_scaling"] = _rope_scaling(rope, values)
    return result


def _rope_type(rope: Mapping[str, Any]) -> str:
    return rope.get("rope_type", rope.get("type")) or "default"


def _check_rope_keys(rope: Mapping[str, Any]) -> None:
    known = set().union(*_ROPE_FIELDS.values()) | _ROPE_READ | set(_ROPE_SUPPORTED)
    if unknown := sorted(set(rope) - known):
        raise ValueError(
            f"config.json: rope setting {unknown[0]!r}={rope[unknown[0]]!r} is not supported"
            f"{nearest(unknown[0], known)}"
        )
    for key, allowed in _ROPE_SUPPORTED.items():
        if rope.get(key) not in (*allowed, None):
            raise ValueError(f"config.json: rope setting {key}={rope[key]!r}; expected {allowed[0]!r}")


def _rope_scaling(rope: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any] | None:
    """The fields of `RopeScaling`, or None for plain rotary embedding."""
    kind = _rope_type(rope)
    _check_rope_keys(rope)
    if kind == "default":
        return None
    if kind not in _ROPE_FIELDS:
        raise ValueError(
            f"config.json: rope_type={kind!r} is not supported; expected one of default, "
            f"{', '.join(_ROPE_FIELDS)}"
        )
    original = values.get("original_max_position_embeddings") or rope.get(
        "original_max_position_embeddings", values["max_position_embeddings"]
    )
    rope = {**rope, "original_max_position_embeddings": original}
    if kind == "yarn":
        rope["factor"] = rope.get("factor") or values["max_position_embeddings"] / original
        rope["attention_factor"] = _yarn_attention_factor(rope)
    if rope.get("factor") is None:
        raise ValueError(f"config.json: rope_type={kind!r} without a factor; expected a number")
    fields = {ours: rope[key] for key, ours in _ROPE_FIELDS[kind].items() if rope.get(key) is not None}
    return {"kind": kind, **fields}


def _yarn_attention_factor(rope: Mapping[str, Any]) -> float:
    """The factor on cos and sin as YaRN's config states or implies it; 0 = the paper's formula."""
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope["factor"] <= 1:
        return 1.0
    if not (rope.get("mscale") and rope.get("mscale_all_dim")):
        return 0.0
    log = 0.1 * math.log(rope["factor"])
    return (log * rope["mscale"] + 1.0) / (log * rope["mscale_all_dim"] + 1.0)


def _architecture(fam: Family, cfg: ModelConfig) -> str:
    for head, name in fam.architectures:
        if head == cfg.head:
            return name
    known = sorted({head for head, _ in fam.architectures})
    raise ValueError(
        f"head={cfg.head!r} does not exist in family={cfg.family!r}; expected one of {known}"
    )


def _hf_activation(fam: Family, ours: str) -> str:
    """The family's own name of an activation where it has several."""
    default = fam.defaults[fam.keys["activation"]]
    if ACTIVATIONS[default] == ours:
        return default
    return next(name for name, value in ACTIVATIONS.items() if value == ours)


def _hf_rope_scaling(cfg: ModelConfig) -> dict[str, Any] | None:
    scaling = cfg.rope_scaling
    if scaling is None:
        return None
    fields = {key: getattr(scaling, ours) for key, ours in _ROPE_FIELDS[scaling.kind].items()}
    if not fields.get("attention_factor", True):
        del fields["attention_factor"]
    return {"rope_type": scaling.kind, **fields}


def _hf_windows(fam: Family, cfg: ModelConfig) -> dict[str, Any]:
    if "sliding_window" not in fam.defaults:
        return {}
    windows = cfg.layer_windows
    used = any(windows)
    unused = fam.defaults["sliding_window"] if "sliding_window_pattern" in fam.defaults else None
    hf: dict[str, Any] = {"sliding_window": max(windows) if used else unused}
    if "use_sliding_window" in fam.defaults:
        hf["use_sliding_window"] = used
        hf["max_window_layers"] = next((i for i, w in enumerate(windows) if w), cfg.num_layers)
    if "layer_types" in fam.defaults:
        hf["layer_types"] = ["sliding_attention" if w else "full_attention" for w in windows]
    return hf


def _check_expressible(cfg: ModelConfig, hf: Mapping[str, Any]) -> None:
    """ValueError when reading `hf` back does not give `cfg`: the family lacks something of it."""
    pooling = cfg.pooling if uses_sentence_files(cfg) else None
    back, wanted = to_dict(_comparable(from_hf(hf, pooling=pooling))), to_dict(_comparable(cfg))
    if lost := [name for name in wanted if wanted[name] != back[name]]:
        fields = ", ".join(f"{name}={wanted[name]!r} (there: {back[name]!r})" for name in lost)
        raise ValueError(f"a Hugging Face {cfg.family!r} model cannot have {fields}")


def _comparable(cfg: ModelConfig) -> ModelConfig:
    """One of several configs that mean the same model; how it is trained and stored is no part of it."""
    plain: dict[str, Any] = {"dropout": 0.0, "remat": "none", "microbatches": 0, "attention": "auto"}
    plain |= {"param_dtype": "", "compute_dtype": "", "cache_dtype": ""}
    if cfg.attn_scale == cfg.head_dim**-0.5:
        plain["attn_scale"] = None
    if not any(cfg.layer_windows):
        plain["windows"] = ()
    if cfg.head == "classifier":
        plain["labels"] = cfg.labels or _default_labels(cfg.num_classes)
    if cfg.head in ("lm", "masked_lm"):  # no pooled vector is made
        plain["pooling"] = "last"
    return dataclasses.replace(cfg, **plain)
