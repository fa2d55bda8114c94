"""Distillation: the loss against torch, and that a student comes nearer to its teacher by it."""

import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import llm_jax
from llm_jax.checkpoint.workdir import load_trained
from llm_jax.config import DistillConfig, LanguageModelConfig, ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.ops.attention import FullContext
from llm_jax.ops.losses import distillation_kl
from llm_jax.sharding import make_mesh
from llm_jax.train import language_model
from llm_jax.train.distill import Distillation, distillation_loss
from llm_jax.train.metrics_log import read_metrics

DEMO = Path(llm_jax.__file__).parent / "assets" / "demo_lm"
SIZES = {"num_layers": 1, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_dim": 24}
STUDENT = ModelConfig("llama", vocab_size=31, embed_dim=16, max_positions=32, **SIZES)
TEACHER = dataclasses.replace(STUDENT, num_layers=3, mlp_dim=40)


def drawn(model, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0.0, 0.5, s.shape).astype(s.dtype), model.shapes)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    real = np.arange(12)[None] < np.array([[12], [7], [3]])
    tokens = np.where(real, rng.integers(0, 31, real.shape), 0)
    targets = np.where(real & np.roll(real, -1, 1), np.roll(tokens, -1, 1), -1)
    targets[:, -1] = -1
    positions = np.where(real, np.arange(12), 0)
    values = {"tokens": tokens, "targets": targets, "segment_ids": real, "positions": positions}
    return {name: jnp.asarray(value, jnp.int32) for name, value in values.items()}


def reference(batch, temperature, weight, hidden_weight):
    """(loss sum, student gradient of the embedding) from torch on the logits and hidden states."""
    nets = []
    for config, seed in ((STUDENT, 0), (TEACHER, 1)):
        model = describe(config)

        def run(params, model=model):
            net = model.bind(params)
            context = FullContext(batch["segment_ids"])
            hidden, _ = net(batch["tokens"], batch["positions"], context)
            return hidden, net.unembed(hidden)

        nets.append([torch.tensor(np.asarray(x)) for x in jax.jit(run)(drawn(model, seed))])
    (hidden, student), (wanted, teacher) = nets
    real = torch.tensor(np.asarray(batch["targets"]) >= 0)
    targets = torch.tensor(np.asarray(batch["targets"]), dtype=torch.long)[real]
    text = torch.nn.functional.cross_entropy(student[real], targets, reduction="sum")
    divergence = torch.nn.functional.kl_div(
        torch.log_softmax(student[real] / temperature, -1),
        torch.log_softmax(teacher[real] / temperature, -1),
        reduction="sum",
        log_target=True,
    )
    distance = ((hidden - wanted) ** 2).mean(-1)[real].sum()
    total = (1 - weight) * text + weight * temperature**2 * divergence + hidden_weight * distance
    return total.item(), int(real.sum())


@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("weights", [(0.5, 0.0), (1.0, 0.0), (0.3, 0.7)])
def test_the_loss_is_torchs(batch, weights, chunk):
    expected, number = reference(batch, 3.0, *weights)
    pair = Distillation(describe(STUDENT), describe(TEACHER))
    settings = {"temperature": 3.0, "weight": weights[0], "hidden_weight": weights[1], "chunk": chunk}
    objective = functools.partial(distillation_loss, **settings)

    def loss(params, teacher):
        return objective(pair.bind(params, teacher), batch, None)[:2]

    total, count = jax.jit(loss)(drawn(pair.student, 0), drawn(pair.teacher, 1))
    np.testing.assert_allclose(total, expected, rtol=2e-5)
    assert float(count) == number
    by_teacher = jax.jit(jax.grad(lambda t, p: loss(p, t)[0]))
    still = by_teacher(drawn(pair.teacher, 1), drawn(pair.student, 0))
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(still))


def test_the_divergence_of_a_distribution_from_itself_is_zero():
    logits = jnp.asarray(np.random.default_rng(0).normal(0, 3, (5, 40)), jnp.float32)
    same = distillation_kl(logits, logits + 7.0, jnp.zeros(5, jnp.int32), temperature=2.0)
    np.testing.assert_allclose(same, 0.0, atol=1e-5)


def config(tmp_path, **changes):
    data = tmp_path / "lines.txt"
    sentences = ["I like apples.", "He reads a book.", "We are at home.", "They went to school today."]
    data.write_text("".join(f"{s} {t}\n" for s in sentences for t in sentences for _ in range(4)))
    model = dataclasses.replace(STUDENT, vocab_size=4800, max_positions=64)
    values = {
        "data": ((str(data), "", 1.0),),
        "model": model,
        "row_tokens": 32,
        "eval_fraction": 0.2,
        "optim": OptimConfig(1e-2),
        "batch_size": 4,
        "steps": 40,
        "log_every": 20,
    }
    return LanguageModelConfig(**values | changes)


def test_a_student_comes_nearer_to_its_teacher(tmp_path):
    distill = DistillConfig(teacher=str(DEMO), weight=0.8)
    result = language_model.run(config(tmp_path, distill=distill), tmp_path / "run", make_mesh("data:2"))
    first, last = (r["train/divergence"] for r in read_metrics(tmp_path / "run/metrics.jsonl")[:2])
    assert last < 0.8 * first
    trained = load_trained(tmp_path / "run", make_mesh(""))
    assert trained.model.config.vocab_size == 4800 and trained.model.config.num_layers == 1
    assert np.isfinite(result.loss) and result.loss < np.log(4800)


def test_what_cannot_work_is_refused(tmp_path):
    distill = DistillConfig(teacher=str(DEMO), hidden_weight=0.5)
    with pytest.raises(ValueError, match=r"hidden_weight=0.5: expected 0, or model.embed_dim=16 equal"):
        language_model.run(config(tmp_path, distill=distill), tmp_path / "run", make_mesh(""))
    with pytest.raises(ValueError, match="tokenizer='x'.*teacher"):
        config(tmp_path, distill=distill, tokenizer="x")
    with pytest.raises(ValueError, match="vocab_size=31: expected 30"):
        Distillation(describe(STUDENT), describe(dataclasses.replace(TEACHER, vocab_size=30)))
    with pytest.raises(ValueError, match="distill.temperature=0"):
        DistillConfig(teacher="x", temperature=0.0)
