"""Hugging Face directories: read onto shards, written back bit for bit, damaged ones refused."""

import dataclasses
import json
import logging
import math
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import huggingface_hub
import jax
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from llm_jax.checkpoint.hf import (  # noqa: E402
    export_hf,
    load_config,
    load_generation_config,
    load_hf,
    load_trunk,
    resolve,
)
from llm_jax.checkpoint.tensor_file import TensorFile, write_tensors  # noqa: E402
from llm_jax.config import ModelConfig  # noqa: E402
from llm_jax.models import describe  # noqa: E402
from llm_jax.sharding import make_mesh  # noqa: E402
from llm_jax.tree import flatten, num_bytes, unstack  # noqa: E402
from tests import tiny  # noqa: E402

LLAMA = tiny.DECODERS["llama"]


def load(directory, mesh="data:1", **changes):
    """The model and the parameters of a directory, as numpy."""
    model = describe(dataclasses.replace(load_config(directory), **changes))
    params = load_hf(directory, model, make_mesh(mesh))
    return model, {path: np.asarray(leaf) for path, leaf in flatten(params).items()}


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(directory, edit, target=None):
    """Apply `edit` to the dict of tensors of a directory, through the reference library."""
    path = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(path))
    edit(tensors)
    safetensors.numpy.save_file(tensors, target or path, {"format": "pt"})


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path].dtype == theirs[path].dtype
        np.testing.assert_array_equal(ours[path], theirs[path], err_msg=path)


@pytest.fixture
def llama(tmp_path):
    """A saved tiny Llama: its directory."""
    LLAMA.save(tmp_path / "llama")
    return tmp_path / "llama"


# --- Round trip ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", tiny.ALL)
def test_import_export_import_is_bit_exact(name, tmp_path):
    """And transformers finds every tensor, equal to the bit, with the same config as before."""
    case, source, target = tiny.ALL[name], tmp_path / "a", tmp_path / "b"
    original = case.save(source)
    model = describe(load_config(source))
    params = load_hf(source, model, make_mesh("data:1"))
    export_hf(target, model, params, generation_config=load_generation_config(source))

    assert load_config(target) == load_config(source)
    again = load_hf(target, model, make_mesh("data:1"))
    assert_equal(flatten(jax.device_get(again)), flatten(jax.device_get(params)))

    cls = getattr(transformers, case.model)
    loaded, info = cls.from_pretrained(target, output_loading_info=True)
    # Not tied, BERT's head keeps a second bias that it never reads; we do not carry it.
    dead = {"cls.predictions.bias"} if name == "bert masked untied" else set()
    assert set(info["missing_keys"]) == dead and not info["unexpected_keys"]
    for key, value in original.state_dict().items():
        assert key in dead or torch.equal(value, loaded.state_dict()[key]), key
    ours, theirs = loaded.config.to_dict(), original.config.to_dict()
    for key in ("rope_parameters", "layer_types", "id2label", "eos_token_id", "pad_token_id"):
        assert ours.get(key) == theirs.get(key), key


def test_export_in_parts(llama, tmp_path):
    model, params = load(llama)
    live = load_hf(llama, model, make_mesh("data:1"))
    target = export_hf(tmp_path / "parts", model, live, max_shard_bytes=20_000)
    sizes = [p.stat().st_size for p in target.glob("model-*-of-*.safetensors")]
    assert len(sizes) > 2 and not (target / "model.safetensors").exists()
    index = json.loads((target / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == num_bytes(live)
    assert_equal(load(target)[1], params)
    original = transformers.AutoModelForCausalLM.from_pretrained(llama).state_dict()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(target).state_dict()
    assert all(torch.equal(original[key], loaded[key]) for key in original)


def test_export_of_layers_taken_apart(llama, tmp_path):
    """`tree.unstack` parameters (CPU generation) are written as the stacked ones are."""
    model, params = load(llama)
    live = load_hf(llama, model, make_mesh("data:1"))
    live["layers"] = unstack(live["layers"])
    assert_equal(load(export_hf(tmp_path / "out", model, live))[1], params)


def test_sentence_transformers_directory(tmp_path, caplog):
    """1_Pooling says how vectors are made, and survives the round trip."""
    source = tmp_path / "a"
    tiny.ENCODERS["bert"].save(source)
    (source / "1_Pooling").mkdir()
    pooling = {"word_embedding_dimension": 48, "pooling_mode_cls_token": False}
    pooling |= {"pooling_mode_mean_tokens": True, "pooling_mode_max_tokens": False}
    (source / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    kinds = ("Transformer", "Pooling", "Normalize")
    modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in kinds]
    (source / "modules.json").write_text(json.dumps(modules))
    with caplog.at_level(logging.WARNING):
        config = load_config(source)
    assert (config.head, config.pooling, config.pooler) == ("embedding", "mean", False)
    assert "not scaled to length 1" in caplog.text
    model = describe(config)
    params = load_hf(source, model, make_mesh("data:1"))  # the spare pooler tensors are passed over
    assert load_config(export_hf(tmp_path / "b", model, params)) == config

    modules.append({"type": "sentence_transformers.models.Dense"})
    (source / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match=r"modules\.json: module 'Dense' is not supported"):
        load_config(source)


def test_export_refuses_what_the_family_cannot_express(llama, tmp_path):
    model, _ = load(llama)
    params = load_hf(llama, model, make_mesh("data:1"))
    odd = describe(dataclasses.replace(model.config, attn_softcap=30.0))
    with pytest.raises(ValueError, match=r"'llama' model cannot have attn_softcap=30.0"):
        export_hf(tmp_path / "out", odd, params)
    plus = describe(dataclasses.replace(model.config, norm="layer"))
    with pytest.raises(ValueError, match="cannot have norm='layer'"):
        export_hf(tmp_path / "out", plus, params)


def test_export_appears_complete_or_not_at_all(llama, tmp_path):
    class Failing:
        def save(self, directory):
            raise RuntimeError("disk full")

    model, _ = load(llama)
    params = load_hf(llama, model, make_mesh("data:1"))
    out = tmp_path / "exports" / "out"
    with pytest.raises(RuntimeError, match="disk full"):
        export_hf(out, model, params, tokenizer=Failing())
    assert not list(out.parent.iterdir())
    export_hf(out, model, params)
    with pytest.raises(ValueError, match="exists already and is not empty"):
        export_hf(out, model, params)


# --- Reading -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mesh", ["fsdp:2,tensor:2", "tensor:8", "data:2,fsdp:3", "stage:3,fsdp:2"])
@pytest.mark.parametrize("name", ["gpt2 untied", "llama tied, biases, head_dim", "bert masked"])
def test_shards_hold_their_slices(name, mesh, tmp_path):
    """Whatever the mesh, each shard is the right part of the whole."""
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    tiny.ALL[name].save(tmp_path)
    model, whole = load(tmp_path)
    for path, leaf in flatten(load_hf(tmp_path, model, make_mesh(mesh))).items():
        for shard in leaf.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), whole[path][shard.index])


def test_only_the_shard_is_read(llama, monkeypatch):
    """A shard's buffer has the size of the shard, and holds one copy for all its replicas."""
    if jax.device_count() < 8:
        pytest.skip("needs XLA_FLAGS=--xla_force_host_platform_device_count=8")
    from llm_jax.checkpoint import shards

    filled = []
    aligned = shards.aligned

    def count(shape, dtype):
        filled.append(math.prod(shape) * dtype.itemsize)
        return aligned(shape, dtype)

    monkeypatch.setattr(shards, "aligned", count)
    model = describe(load_config(llama))
    params = load_hf(llama, model, make_mesh("data:2,tensor:2,fsdp:2"))
    assert sum(filled) == num_bytes(params)


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wanted", ["float32", "bfloat16"])
def test_dtypes(stored, wanted, tmp_path):
    model = LLAMA.build().to(stored)
    model.save_pretrained(tmp_path)
    params = load_hf(tmp_path, describe(load_config(tmp_path)), make_mesh("data:1"), dtype=wanted)
    value = params["layers"]["mlp"]["up"]
    expected = model.model.layers[1].mlp.up_proj.weight.to(getattr(torch, wanted)).float().detach()
    assert value.dtype == wanted
    np.testing.assert_array_equal(np.asarray(value[1]).astype(np.float32), expected.numpy())


def test_checkpoint_in_parts(tmp_path):
    LLAMA.save(tmp_path / "one")
    LLAMA.save(tmp_path / "parts", max_shard_size="20KB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 2
    assert_equal(load(tmp_path / "parts")[1], load(tmp_path / "one")[1])


def test_names_of_other_checkpoints(tmp_path):
    """Without the model prefix, with buffers, a tied copy, or the endings of the first BERTs."""
    for name, prefix in (("gpt2", "transformer."), ("bert masked", "bert.")):
        directory = tmp_path / name
        tiny.ALL[name].save(directory)
        _, want = load(directory)

        def edit(tensors, prefix=prefix, name=name):
            for key in list(tensors):
                new = key.removeprefix(prefix)
                if name == "bert masked":
                    new = new.replace("LayerNorm.weight", "LayerNorm.gamma")
                    new = new.replace("LayerNorm.bias", "LayerNorm.beta")
                tensors[new] = tensors.pop(key)
            if name == "gpt2":
                tensors["h.0.attn.bias"] = np.tril(np.ones((1, 1, 8, 8), np.uint8))
                tensors["h.0.attn.masked_bias"] = np.float32(-1e4).reshape(1)
                tensors["lm_head.weight"] = tensors["wte.weight"].copy()
            else:
                tensors["embeddings.position_ids"] = np.arange(64)[None]
                tensors["bert.pooler.dense.bias"] = np.zeros(48, np.float32)
                tensors["cls.seq_relationship.bias"] = np.zeros(2, np.float32)

        edit_tensors(directory, edit)
        assert_equal(load(directory)[1], want)


def test_trunk_with_a_new_head(tmp_path, caplog):
    """A masked-language-model checkpoint under a classifier: only the head is drawn."""
    tiny.MASKED["roberta masked"].save(tmp_path)
    config = load_config(tmp_path)
    config = dataclasses.replace(
        config, head="classifier", pooler=True, num_classes=3, labels=("a", "b", "c")
    )
    model, mesh = describe(config), make_mesh("data:1")
    with pytest.raises(ValueError, match=r"missing tensors .*classifier\.out_proj\.weight"):
        load_hf(tmp_path, model, mesh)
    with caplog.at_level(logging.WARNING):
        params, fresh = load_trunk(tmp_path, model, mesh, jax.random.key(0))
    assert set(fresh) == {"pooler/weight", "pooler/bias", "classifier/weight", "classifier/bias"}
    assert "lm_head" in caplog.text
    assert jax.tree.structure(params) == jax.tree.structure(model.shapes)
    assert np.asarray(params["classifier"]["weight"]).std() > 0
    _, trunk = load(tmp_path)
    np.testing.assert_array_equal(params["layers"]["attn"]["wq"], trunk["layers/attn/wq"])


def test_trunk_must_be_complete(llama):
    edit_tensors(llama, lambda t: t.pop("model.norm.weight"))
    model = describe(load_config(llama))
    with pytest.raises(ValueError, match=r"missing tensors norm\.weight"):
        load_trunk(llama, model, make_mesh("data:1"), jax.random.key(0))


@pytest.mark.slow
def test_peak_memory_of_a_load(tmp_path):
    """Peak resident memory beyond 500 MB of parameters stays below a quarter of them."""
    if not Path("/proc/self/status").exists():
        pytest.skip("reads the peak from /proc")
    gpt2 = {"family": "gpt2", "vocab_size": 50257, "num_layers": 12, "embed_dim": 768, "num_heads": 12}
    gpt2 |= {"num_kv_heads": 12, "head_dim": 64, "mlp_dim": 3072, "max_positions": 1024}
    gpt2 |= {"positions": "learned", "norm": "layer", "norm_eps": 1e-5, "activation": "gelu_tanh"}
    gpt2 |= {"gated_mlp": False, "qkv_bias": True, "out_bias": True, "mlp_bias": True}
    model = describe(ModelConfig(**gpt2, tie_embeddings=True, param_dtype="float32"))
    params = jax.tree.map(lambda s: jax.numpy.ones(s.shape, s.dtype), model.shapes)
    size = num_bytes(params)
    export_hf(tmp_path / "gpt2", model, params)
    program = """
        import sys
        from pathlib import Path
        from llm_jax.checkpoint.hf import load_config, load_hf
        from llm_jax.models import describe
        from llm_jax.sharding import make_mesh

        def kilobytes(key):
            lines = Path("/proc/self/status").read_text().splitlines()
            return next(int(line.split()[1]) for line in lines if line.startswith(key))

        model, mesh = describe(load_config(sys.argv[1])), make_mesh("data:1")
        before = kilobytes("VmRSS")
        params = load_hf(sys.argv[1], model, mesh)
        print(1024 * (kilobytes("VmHWM") - before))
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "gpt2")]
    peak = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(f"parameters {size / 1e6:.0f} MB, peak {peak / 1e6:.0f} MB, beyond {peak / size - 1:.1%}")
    assert peak <= 1.25 * size


# --- Refusals ------------------------------------------------------------------------------------


def _missing(directory):
    edit_tensors(directory, lambda t: t.pop("model.layers.1.mlp.up_proj.weight"))


def _unexpected(directory):
    edit_tensors(directory, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": np.ones(48)}))


def _twice(directory):
    edit_tensors(directory, lambda t: t.update({"norm.weight": np.ones(48, np.float32)}))


def _wrong_shape(directory):
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": np.ones(47, np.float32)}))


def _integers(directory):
    edit_tensors(directory, lambda t: t.update({"model.norm.weight": np.ones(48, np.int8)}))


def _truncated(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _truncated_header(directory):
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])


def _corrupted_header(directory):
    path = directory / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[8:12] = b"\xff\xfe{{"
    path.write_bytes(data)


def _shifted(directory):
    path = directory / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"][0] += 4
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])


def _pointer(directory):
    (directory / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def _pickle(directory):
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")


def _part_gone(directory):
    (directory / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def _no_config(directory):
    (directory / "config.json").unlink()


def _broken_config(directory):
    (directory / "config.json").write_text("{")


DAMAGES = [
    (
        _missing,
        r"model\.safetensors: missing tensors layers\.1\.mlp\.up_proj\.weight, .*layers/mlp/up",
    ),
    (_unexpected, r"model\.safetensors: unexpected tensors .*q_proj\.bias"),
    (
        _wrong_shape,
        r"model\.safetensors: tensor model\.norm\.weight has shape \(47,\), expected \(48,\)",
    ),
    (_integers, r"tensor model\.norm\.weight is int8, expected one of"),
    (_truncated, r"model\.safetensors: truncated: \d+ bytes, but its tensors need \d+"),
    (_truncated_header, r"model\.safetensors: truncated: 100 bytes, but its header alone"),
    (_corrupted_header, r"model\.safetensors: the header is corrupted"),
    (_shifted, r"header is corrupted: tensor model\.norm\.weight F32\[48\] lies at bytes"),
    (_pointer, r"model\.safetensors: header length .* Git LFS pointer"),
    (_pickle, r"no model\.safetensors .*pytorch_model\.bin are pickles.*save the model again"),
    (_part_gone, r"model-00001-of-00002\.safetensors is missing"),
    (_no_config, r"config\.json is missing"),
    (_broken_config, r"config\.json is not valid JSON"),
]


@pytest.mark.parametrize("damage, message", DAMAGES, ids=lambda x: getattr(x, "__name__", ""))
def test_damaged_directories_are_refused(damage, message, llama):
    damage(llama)
    with pytest.raises(ValueError, match=message):
        load(llama)


def test_tied_tensors_must_agree(tmp_path):
    tiny.DECODERS["qwen2"].save(tmp_path)
    edit_tensors(tmp_path, lambda t: t.update({"lm_head.weight": np.ones((97, 48), np.float32)}))
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        load(tmp_path)


# --- Files beside the tensors --------------------------------------------------------------------


def test_generation_config(llama, caplog):
    assert load_generation_config(llama)["eos_token_id"] == [2]
    settings = {"eos_token_id": [2, 5], "temperature": 0.6, "top_p": 0.9, "no_repeat_ngram_size": 3}
    (llama / "generation_config.json").write_text(json.dumps(settings | {"typical_p": 1.0}))
    with caplog.at_level(logging.WARNING):
        got = load_generation_config(llama)
    assert got == {
        "bos_token_id": 1,
        "eos_token_id": [2, 5],
        "pad_token_id": 0,
        "temperature": 0.6,
        "top_p": 0.9,
    }
    assert "no_repeat_ngram_size=3 is not supported" in caplog.text and "typical_p" not in caplog.text


def test_generation_config_and_tokenizer_are_exported(llama, tmp_path):
    class Tokenizer:
        def save(self, directory):
            (directory / "tokenizer.json").write_text("{}")

    model, _ = load(llama)
    params = load_hf(llama, model, make_mesh("data:1"))
    settings = {"eos_token_id": [2, 5], "do_sample": True, "temperature": 0.6, "max_new_tokens": 9}
    out = export_hf(tmp_path / "out", model, params, tokenizer=Tokenizer(), generation_config=settings)
    loaded = transformers.GenerationConfig.from_pretrained(out)
    assert {key: getattr(loaded, key) for key in settings} == settings
    assert (out / "tokenizer.json").exists()
    assert load_generation_config(out) == settings


def test_resolve(tmp_path, monkeypatch):
    assert resolve(tmp_path) == tmp_path
    file = tmp_path / "x.safetensors"
    file.touch()
    with pytest.raises(ValueError, match="is a file; expected a directory or a hub id"):
        resolve(file)
    with pytest.raises(ValueError, match="no directory here and no hub id"):
        resolve("not/a/directory/at all")
    for error in (LocalEntryNotFoundError("offline"), OfflineModeIsEnabled("offline")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
        with pytest.raises(ValueError, match="'org/name' is no directory here, and .* hub did not"):
            resolve("org/name")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(tmp_path / name))
    assert resolve("org/name") == tmp_path / "org/name"


# --- The file format, against the reference library ----------------------------------------------


@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "float64", "int64", "uint8", "bool"]
)
def test_tensor_file_agrees_with_the_reference_library(dtype, tmp_path):
    dtype = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    rng = np.random.default_rng(0)
    tensors = {"b": rng.integers(0, 2, (3, 5)), "a.x": rng.integers(0, 2, 7), "空": np.zeros((0, 4))}
    tensors = {name: value.astype(dtype) for name, value in tensors.items()}
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    write_tensors(ours, {n: (v.dtype, v.shape) for n, v in tensors.items()}, tensors.__getitem__)
    safetensors.numpy.save_file(tensors, theirs)
    file, library = TensorFile(theirs), safetensors.numpy.load_file(ours)
    assert sorted(file.names) == sorted(library) == sorted(tensors)
    for name, value in tensors.items():
        np.testing.assert_array_equal(file.view(name), value)
        np.testing.assert_array_equal(library[name], value)
        file.release()
        np.testing.assert_array_equal(file.view(name), value)  # pages come back


def test_copy_of_a_directory_is_independent(llama, tmp_path):
    """Loaded parameters do not depend on the file any more."""
    copy = tmp_path / "copy"
    shutil.copytree(llama, copy)
    model = describe(load_config(copy))
    params = load_hf(copy, model, make_mesh("data:1"))
    (copy / "model.safetensors").write_bytes(b"")
    assert_equal(
        {path: np.asarray(leaf) for path, leaf in flatten(params).items()},
        load(llama)[1],
    )
