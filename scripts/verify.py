"""Compare a checkpoint in llm_jax with the same checkpoint in transformers, in float32.

    python scripts/verify.py --model=DIR
    python scripts/verify.py --model=DIR --prompt="我喜欢编程。" --prompt="Hello" --mesh=data:1,tensor:2

Texts run one by one in transformers and together, padded, in llm_jax. Compared are hidden states and
what the model is for: vocabulary logits and 32 greedy tokens, class logits, or sentence vectors.
Needs torch and transformers (pip install "llm_jax[test]"). Exits with 1 when an error exceeds 2e-4 of
the largest value or a token differs, with 2 when the comparison cannot be made.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator

import jax
import numpy as np
from absl import app, flags, logging

from llm_jax.checkpoint.hf import load_config, load_hf, resolve
from llm_jax.config import ModelConfig
from llm_jax.data.tokenizer import load_tokenizer
from llm_jax.infer.llm import LLM
from llm_jax.models import Model, Params, describe
from llm_jax.ops.attention import FullContext
from llm_jax.ops.sampling import SamplingParams
from llm_jax.sharding import data_shards, make_mesh

_MODEL = flags.DEFINE_string("model", None, "Hugging Face directory or hub id.", required=True)
_PROMPT = flags.DEFINE_multi_string("prompt", [], "A text; may be repeated. Default: a few of our own.")
_MESH = flags.DEFINE_string("mesh", "", "Mesh axes, e.g. data:2,tensor:4 (one may be -1).")
_JSON = flags.DEFINE_bool("json", False, "One JSON object a comparison on stdout, nothing else.")

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


def token_ids(directory, prompts: list[str], config: ModelConfig) -> list[list[int]]:
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


def reference(torch, model, texts: list[list[int]], config: ModelConfig) -> Outputs:
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


def _pooled(out, hidden: np.ndarray, config: ModelConfig) -> np.ndarray:
    if config.pooler:
        return out.pooler_output[0].numpy()
    return {"cls": hidden[0], "last": hidden[-1], "mean": hidden.mean(axis=0)}[config.pooling]


def ours(model: Model, params: Params, mesh, texts: list[list[int]], side: str) -> Outputs:
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


def compare(quantity: str, got: list[np.ndarray], want: list[np.ndarray]) -> Comparison:
    """The largest error of some arrays."""
    error = max(float(np.abs(g - w).max()) for g, w in zip(got, want, strict=True))
    scale = max(float(np.abs(w).max()) for w in want)
    relative = error / max(scale, 1e-30)
    return Comparison(quantity, error, scale, relative, bool(relative <= TOLERANCE))


def compare_greedy(torch, theirs, model, params, mesh, texts: list[list[int]]) -> Comparison:
    """Share of texts whose greedy continuation differs somewhere."""
    steps = min(GREEDY_TOKENS, model.config.max_positions - max(map(len, texts)))
    theirs.generation_config = type(theirs.generation_config)(do_sample=False, max_new_tokens=steps)
    with torch.no_grad():
        want = [theirs.generate(torch.tensor([t]))[0, len(t) :].tolist() for t in texts]
    llm = LLM.from_params(model, params, None, mesh=mesh)
    outputs = llm.generate(texts, SamplingParams(max_new_tokens=steps, temperature=0.0))
    wrong = sum(o.token_ids != w for o, w in zip(outputs, want, strict=True))
    share = wrong / len(texts)
    return Comparison(
        f"{steps} greedy tokens of {len(texts)} texts", float(wrong), 0.0, share, not wrong
    )


def comparisons(torch, transformers) -> Iterator[Comparison]:
    """Load both and compare, one quantity at a time."""
    directory, mesh = resolve(_MODEL.value), make_mesh(_MESH.value)
    dtypes = dict.fromkeys(("param_dtype", "compute_dtype", "cache_dtype"), "float32")
    config = dataclasses.replace(load_config(directory), **dtypes)
    texts = token_ids(directory, _PROMPT.value, config)
    model = describe(config)
    params = load_hf(directory, model, mesh)
    theirs = getattr(transformers, AUTO_CLASSES[config.head]).from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    )
    want = reference(torch, theirs.eval(), texts, config)
    for side in ("right", "left"):
        got = ours(model, params, mesh, texts, side)
        for name in want:
            yield compare(f"{name}, padded {side}", got[name], want[name])
    if config.head == "lm":
        yield compare_greedy(torch, theirs, model, params, mesh, texts)


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected argument {argv[1]!r}; texts are given as --prompt=TEXT")
    logging.set_verbosity(logging.WARNING)
    try:
        import torch
        import transformers
    except ImportError as error:
        print(f'verify.py: {error}; pip install "llm_jax[test]" (torch, transformers)', file=sys.stderr)
        sys.exit(2)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    failed = False
    try:
        for result in comparisons(torch, transformers):
            failed |= not result.ok
            if _JSON.value:
                print(json.dumps(dataclasses.asdict(result)), flush=True)
            else:
                verdict = "ok" if result.ok else "DIFFERS"
                print(
                    f"{result.quantity:40} max error {result.max_abs_error:.2e}  "
                    f"relative {result.relative_error:.2e}  {verdict}",
                    flush=True,
                )
    except (ValueError, OSError) as error:
        print(f"verify.py: {error}", file=sys.stderr)
        sys.exit(2)
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    app.run(main)
