"""A checkpoint here against the same checkpoint in transformers, in float32.

Texts run one by one in transformers and together, padded, here. Compared are hidden states and what the
model is for: vocabulary logits and greedy tokens, class logits, or sentence vectors. The caller hands in
the modules `torch` and `transformers`, which llm_jax itself does without.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import ModelConfig
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.infer.llm import LLM
from llm_jax.models import Model, Params, describe
from llm_jax.ops.attention import FullContext
from llm_jax.ops.sampling import SamplingParams
from llm_jax.sharding import data_shards

TOLERANCE = 2e-4  # of the largest absolute value
GREEDY_TOKENS = 32
PROMPTS = (
    "The quick brown fox jumps over the lazy dog, and then it looks for something to eat.",
    "我是一个热爱编程的程序员。今天天气很好,",
    "def main():\n    return 2 +",
    "Once",
)
AUTO_CLASSES = {
    "lm": "AutoModelForCausalLM",
    "masked_lm": "AutoModelForMaskedLM",
    "classifier": "AutoModelForSequenceClassification",
    "embedding": "AutoModel",
}
Outputs = dict[str, list[np.ndarray]]  # name -> one array a text


@dataclasses.dataclass(frozen=True)
class Comparison:
    """One line of the result: the largest error, absolute and relative to the largest value."""

    quantity: str
    max_abs_error: float
    scale: float
    relative_error: float
    ok: bool


def compare_checkpoint(
    directory: Path, prompts: Sequence[str], mesh: Mesh, *, torch: ModuleType, transformers: ModuleType
) -> Iterator[Comparison]:
    """Load the checkpoint on both sides and compare, one quantity at a time.

    prompts: texts; none takes a few of our own, or random ids where the checkpoint has no tokenizer.
    Raises ValueError or OSError saying why there is nothing to compare.
    """
    dtypes = dict.fromkeys(("param_dtype", "compute_dtype", "cache_dtype"), "float32")
    config = dataclasses.replace(load_config(directory), **dtypes)
    texts = token_ids(directory, prompts, config)
    model = describe(config)
    params = load_hf(directory, model, mesh)
    theirs = getattr(transformers, AUTO_CLASSES[config.head]).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    want = _reference(torch, theirs.eval(), texts, config)
    for side in ("right", "left"):
        got = our_outputs(model, params, mesh, texts, side)
        for name in want:
            yield _compare(f"{name}, padded {side}", got[name], want[name])
    if config.head == "lm":
        yield _compare_greedy(torch, theirs, model, params, mesh, texts)


def token_ids(directory: Path, prompts: Sequence[str], config: ModelConfig) -> list[list[int]]:
    """The prompts as ids, or random ids of several lengths when there is no tokenizer or prompt."""
    room = config.max_positions - (GREEDY_TOKENS if config.head == "lm" else 0)
    if room < 1:
        room = config.max_positions // 2
    try:
        tokenizer = load_tokenizer(directory)
    except FileNotFoundError:
        if prompts:
            raise
        rng = np.random.default_rng(0)
        # transformers takes the padding id for padding wherever it stands: leave out the first ids.
        first = 3 if config.vocab_size > 30 else 0
        return [rng.integers(first, config.vocab_size, min(n, room)).tolist() for n in (37, 20, 5, 1)]
    encoded = [tokenizer.encode(prompt)[:room] for prompt in prompts or PROMPTS]
    return [ids for ids in encoded if ids]


def _reference(torch: ModuleType, model: Any, texts: list[list[int]], config: ModelConfig) -> Outputs:
    """What transformers computes, one text at a time."""
    found: Outputs = {}
    for text in texts:
        with torch.no_grad():
            out = model(torch.tensor([text]), output_hidden_states=True)
        values = {"hidden states": out.hidden_states[-1][0].numpy()}
        if config.head == "classifier":
            values["class logits"] = out.logits[0].numpy()
        elif config.head == "embedding":
            values["sentence vectors"] = _pooled(out, values["hidden states"], config)
        else:
            values["logits"] = out.logits[0].numpy()
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return found


def _pooled(out: Any, hidden: np.ndarray, config: ModelConfig) -> np.ndarray:
    if config.pooler:
        return out.pooler_output[0].numpy()
    ways = {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(axis=0), "max": hidden.max(axis=0)}
    return ways[config.pooling]


def our_outputs(model: Model, params: Params, mesh: Mesh, texts: list[list[int]], side: str) -> Outputs:
    """What llm_jax computes, all texts in one batch padded on `side`."""
    size, count = max(map(len, texts)), -(-len(texts) // data_shards(mesh)) * data_shards(mesh)
    tokens, positions, mask = np.zeros((3, count, size), np.int32)
    for row, text in enumerate(texts):
        start = size - len(text) if side == "left" else 0
        span = slice(start, start + len(text))
        tokens[row, span], positions[row, span], mask[row, span] = text, np.arange(len(text)), 1
    head = model.config.head

    @jax.jit
    def forward(params):
        net = model.bind(params)
        hidden, context = net(tokens, positions, FullContext(mask))
        if head == "classifier":
            return {"hidden states": hidden, "class logits": net.classify(hidden, mask, context)}
        if head == "embedding":
            return {"hidden states": hidden, "sentence vectors": net.sentence(hidden, mask)}
        return {"hidden states": hidden, "logits": net.unembed(hidden)}

    with jax.set_mesh(mesh):
        out = jax.device_get(forward(params))
    rows = range(len(texts))
    return {k: [v[i][mask[i] > 0] if v.ndim == 3 else v[i] for i in rows] for k, v in out.items()}


def _compare(quantity: str, got: list[np.ndarray], want: list[np.ndarray]) -> Comparison:
    """The largest error of some arrays."""
    error = max(float(np.abs(g - w).max()) for g, w in zip(got, want, strict=True))
    scale = max(float(np.abs(w).max()) for w in want)
    relative = error / max(scale, 1e-30)
    return Comparison(quantity, error, scale, relative, bool(relative <= TOLERANCE))


def _compare_greedy(
    torch: ModuleType, theirs: Any, model: Model, params: Params, mesh: Mesh, texts: list[list[int]]
) -> Comparison:
    """Share of texts whose greedy continuation differs somewhere."""
    steps = min(GREEDY_TOKENS, model.config.max_positions - max(map(len, texts)))
    theirs.generation_config = type(theirs.generation_config)(do_sample=False, max_new_tokens=steps)
    with torch.no_grad():
        want = [theirs.generate(torch.tensor([t]))[0, len(t) :].tolist() for t in texts]
    llm = LLM.from_params(model, params, None, mesh=mesh)
    outputs = llm.generate(texts, SamplingParams(max_new_tokens=steps, temperature=0.0))
    wrong = sum(o.token_ids != w for o, w in zip(outputs, want, strict=True))
    quantity = f"{steps} greedy tokens of {len(texts)} texts"
    return Comparison(quantity, float(wrong), 0.0, wrong / len(texts), not wrong)
