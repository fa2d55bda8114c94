"""Other runtimes with the weights of a transformers model: CTranslate2, and llama.cpp by its Python
binding. Both are optional: `pip install ctranslate2`, `pip install llama-cpp-python gguf`.

Each gets a directory of its own format, is loaded from it and removes it.
"""

import ctypes
import logging
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import tokenizers

from llm_jax.bench.peers import Generate

RUNTIMES = ("ctranslate2", "ctranslate2_int8", "llama_cpp")


def load(
    name: str, transformers: ModuleType, peer: Any, *, rows: int, length: int, threads: int
) -> Generate:
    """How a runtime of `RUNTIMES` generates greedily, by `peer`'s weights, on so many threads.

    rows, length: prompts at most, and tokens of each with its answer. In float32, keys and values too;
    ctranslate2_int8 has its matrices in int8. Raises ImportError where it is not installed, RuntimeError
    where it does not run, ValueError for a model that we cannot write for it.
    """
    with tempfile.TemporaryDirectory() as directory:
        if name == "llama_cpp":
            return _llama_cpp(Path(directory, "model.gguf"), peer, rows, length, threads)
        dtype = "int8" if name == "ctranslate2_int8" else "float32"
        return _ctranslate2(directory, transformers, peer, dtype, threads)


def _ctranslate2(
    directory: str, transformers: ModuleType, peer: Any, dtype: str, threads: int
) -> Generate:
    import ctranslate2  # pyright: ignore[reportMissingImports]

    peer.save_pretrained(f"{directory}/original")
    _number_tokenizer(transformers, peer.config.vocab_size).save_pretrained(f"{directory}/original")
    converter = ctranslate2.converters.TransformersConverter(f"{directory}/original")
    converter.convert(f"{directory}/converted", quantization=dtype)
    model = ctranslate2.Generator(f"{directory}/converted", compute_type=dtype, intra_threads=threads)

    def generate(ids: np.ndarray, new_tokens: int) -> np.ndarray:
        found = model.generate_batch(
            [[str(i) for i in row] for row in ids.tolist()],
            min_length=new_tokens,
            max_length=new_tokens,
            include_prompt_in_result=False,  # else the prompt is read a token at a time
        )
        return np.array([each.sequences_ids[0] for each in found])

    return generate


def _number_tokenizer(transformers: ModuleType, vocab_size: int) -> Any:
    """One whose tokens are the numbers, as CTranslate2 takes tokens by name."""
    words = tokenizers.models.WordLevel({str(i): i for i in range(vocab_size)}, unk_token="0")
    special = {"unk_token": "0", "bos_token": "1", "eos_token": "2"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer(words), **special)


def write_gguf(path: Path, peer: Any) -> None:
    """A Llama of transformers in float32 in llama.cpp's format, without a tokenizer.

    Raises ValueError for another family, or for rotary positions that are scaled.
    """
    import gguf  # pyright: ignore[reportMissingImports]

    config = peer.config
    rope = getattr(config, "rope_parameters", {})
    if config.model_type != "llama" or rope["rope_type"] != "default":
        raise ValueError(
            f"model_type={config.model_type!r}: llama_cpp gets a Llama with plain rotary positions "
            "alone; use --shape=llama160m"
        )
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(rope["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, value in peer.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        array = value.numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            array = _pairs_adjacent(array, heads if "q_proj" in name else kv_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _pairs_adjacent(weight: np.ndarray, heads: int) -> np.ndarray:
    """[N H, D] with the two numbers that rotary positions turn side by side, not half a head apart."""
    split = weight.reshape(heads, 2, -1, weight.shape[-1])
    return np.ascontiguousarray(split.swapaxes(1, 2)).reshape(weight.shape)


def _llama_cpp(path: Path, peer: Any, rows: int, length: int, threads: int) -> Generate:
    """By llama.cpp's C interface: the binding's own class has one sequence at a time."""
    import llama_cpp  # pyright: ignore[reportMissingImports]

    logging.getLogger("llama-cpp-python").setLevel(logging.CRITICAL)  # it tells of all it does
    write_gguf(path, peer)
    llama_cpp.llama_backend_init()
    defaults = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(str(path).encode(), defaults)
    if not model:
        raise RuntimeError(f"llama.cpp does not read {path}")
    params = llama_cpp.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.n_batch = rows * length, rows, rows * length
    params.n_threads = params.n_threads_batch = threads
    params.type_k = params.type_v = llama_cpp.GGML_TYPE_F32
    params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to float16
    context = llama_cpp.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError(f"llama.cpp makes no context of {rows} rows of {length} tokens")
    batch, vocab = llama_cpp.llama_batch_init(rows * length, 0, 1), peer.config.vocab_size

    def newest(ids: np.ndarray, start: int) -> np.ndarray:
        """Read tokens [B, T] from position `start` on; the likeliest next ones [B]."""
        _fill(batch, ids, start)
        if code := llama_cpp.llama_decode(context, batch):
            raise RuntimeError(f"llama_decode returned {code}")
        last = np.arange(1, len(ids) + 1) * ids.shape[1] - 1
        logits = [llama_cpp.llama_get_logits_ith(context, int(i)) for i in last]
        return np.array([np.ctypeslib.as_array(row, (vocab,)).argmax() for row in logits])

    def generate(ids: np.ndarray, new_tokens: int) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), False)
        found = [newest(ids, 0)]
        for i in range(new_tokens - 1):
            found.append(newest(found[-1][:, None], ids.shape[1] + i))
        return np.stack(found, axis=1)

    return generate


def _fill(batch: Any, ids: np.ndarray, start: int) -> None:
    """Tokens [B, T] of sequences 0 to B - 1, with logits for the last of each."""
    rows, length = ids.shape
    count = batch.n_tokens = rows * length
    view = lambda pointer: np.ctypeslib.as_array(pointer, (count,))  # noqa: E731
    view(batch.token)[:] = ids.ravel()
    view(batch.pos)[:] = np.tile(np.arange(start, start + length), rows)
    view(batch.n_seq_id)[:] = 1
    view(batch.logits)[:] = np.tile(np.arange(length) == length - 1, rows)
    for i in range(count):
        batch.seq_id[i][0] = ctypes.c_int32(i // length)
