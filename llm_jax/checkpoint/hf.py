"""Hugging Face model directories: read straight onto the shards of a mesh, written back bit for bit.

    resolve(name) -> directory -> load_config -> describe -> load_hf -> parameters -> export_hf

A directory holds config.json, model.safetensors (or numbered parts and an index) and, optionally,
generation_config.json and the files of a tokenizer or of sentence-transformers' pooling. Each of our
parameters is filled shard by shard from the mapped files, so that beside the parameters only a block
of `_BLOCK` bytes of the files is in memory at a time.
"""

import dataclasses
import functools
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from huggingface_hub.errors import HFValidationError
from jax.sharding import Mesh

from llm_jax.checkpoint.new_directory import new_directory
from llm_jax.checkpoint.shards import Fill, from_shards, repeating
from llm_jax.checkpoint.tensor_file import TensorFile, write_tensors
from llm_jax.compress.quantize import Weight, round_by, rounded_weights, row_scales
from llm_jax.config import ModelConfig
from llm_jax.models.describe import Model, Params, complete_params
from llm_jax.models.families import (
    canonical_name,
    family,
    from_hf,
    has_prefix,
    sources,
    to_hf,
    uses_sentence_files,
)
from llm_jax.models.family_tables import Source
from llm_jax.models.heads import HEADS
from llm_jax.models.key_heads import own
from llm_jax.ops.quantized import QTensor, is_quantized
from llm_jax.tree import flatten, is_per_layer, unflatten

logger = logging.getLogger(__name__)

_BLOCK = 16 << 20  # bytes of a file that are in memory at a time
_HEADS = tuple(f"{name}/" for name in HEADS)
_HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "1_Pooling/*")
_FLOATS = ("float32", "bfloat16", "float16", "float64")
_POOLING_MODES = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "last": "lasttoken"}
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# generation_config.json keys that generation understands, and the neutral value of each that
# would change the text and is not in the list.
_GENERATION = (
    "bos_token_id eos_token_id pad_token_id do_sample temperature top_k top_p min_p "
    "repetition_penalty max_new_tokens max_length num_beams length_penalty early_stopping "
    "num_return_sequences min_new_tokens"
).split()
_GENERATION_NEUTRAL = {
    "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,),
    "eta_cutoff": (0.0,),
    "diversity_penalty": (0.0,),
    "num_beam_groups": (1,),
    "penalty_alpha": (0.0,),
    "no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1.0,),
    "encoder_no_repeat_ngram_size": (0,),
    "min_length": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
    "suppress_tokens": ([],),
    "begin_suppress_tokens": ([],),
    "bad_words_ids": ([],),
    "sequence_bias": ({},),
    "exponential_decay_length_penalty": (),
    "guidance_scale": (1.0,),
    "stop_strings": ([],),
}


class Tokenizer(Protocol):
    """What `export_hf` needs of a tokenizer."""

    def save(self, directory: Path) -> None: ...


def resolve(model: str | Path) -> Path:
    """The local directory of a model: itself, or a snapshot downloaded from the Hugging Face hub.

    Raises ValueError when `model` is neither a directory nor a hub id that can be had.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise ValueError(f"model={str(model)!r} is a file; expected a directory or a hub id")
    try:
        found = huggingface_hub.snapshot_download(str(model), allow_patterns=list(_HUB_FILES))
    except HFValidationError as error:
        raise ValueError(f"model={str(model)!r} is no directory here and no hub id: {error}") from error
    except OSError as error:  # hub errors and connection failures are all of this kind
        raise ValueError(
            f"model={str(model)!r} is no directory here, and the Hugging Face hub did not give it "
            f"({type(error).__name__}: {error}); check the name and the network (HF_ENDPOINT, "
            "HF_TOKEN for gated models), or download it elsewhere and name the directory"
        ) from error
    return Path(found)


def load_config(directory: str | Path) -> ModelConfig:
    """The `ModelConfig` of a Hugging Face directory; ValueError naming what is not supported."""
    directory = Path(directory)
    hf = _read_json(directory / "config.json")
    pooler = True
    if any(str(name).endswith("Model") for name in hf.get("architectures") or []):
        files = _tensor_files(directory)
        pooler = any(name.endswith("pooler.dense.weight") for f in files for name in f.names)
    try:
        return from_hf(hf, pooling=_sentence_pooling(directory), pooler=pooler)
    except ValueError as error:
        raise ValueError(f"{directory}: {error}") from error


def load_generation_config(directory: str | Path) -> dict[str, Any]:
    """Generation settings of a directory: those of generation_config.json that are set and understood.

    Keys as Hugging Face has them; eos_token_id is a list. Token ids that the file lacks come from
    config.json. Settings that would change the text and are not understood are named in a warning.
    """
    directory = Path(directory)
    config = _read_json(directory / "config.json")
    config = {**config, **(config.get("text_config") or {})}
    path = directory / "generation_config.json"
    given = _read_json(path) if path.exists() else {}
    ids = {key: config.get(key) for key in _TOKEN_IDS}
    merged = {**ids, **{key: value for key, value in given.items() if value is not None}}
    for key, neutral in _GENERATION_NEUTRAL.items():
        if given.get(key) is not None and given[key] not in neutral:
            logger.warning("%s: %s=%r is not supported and was not used", path, key, given[key])
    settings = {key: merged[key] for key in _GENERATION if merged.get(key) is not None}
    if isinstance(settings.get("eos_token_id"), int):
        settings["eos_token_id"] = [settings["eos_token_id"]]
    return settings


def load_hf(
    directory: str | Path, model: Model, mesh: Mesh, *, dtype: str | None = None, scheme: str = ""
) -> Params:
    """The parameters of a Hugging Face directory, each on its shards of `mesh`.

    model: as it is described or, to serve, `served` on the mesh; then key heads are repeated as they are
    read. dtype: of the parameters in memory; the model's parameter dtype when not given. scheme: of
    `compress.quantize.SCHEMES`, by which matrices are rounded as they are read; "" = none.
    Raises ValueError naming the file and the tensor for missing, unexpected or wrongly shaped
    tensors, damaged files, and tied tensors that differ.
    """
    checkpoint = _Checkpoint(Path(directory), model)
    if checkpoint.missing:
        raise ValueError(checkpoint.describe_missing(checkpoint.missing))
    weights = rounded_weights(model, mesh, scheme) if scheme else {}
    rest = [path for path in checkpoint.sources if path not in weights]
    read: dict[str, Any] = checkpoint.read(rest, mesh, dtype)
    read |= {path: checkpoint.read_rounded(path, weight, mesh) for path, weight in weights.items()}
    return unflatten({path: read[path] for path in checkpoint.sources})


def load_trunk(
    directory: str | Path,
    model: Model,
    mesh: Mesh,
    key: jax.Array,
    *,
    redraw: Sequence[str] = (),
    dtype: str | None = None,
) -> tuple[Params, list[str]]:
    """Like `load_hf`, but head parameters that the directory lacks are drawn at random.

    For fine-tuning: `model` has another head than the checkpoint. redraw: paths, or beginnings of them,
    of head parameters that are drawn even if they are there. Returns the parameters and the paths that
    were drawn.
    """
    checkpoint = _Checkpoint(Path(directory), model)
    if lost := {p: names for p, names in checkpoint.missing.items() if not p.startswith(_HEADS)}:
        raise ValueError(checkpoint.describe_missing(lost))
    fresh = [p for p in checkpoint.sources if p in checkpoint.missing or p.startswith(tuple(redraw))]
    found = checkpoint.read([p for p in checkpoint.sources if p not in fresh], mesh, dtype)
    return complete_params(found, model, mesh, key, dtype=dtype)


def export_hf(
    directory: str | Path,
    model: Model,
    params: Params,
    *,
    tokenizer: Tokenizer | None = None,
    generation_config: Mapping[str, Any] | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> Path:
    """Write a directory that `load_hf` and transformers read; the inverse of `load_hf`, bit for bit.

    The directory appears complete or not at all. Parameters are brought to the host one at a time;
    they must be addressable from this process. generation_config: as `load_generation_config` gives
    it; its token ids go to config.json too. max_shard_bytes: largest file (one tensor at least).
    Raises ValueError when the family cannot express the model, when parameters are quantized or have key
    heads repeated, or the directory holds something.
    """
    if own(model) is not model:
        raise ValueError(
            "params have key heads repeated for a mesh, which no directory holds: export those they "
            "come from"
        )
    if any(map(is_quantized, jax.tree.leaves(params, is_leaf=is_quantized))):
        raise ValueError("params are quantized, which no directory holds: export those they come from")
    generation = _one_id(generation_config or {})
    ids = {key: value for key, value in generation.items() if key in _TOKEN_IDS}
    config = {**to_hf(model.config), **ids}
    config["torch_dtype"] = str(jax.tree.leaves(params)[0].dtype)
    with new_directory(directory) as temporary:
        _write_json(temporary / "config.json", config)
        if generation_config is not None:
            _write_json(temporary / "generation_config.json", generation)
        if uses_sentence_files(model.config):
            _write_sentence_files(temporary, model.config)
        if tokenizer is not None:
            tokenizer.save(temporary)
        _write_parameters(temporary, model, flatten(params, is_leaf=is_per_layer), max_shard_bytes)
    return Path(directory)


# --- Reading -------------------------------------------------------------------------------------


class _Checkpoint:
    """The tensors of a directory, matched with the parameters of a model.

    held: the model that is read; model: the same with each key head once, as files have it. sources: our
    path -> `Source`; missing: our path -> names that the directory lacks.
    """

    def __init__(self, directory: Path, model: Model):
        self.directory, self.held = directory, model
        self.model = model = own(model)
        self.shapes = flatten(model.shapes)
        self.family = family(model.config.family)
        self.sources = sources(model.config, self.shapes)
        self.splits = _row_axes(model)
        self.tensors: dict[str, tuple[TensorFile, str]] = {}
        for file in _tensor_files(directory):
            for name in file.names:
                known, other = self.tensors.setdefault(canonical_name(self.family, name), (file, name))
                if (known, other) != (file, name):
                    raise ValueError(
                        f"{file.path}: tensor {name} and {other} of {known.path} are the same one; "
                        "expected one of them"
                    )
        self._settle_copies()
        self.missing = {}
        for path in self.sources:
            if absent := [name for name in self.names(path) if name not in self.tensors]:
                self.missing[path] = absent
        self._refuse_unexpected()

    def names(self, path: str) -> list[str]:
        """The tensors of a parameter, one for each layer, or expert of a layer, if it is stacked."""
        source = self.sources[path]
        places = np.ndindex(*self.shapes[path].shape[: source.stacked])
        return [source.tensor(place) for place in places]

    def layer_shape(self, path: str) -> tuple[int, ...]:
        """Our shape of what one tensor holds."""
        return self.shapes[path].shape[self.sources[path].stacked :]

    def describe_missing(self, missing: Mapping[str, Sequence[str]]) -> str:
        names = [name for names in missing.values() for name in names]
        paths = {file.path for file, _ in self.tensors.values()}
        place = paths.pop() if len(paths) == 1 else self.directory
        wanted = {path: tuple(self.shapes[path].shape) for path in missing}
        return (
            f"{place}: missing tensors {_few(names)}, expected for {_few(wanted.items())} of "
            f"family={self.model.config.family!r}, head={self.model.config.head!r}; the checkpoint "
            "is incomplete or its config.json is of another model (load_trunk draws a missing head)"
        )

    def read(self, paths: Sequence[str], mesh: Mesh, dtype: str | None) -> dict[str, jax.Array]:
        """Our parameters, each born on its shards."""
        shapes, shardings = flatten(self.held.shapes), flatten(self.held.shardings(mesh))
        for path in paths:
            self._check_shapes(path)

        def born(path: str) -> jax.Array:
            shape, kept = shapes[path].shape, jnp.dtype(dtype or shapes[path].dtype)
            fill = repeating(functools.partial(self._fill, path), self.shapes[path].shape, shape)
            return from_shards(shape, kept, shardings[path], fill)

        return {path: born(path) for path in paths}

    def _fill(self, path: str, shard: np.ndarray, index: tuple[slice, ...]) -> None:
        """Copy the part `index` of a parameter into `shard`, tensor by tensor."""
        source = self.sources[path]
        for place in np.ndindex(shard.shape[: source.stacked]):
            name = source.tensor([index[axis].start + at for axis, at in enumerate(place)])
            self._copy(name, path, index[source.stacked :], shard[place])

    def _copy(self, name: str, path: str, index: Sequence[slice], out: np.ndarray) -> None:
        """Copy `index` of one layer of a parameter into `out`, a block of rows at a time."""
        shape, split = self.layer_shape(path), self.splits[path]
        rows, columns = _span(shape[:split], index[:split]), _span(shape[split:], index[split:])
        out = out.reshape(rows.stop - rows.start, columns.stop - columns.start)
        for at, block in self._blocks(name, path, rows):
            out[at.start - rows.start : at.stop - rows.start] = block[:, columns]

    def _blocks(self, name: str, path: str, rows: slice) -> Iterator[tuple[slice, np.ndarray]]:
        """(rows, a view of them, all columns) of one layer of a parameter, of about `_BLOCK` bytes."""
        file, stored = self.tensors[name]
        matrix = _as_matrix(file.view(stored), self.sources[path])
        step = max(1, _BLOCK // max(1, matrix.shape[1] * matrix.itemsize))
        for start in range(rows.start, rows.stop, step):
            at = slice(start, min(start + step, rows.stop))
            yield at, matrix[at]
            file.release()

    def read_rounded(self, path: str, weight: Weight, mesh: Mesh) -> QTensor:
        """One of our matrices in int8, born on its shards; all of it is read first for its scales."""
        self._check_shapes(path)
        names, held = self.names(path), weight.abstract()
        once = dataclasses.replace(weight, out=self.layer_shape(path)[:-1]).abstract()
        scales = np.empty((len(names), once.scale.shape[-1]), np.float32)
        for row, name in zip(scales, names, strict=True):
            for at, block in self._blocks(name, path, slice(0, len(row))):
                row[at] = row_scales(block, np)
        if not np.isfinite(scales).all():
            raise ValueError(
                f"{self.directory}: {path} ({names[0]}) has weights that are not finite: they cannot be "
                "rounded; load it without a scheme to see where"
            )

        def fill(shard: np.ndarray, index: tuple[slice, ...]) -> None:
            *layers, columns, rows = (*index[:-2], *weight.in_order(*index[-2:]))
            which = range(len(names))[layers[0]] if layers else (0,)
            for part, i in zip(shard if layers else shard[None], which, strict=True):
                for at, block in self._blocks(names[i], path, rows):
                    by_row = part if weight.transposed else part.T
                    values = round_by(block[:, columns], scales[i, at], np)
                    by_row[at.start - rows.start : at.stop - rows.start] = values

        def fill_scale(shard: np.ndarray, index: tuple[slice, ...]) -> None:
            shard[...] = scales.reshape(once.scale.shape)[index]

        def born(part: str, fill: Fill) -> jax.Array:
            like, place = getattr(held, part), getattr(weight.shardings(mesh), part)
            fill = repeating(fill, getattr(once, part).shape, like.shape, math.prod(weight.out[1:]))
            return from_shards(like.shape, np.dtype(like.dtype), place, fill)

        return weight.like(born("q", fill), born("scale", fill_scale))

    def _check_shapes(self, path: str) -> None:
        expected = _stored_shape(self.layer_shape(path), self.splits[path], self.sources[path])
        for name in self.names(path):
            file, stored = self.tensors[name]
            got, dtype = file.shape(stored), file.dtype(stored)
            if got != expected:
                raise ValueError(
                    f"{file.path}: tensor {stored} has shape {got}, expected {expected} for {path}"
                )
            if dtype.name not in _FLOATS:
                raise ValueError(
                    f"{file.path}: tensor {stored} is {dtype.name}, expected one of {_FLOATS}; "
                    "quantized checkpoints are not read: use the original one"
                )

    def _settle_copies(self) -> None:
        """Drop tensors that repeat another, after comparing; rename them where that one is missing."""
        cfg = self.model.config
        if not cfg.tie_embeddings or cfg.head not in ("lm", "masked_lm"):
            return
        for copy, original in self.family.copies.items():
            if copy not in self.tensors:
                continue
            first = self.tensors.setdefault(original, self.tensors[copy])
            second = self.tensors.pop(copy)
            if first is not second and not _same(first, second):
                raise ValueError(
                    f"{second[0].path}: tensor {second[1]} differs from {first[1]} ({first[0].path}), "
                    "but config.json ties them; expected equal values, or tie_word_embeddings=false"
                )

    def _refuse_unexpected(self) -> None:
        """ValueError for tensors that nothing asks for; known buffers pass, unused heads are logged."""
        used = {name for path in self.sources for name in self.names(path)}
        heads = {source.name for head in self.family.heads.values() for source in head.values()}
        heads |= set(self.family.copies)
        unexpected, spare = [], []
        for name in self.tensors.keys() - used:
            if any(re.fullmatch(pattern, name) for pattern in self.family.buffers):
                continue
            is_spare = name in heads or name.startswith(self.family.spare or ("\0",))
            (spare if is_spare else unexpected).append(name)
        if spare:
            head = self.model.config.head
            logger.warning("%s: not used with head=%r: %s", self.directory, head, _few(sorted(spare)))
        if unexpected:
            file, stored = self.tensors[min(unexpected)]
            raise ValueError(
                f"{file.path}: unexpected tensors {_few(sorted(unexpected))} (first: {stored}, "
                f"{file.shape(stored)}) for family={self.model.config.family!r} with "
                f"{self.model.config.num_layers} layers; config.json describes another model"
            )


def _tensor_files(directory: Path) -> list[TensorFile]:
    """The opened files that hold the weights of a directory: one, or those of the index."""
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return [TensorFile(single)]
    if not index.exists():
        pickles = sorted(p.name for p in directory.glob("*.bin")) if directory.is_dir() else []
        advice = (
            f"{_few(pickles)} are pickles, which can run code and are not read; save the model again "
            "with transformers' save_pretrained (safetensors is its default)"
            if pickles
            else "expected a Hugging Face model directory"
        )
        raise ValueError(f"{directory}: no model.safetensors and no index of parts; {advice}")
    wanted = _read_json(index).get("weight_map")
    if not isinstance(wanted, dict):
        raise ValueError(f"{index}: no weight_map; expected {{tensor name: file name}}")
    files = {}
    for name in sorted(set(wanted.values())):
        if not (directory / name).exists():
            raise ValueError(f"{directory / name} is missing; {index.name} lists tensors in it")
        files[name] = TensorFile(directory / name)
    held = {name: set(file.names) for name, file in files.items()}
    if lost := [tensor for tensor, name in wanted.items() if tensor not in held[name]]:
        raise ValueError(
            f"{directory / wanted[lost[0]]}: lacks {_few(lost)}, which {index.name} promises"
        )
    return list(files.values())


def _as_matrix(stored: np.ndarray, source: Source) -> np.ndarray:
    """[out, in] view of a stored tensor (vectors as one column), only the source's part of it."""
    matrix = stored.reshape(-1, 1) if stored.ndim == 1 else stored
    matrix = matrix.T if source.transposed else matrix
    size = matrix.shape[0] // source.parts
    return matrix[source.part * size : (source.part + 1) * size]


def _span(shape: Sequence[int], index: Sequence[slice]) -> slice:
    """The range of flat positions that `index` takes of an array of `shape`."""
    flat = np.arange(math.prod(shape)).reshape(shape)[tuple(index)]
    start, stop = int(flat.min()), int(flat.max()) + 1
    if stop - start != flat.size:
        raise ValueError(
            f"a shard takes {[(s.start, s.stop) for s in index]} of axes {tuple(shape)}, which lie "
            "apart in a checkpoint; expected sharding rules that split the first of them only"
        )
    return slice(start, stop)


def _same(a: tuple[TensorFile, str], b: tuple[TensorFile, str]) -> bool:
    """Whether two stored tensors are equal, compared a block at a time."""
    x, y = (file.view(name) for file, name in (a, b))
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    x, y = x.reshape(-1).view(np.uint8), y.reshape(-1).view(np.uint8)
    for start in range(0, x.size, _BLOCK):
        if not np.array_equal(x[start : start + _BLOCK], y[start : start + _BLOCK]):
            return False
        for file, _ in (a, b):
            file.release()
    return True


# --- Writing -------------------------------------------------------------------------------------


def _write_parameters(
    directory: Path, model: Model, params: Mapping[str, Any], max_shard_bytes: int
) -> None:
    """model.safetensors, or numbered parts of at most `max_shard_bytes` with their index."""
    layout = _Layout(model, params)
    parts: list[dict[str, tuple[np.dtype, tuple[int, ...]]]] = [{}]
    room = max_shard_bytes
    for name, (dtype, shape) in layout.tensors.items():
        size = math.prod(shape) * dtype.itemsize
        if size > room and parts[-1]:
            parts.append({})
            room = max_shard_bytes
        parts[-1][name] = (dtype, shape)
        room -= size
    if len(parts) == 1:
        write_tensors(directory / "model.safetensors", parts[0], layout.value)
        return
    where = {}
    for number, part in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        write_tensors(directory / file, part, layout.value)
        where.update(dict.fromkeys(part, file))
    total = sum(math.prod(shape) * dtype.itemsize for dtype, shape in layout.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": where}
    _write_json(directory / "model.safetensors.index.json", index)


class _Layout:
    """The tensors that a checkpoint of these parameters holds: `tensors` {name: (dtype, shape)}."""

    def __init__(self, model: Model, params: Mapping[str, Any]):
        self.params, self.splits = params, _row_axes(model)
        shapes, prefix = flatten(model.shapes), family(model.config.family).prefix
        self.parts: dict[str, list[tuple[str, tuple[int, ...], Source]]] = defaultdict(list)
        self.tensors = {}
        for path, source in sources(model.config, shapes).items():
            shape, before = shapes[path].shape, prefix if has_prefix(model.config, path) else ""
            stored = _stored_shape(shape[source.stacked :], self.splits[path], source)
            dtype = np.dtype(jax.tree.leaves(params[path])[0].dtype)
            for place in np.ndindex(*shape[: source.stacked]):
                full = before + source.tensor(place)
                self.parts[full].append((path, place, source))
                self.tensors[full] = (dtype, stored)
        self.host = functools.lru_cache(maxsize=3)(self._host)  # q, k and v are written together

    def value(self, name: str) -> np.ndarray:
        """The tensor as a checkpoint stores it."""
        pieces = []
        for path, place, source in sorted(self.parts[name], key=lambda part: part[2].part):
            value = self.host(path)
            for index in place:
                value = np.asarray(value[index])
            split = self.splits[path]
            rows = math.prod(value.shape[:split])
            piece = value.reshape(-1) if split == value.ndim else value.reshape(rows, -1)
            pieces.append(piece.T if source.transposed else piece)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)

    def _host(self, path: str) -> Any:
        leaf = self.params[path]
        if is_per_layer(leaf):
            return leaf
        if not leaf.is_fully_addressable:
            raise ValueError(f"{path} has shards on other hosts; gather the parameters before export")
        return np.asarray(leaf)


def _row_axes(model: Model) -> dict[str, int]:
    """How many leading axes of each parameter (of layers and experts aside) a checkpoint has as rows.

    The axes that a product sums over are columns, as are those of a row that is looked up; a vector
    has rows only.
    """
    contract = flatten(model.contract, is_leaf=lambda leaf: isinstance(leaf, tuple))
    rows, shapes = {}, flatten(model.shapes)
    for path, source in sources(model.config, shapes).items():
        axes = len(shapes[path].shape) - source.stacked
        table = path.startswith("embed/") and axes == 2
        rows[path] = axes - (1 if table else len(contract[path]))
    return rows


def _stored_shape(shape: Sequence[int], split: int, source: Source) -> tuple[int, ...]:
    """Shape of the tensor that holds a parameter of `shape` (no layer axis) of `split` row axes."""
    rows = math.prod(shape[:split]) * source.parts
    if split == len(shape):
        return (rows,)
    columns = math.prod(shape[split:])
    return (columns, rows) if source.transposed else (rows, columns)


def _one_id(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with a list of one end-of-text id as that id, as Hugging Face writes it."""
    eos = generation_config.get("eos_token_id")
    if isinstance(eos, list) and len(eos) == 1:
        return {**generation_config, "eos_token_id": eos[0]}
    return dict(generation_config)


# --- Files beside the tensors --------------------------------------------------------------------


def _sentence_pooling(directory: Path) -> str | None:
    """The pooling of a sentence-transformers directory, None for any other."""
    path = directory / "1_Pooling" / "config.json"
    if not path.exists():
        return None
    modules = directory / "modules.json"
    for module in _read_json(modules) if modules.exists() else ():
        kind = module["type"].rpartition(".")[2]
        if kind == "Normalize":
            logger.warning("%s: vectors are returned as pooled, not scaled to length 1", modules)
        elif kind not in ("Transformer", "Pooling"):
            raise ValueError(f"{modules}: module {kind!r} is not supported; expected Pooling at most")
    settings = _read_json(path)
    on = {key.removeprefix("pooling_mode_") for key, value in settings.items() if value is True}
    on &= {key.removeprefix("pooling_mode_") for key in settings if key.startswith("pooling_mode_")}
    mode = settings.get("pooling_mode")  # how newer versions write it
    if isinstance(mode, str):
        on = {_POOLING_MODES.get(mode, mode)}
    for ours, theirs in _POOLING_MODES.items():
        if on == {theirs}:
            return ours
    raise ValueError(f"{path}: pooling {sorted(on)}; expected one of {list(_POOLING_MODES.values())}")


def _write_sentence_files(directory: Path, cfg: ModelConfig) -> None:
    """What sentence-transformers needs to make the same vectors."""
    modes = {f"pooling_mode_{m}": m == _POOLING_MODES[cfg.pooling] for m in _POOLING_MODES.values()}
    (directory / "1_Pooling").mkdir()
    settings = {"word_embedding_dimension": cfg.embed_dim, **modes}
    _write_json(directory / "1_Pooling" / "config.json", settings)
    kinds = (("", "Transformer"), ("1_Pooling", "Pooling"))
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(kinds)
    ]
    _write_json(directory / "modules.json", modules)
    limits = {"max_seq_length": cfg.max_positions, "do_lower_case": False}
    _write_json(directory / "sentence_bert_config.json", limits)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{path} is missing; expected a Hugging Face model directory") from error
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _few(items: Iterable[Any], most: int = 6) -> str:
    """The first few of some names, and how many more there are."""
    items = list(items)
    text = ", ".join(str(item) for item in items[:most])
    return text if len(items) <= most else f"{text} and {len(items) - most} more"
