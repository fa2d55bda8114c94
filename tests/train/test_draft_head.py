"""Training of draft heads: the loss against transformers and NumPy, what trains, what comes of it."""

import functools
import json
import shutil
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
slow = functools.partial(pytest.param, marks=pytest.mark.slow)
STEPS, DECAY = 3, 0.7
LOSS = functools.partial(draft_head_loss, steps=STEPS, decay=DECAY, base_weight=0.5)


def tiny_config():
    sizes = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8, "mlp_dim": 24}
    return ModelConfig("llama", vocab_size=tiny.VOCAB + 1, embed_dim=16, max_positions=32, **sizes)


@pytest.fixture(scope="module", params=["llama", "gemma2", slow("gpt2")])
def pair(request, tmp_path_factory):
    """(transformers model in float64, both networks of ours, the model's parameters)."""
    directory = tmp_path_factory.mktemp("base")
    theirs = tiny.DECODERS[request.param].save(directory).double()
    base = describe(load_config(directory))
    both = Drafting(describe_draft_head(base.config, 20), base)
    return theirs, both, load_hf(directory, base, make_mesh(""))


def reference(theirs, head, params, base_weight):
    """[K] losses, agreements and targets over all documents, one token after the other, and how many of
    the agreements are as good as ties, which float32 may see otherwise."""
    loss, agreed, count, close = np.zeros((4, STEPS))
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
                loss[k - 1] += (1 - base_weight) * text + base_weight * divergence
                agreed[k - 1] += np.argmax(q) == np.argmax(p)
                first, second = np.sort(q)[:-3:-1]
                close[k - 1] += first - second < 1e-5
                count[k - 1] += 1
    return loss, agreed, count, close


def unembed(theirs, state):
    logits = theirs.lm_head.weight.detach().numpy() @ state
    cap = getattr(theirs.config, "final_logit_softcapping", None)
    return logits if cap is None else cap * np.tanh(logits / cap)


def log_softmax(x):
    return x - x.max() - np.log(np.sum(np.exp(x - x.max())))


@pytest.mark.parametrize("chunk, base_weight", [(0, 0.4), (5, 1.0), slow(5, 0.0)])
def test_the_loss_is_that_of_transformers_and_numpy(pair, chunk, base_weight):
    theirs, both, base = pair
    params = draft_cell.drawn(both.head)
    loss, agreed, count, close = reference(theirs, both.head, params, base_weight)
    objective = functools.partial(LOSS, chunk=chunk, base_weight=base_weight)
    run = jax.jit(lambda p, b: objective(both.bind(p, b), BATCH, None))
    found, number, metrics = run(params, base)
    weights = DECAY ** np.arange(STEPS)
    np.testing.assert_allclose(found, weights @ loss, rtol=1e-4)
    np.testing.assert_allclose(number, weights @ count, rtol=1e-6)
    for k in range(STEPS):
        right, targets = metrics[f"agreement_{k + 1}"]
        assert targets == count[k]
        assert abs(right - agreed[k]) <= close[k]
    assert close.sum() < count.sum() / 2


def test_what_is_drafted_across_documents_counts_for_nothing():
    base = describe(tiny_config())
    both = Drafting(describe_draft_head(base.config, 8), base)
    params, frozen = draft_cell.drawn(both.head), draft_cell.drawn(base, 1)
    run = jax.jit(lambda p, b, batch: LOSS(both.bind(p, b), batch, None))
    together = run(params, frozen, BATCH)
    alone = [run(params, frozen, pack([document], 12)) for document in DOCUMENTS]
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


@pytest.mark.parametrize("mesh", ["data:2", "tensor:2", slow("fsdp:2")])
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
        "draft_steps": 2,
        "row_tokens": 32,
        "eval_fraction": 0.2,
        "optim": OptimConfig(1e-2, ema_decay=0.9),
        "batch_size": 4,
        "steps": 24,
        "log_every": 12,
    }
    return DraftHeadConfig(**values | changes)


def test_a_trained_head_agrees_with_its_model(tmp_path):
    workdir, mesh = tmp_path / "run", make_mesh("")
    result = draft_head.run(config(tmp_path), workdir, mesh)
    assert max(result.agreement_before) < 0.05 and min(result.agreement) > 0.35
    np.testing.assert_allclose(result.accepted, np.cumprod(result.agreement).sum())
    records = read_metrics(workdir / "metrics.jsonl")
    assert records[-1]["eval/agreement_2"] == pytest.approx(result.agreement[1])
    assert {f"train/agreement_{k}" for k in (1, 2)} <= set(records[0])

    base = load_pretrained(str(DEMO), mesh, field="base")
    head, params = load_draft_head(workdir / "draft_head", base.model, mesh)
    assert json.loads((workdir / "draft_head" / "draft_head.json").read_text())["base"] == str(DEMO)
    assert min(agreement(base, head, params, "I like apples. He reads a book.")) > 0.35


def agreement(base, head, params, text):
    """How often two drafted tokens after each place of a text are the model's, as an engine drafts."""
    tokens = jnp.asarray(base.tokenizer.encode(text), jnp.int32)[None]

    @jax.jit
    def run(params, drawn):
        net, cell = base.model.bind(params), head.bind(drawn)
        hidden, _ = net(tokens, jnp.arange(tokens.size)[None], FullContext(jnp.ones_like(tokens)))
        once = cell(hidden[:, :-2], net.embed.lookup(tokens[:, 1:-1]))
        twice = cell(once, net.embed.lookup(tokens[:, 2:]))
        return [net.unembed(x).argmax(-1) for x in (hidden, once, twice)]

    chosen, first, second = run(base.params, params)
    return [float(np.mean(first == chosen[:, 1:-1])), float(np.mean(second == chosen[:, 2:]))]


@pytest.mark.slow
def test_a_run_goes_on_where_it_was_cut_off(tmp_path):
    mesh, whole = make_mesh(""), tmp_path / "whole"
    expected = draft_head.run(config(tmp_path, steps=4, checkpoint_every=2), whole, mesh)
    shutil.copytree(whole, tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "4")
    shutil.rmtree(tmp_path / "cut" / "draft_head")
    assert (
        draft_head.run(config(tmp_path, steps=4, checkpoint_every=2), tmp_path / "cut", mesh) == expected
    )
    tensors = [
        (run / "draft_head" / "draft_head.safetensors").read_bytes() for run in (whole, tmp_path / "cut")
    ]
    assert tensors[0] == tensors[1]
    assert draft_head.run(config(tmp_path, steps=4, checkpoint_every=2), whole, mesh) == expected


@pytest.mark.parametrize(
    "change, message",
    [
        ({"draft_steps": 0}, "draft_steps=0: expected 1 or more"),
        ({"width": -1}, "width=-1: expected 1 or more, or 0"),
        ({"decay": 1.5}, r"decay=1.5: expected in \(0, 1\]"),
        ({"base_weight": 1.5}, r"base_weight=1.5: expected in \[0, 1\]"),
        ({"base": ""}, "base='': expected the model to draft for"),
        ({"row_tokens": 2}, "row_tokens=2: expected more than draft_steps"),
        ({"task": "lm"}, "task='lm'"),
        ({"document": "page"}, "document='page'"),
        ({"row_tokens": 1000}, "row_tokens=1000: expected 2 to model.max_positions=512"),
    ],
)
def test_what_cannot_work_is_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        draft_head.run(config(tmp_path, **change), tmp_path / "run", make_mesh(""))
