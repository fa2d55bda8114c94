"""Training of draft heads: the loss against transformers and NumPy, what trains, what comes of it."""

import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llm_jax
from llm_jax.checkpoint.draft_head import load_draft_head
from llm_jax.checkpoint.hf import load_config, load_hf
from llm_jax.config import DraftHeadConfig, ModelConfig, OptimConfig
from llm_jax.data.packing import pack
from llm_jax.models import describe
from llm_jax.models.draft_head import describe_draft_head, init_draft_head
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train import draft_head
from llm_jax.train.draft_head import Drafting, draft_head_loss
from llm_jax.train.metrics_log import read_metrics
from llm_jax.train.optim import make_optimizer
from llm_jax.train.pretrained import load_pretrained
from llm_jax.train.state import start_state
from llm_jax.train.step import make_train_step
from llm_jax.tree import flatten
from tests import draft_cell, tiny

DEMO = Path(llm_jax.__file__).parent / "assets" / "demo_lm"
RNG = np.random.default_rng(0)
DOCUMENTS = [RNG.integers(3, tiny.VOCAB, n).tolist() for n in (9, 5, 2, 1, 7)]
BATCH = pack(DOCUMENTS, 12)
STEPS, DECAY, BASE_WEIGHT = 3, 0.7, 0.4
LOSS = functools.partial(draft_head_loss, steps=STEPS, decay=DECAY, base_weight=BASE_WEIGHT)


def tiny_config():
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 24}
    return ModelConfig("llama", vocab_size=tiny.VOCAB + 1, embed_dim=16, max_positions=32, **sizes)


@pytest.fixture(scope="module", params=["llama", "gpt2", "gemma2"])
def pair(request, tmp_path_factory):
    """(transformers model in float64, both networks of ours, the model's parameters)."""
    directory = tmp_path_factory.mktemp("base")
    theirs = tiny.DECODERS[request.param].save(directory).double()
    base = describe(load_config(directory))
    both = Drafting(describe_draft_head(base.config, 20), base)
    return theirs, both, load_hf(directory, base, make_mesh(""))


def reference(theirs, head, params):
    """[K] losses, agreements and targets over all documents, one token after the other."""
    loss, agreed, count = np.zeros((3, STEPS))
    scale = head.config.embed_dim**0.5 if head.config.embed_scale else 1.0
    for document in DOCUMENTS:
        with torch.no_grad():
            out = theirs(torch.tensor([document]), output_hidden_states=True)
        hidden, model = out.hidden_states[-1][0].numpy(), out.logits[0].numpy()
        for start in range(len(document)):
            state = hidden[start]
            for k in range(1, STEPS + 1):
                place = start + k
                if place + 1 >= len(document):
                    break
                token = theirs.get_input_embeddings().weight[document[place]].detach().numpy() * scale
                state = draft_cell.cell(head.config, params, state, token)
                q, p = log_softmax(unembed(theirs, state)), log_softmax(model[place])
                divergence = np.sum(np.exp(p) * (p - q))
                text = -q[document[place + 1]]
                loss[k - 1] += (1 - BASE_WEIGHT) * text + BASE_WEIGHT * divergence
                agreed[k - 1] += np.argmax(q) == np.argmax(p)
                count[k - 1] += 1
    return loss, agreed, count


def unembed(theirs, state):
    logits = theirs.lm_head.weight.detach().numpy() @ state
    cap = getattr(theirs.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * np.tanh(logits / cap)


def log_softmax(x):
    return x - x.max() - np.log(np.sum(np.exp(x - x.max())))


@pytest.mark.parametrize("chunk", [0, 5])
def test_the_loss_is_that_of_transformers_and_numpy(pair, chunk):
    theirs, both, base = pair
    params = draft_cell.drawn(both.head)
    loss, agreed, count = reference(theirs, both.head, params)
    objective = functools.partial(LOSS, chunk=chunk)
    run = jax.jit(lambda p, b: objective(both.bind(p, b), BATCH, None))
    found, number, metrics = run(params, base)
    weights = DECAY ** np.arange(STEPS)
    np.testing.assert_allclose(found, weights @ loss, rtol=1e-4)
    np.testing.assert_allclose(number, weights @ count, rtol=1e-6)
    for k in range(STEPS):
        np.testing.assert_allclose(metrics[f"agreement_{k + 1}"], (agreed[k], count[k]))


def test_what_is_drafted_across_documents_counts_for_nothing():
    base = describe(tiny_config())
    both = Drafting(describe_draft_head(base.config, 8), base)
    params, frozen = draft_cell.drawn(both.head), draft_cell.drawn(base, 1)
    run = jax.jit(lambda batch: LOSS(both.bind(params, frozen), batch, None))
    together = run(BATCH)
    alone = [run(pack([document], 12)) for document in DOCUMENTS]
    expected = jax.tree.map(lambda *x: np.sum(x), *alone)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5), together, expected)


@functools.cache
def trained(mesh):
    """(losses of five steps, the state after them) from the same parameters."""
    mesh, base = make_mesh(mesh), describe(tiny_config())
    both = Drafting(describe_draft_head(base.config, 8), base)
    frozen = jax.device_put(draft_cell.drawn(base, 1), base.shardings(mesh))
    rule = make_optimizer(OptimConfig(1e-2, weight_decay=0.1), both, 5)
    state = start_state(init_draft_head(both.head, mesh, jax.random.key(0)), both, rule, mesh)
    step = make_train_step(both, LOSS, rule, mesh)
    losses = []
    for _ in range(5):
        state, metrics = step(state, BATCH, jax.random.key(1), frozen)
        losses.append(float(metrics["loss"]))
    return losses, state, frozen


def test_the_head_alone_trains():
    losses, state, frozen = trained("data:1")
    assert losses[-1] < losses[0]
    assert set(flatten(state.params)) == set(flatten(describe_draft_head(tiny_config(), 8).shapes))
    jax.tree.map(np.testing.assert_array_equal, frozen, draft_cell.drawn(describe(tiny_config()), 1))


@pytest.mark.parametrize("mesh", ["data:2", "fsdp:2", "tensor:2"])
def test_two_devices_train_as_one_does(mesh):
    np.testing.assert_allclose(trained(mesh)[0], trained("data:1")[0], rtol=1e-5)
    near = functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5)
    jax.tree.map(near, trained(mesh)[1].params, trained("data:1")[1].params)


def config(tmp_path, **changes):
    data = tmp_path / "lines.txt"
    sentences = ["I like apples.", "He reads a book.", "We are at home.", "They went to school today."]
    data.write_text("".join(f"{s} {t}\n" for s in sentences for t in sentences for _ in range(4)))
    values = {
        "base": str(DEMO),
        "data": ((str(data), "", 1.0),),
        "width": 64,
        "draft_steps": 3,
        "row_tokens": 32,
        "eval_fraction": 0.2,
        "optim": OptimConfig(1e-2, ema_decay=0.9),
        "batch_size": 4,
        "steps": 30,
        "log_every": 15,
    }
    return DraftHeadConfig(**values | changes)


def test_a_trained_head_agrees_with_its_model(tmp_path):
    workdir, mesh = tmp_path / "run", make_mesh("")
    result = draft_head.run(config(tmp_path), workdir, mesh)
    assert max(result.agreement_before) < 0.3 and min(result.agreement) > 0.6
    np.testing.assert_allclose(result.accepted, np.cumprod(result.agreement).sum())
    records = read_metrics(workdir / "metrics.jsonl")
    assert records[-1]["eval/agreement_2"] == pytest.approx(result.agreement[1])
    assert {f"train/agreement_{k}" for k in (1, 2, 3)} <= set(records[0])

    base = load_pretrained(str(DEMO), mesh, field="base")
    head, params = load_draft_head(workdir / "draft_head", base.model, mesh)
    assert json.loads((workdir / "draft_head" / "draft_head.json").read_text())["base"] == str(DEMO)
    assert greedy_agreement(base, head, params, "He reads a") > 0.5
    assert draft_head.run(config(tmp_path), workdir, mesh) == result  # there is nothing left to do


def greedy_agreement(base, head, params, prompt):
    """Share of right tokens among the two that the head drafts at each place of a greedy text."""
    segments = jnp.ones((1, 24), jnp.int32)
    places = jnp.arange(24, dtype=jnp.int32)[None]

    @jax.jit
    def run(params, drawn, tokens):
        net, cell = base.model.bind(params), head.bind(drawn)
        hidden, _ = net(tokens, places, FullContext(segments))
        chosen = net.unembed(hidden).argmax(-1)
        state, token, drafts = hidden, chosen, []
        for _ in range(2):
            state = cell(state, net.embed.lookup(token))
            token = net.unembed(state).argmax(-1)
            drafts.append(token[0])
        return chosen[0], jnp.stack(drafts)

    tokens = base.tokenizer.encode(prompt)
    first = len(tokens) - 1
    while len(tokens) < 24:
        row = np.array([tokens + [0] * (24 - len(tokens))], np.int32)
        tokens.append(int(run(base.params, params, row)[0][len(tokens) - 1]))
    _, drafts = run(base.params, params, np.array([tokens], np.int32))
    right = [drafts[k, t] == tokens[t + k + 2] for t in range(first, 21) for k in range(2)]
    return np.mean(right)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"draft_steps": 0}, "draft_steps=0: expected 1 or more"),
        ({"width": -1}, "width=-1: expected 1 or more, or 0"),
        ({"decay": 1.5}, r"decay=1.5: expected in \(0, 1\]"),
        ({"base_weight": 1.5}, r"base_weight=1.5: expected in \[0, 1\]"),
        ({"base": ""}, "base='': expected the model to draft for"),
        ({"row_tokens": 3}, "row_tokens=3: expected more than draft_steps"),
        ({"task": "lm"}, "task='lm'"),
        ({"document": "page"}, "document='page'"),
        ({"row_tokens": 1000}, "row_tokens=1000: expected 2 to model.max_positions=512"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        draft_head.run(config(tmp_path, **change), tmp_path / "run", make_mesh(""))
