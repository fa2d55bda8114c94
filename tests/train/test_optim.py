"""The optimizer against torch.optim.AdamW; schedule and average against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from llm_jax.config import ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.train.optim import decay_mask, make_optimizer, make_schedule, update_average
from llm_jax.tree import flatten


@pytest.fixture(scope="module")
def model():
    return describe(
        ModelConfig(
            "gpt2",
            vocab_size=13,
            num_layers=2,
            embed_dim=8,
            num_heads=2,
            num_kv_heads=2,
            head_dim=4,
            mlp_dim=12,
            max_positions=6,
            positions="learned",
            norm="layer",
            qkv_bias=True,
            out_bias=True,
            mlp_bias=True,
            gated_mlp=False,
            tie_embeddings=True,
        )
    )


def test_only_products_and_embeddings_decay(model):
    decayed = {name for name, decays in flatten(decay_mask(model)).items() if decays}
    names = [f"layers/{n}" for n in ("attn/wq", "attn/wk", "attn/wv", "attn/wo", "mlp/up", "mlp/down")]
    assert decayed == {"embed/tokens", "embed/positions", *names}


@pytest.mark.parametrize("clip", [0.0, 0.05])
def test_five_steps_match_torch(model, clip):
    config = OptimConfig(3e-2, schedule="linear", weight_decay=0.3, clip_norm=clip, warmup_fraction=0.4)
    optimizer, mask = make_optimizer(config, model, steps=5), flatten(decay_mask(model))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda s: jnp.asarray(rng.normal(size=s.shape).astype(np.float32)), model.shapes
    )
    flat = {n: torch.nn.Parameter(torch.tensor(np.asarray(p))) for n, p in flatten(params).items()}
    groups = [
        {"params": [p for n, p in flat.items() if mask[n]], "weight_decay": 0.3},
        {"params": [p for n, p in flat.items() if not mask[n]], "weight_decay": 0.0},
    ]
    reference = torch.optim.AdamW(groups, lr=1.0, betas=(config.b1, config.b2), eps=config.eps)
    state, update = optimizer.transform.init(params), jax.jit(optimizer.transform.update)
    for step in range(5):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in flatten(grads).items():
            flat[name].grad = torch.tensor(grad)
        if clip:
            torch.nn.utils.clip_grad_norm_(flat.values(), clip)
        for group in reference.param_groups:  # warmup of 2 steps, then down to 0 in 3
            group["lr"] = 3e-2 * (step / 2 if step < 2 else (5 - step) / 3)
        reference.step()
    for name, value in flatten(params).items():
        # Adam divides by sqrt(v): rounding of tiny moments shows up at 1e-6 of an update.
        np.testing.assert_allclose(value, flat[name].detach().numpy(), rtol=1e-5, atol=2e-6)


def test_schedules_follow_their_formulas():
    at = lambda name, step: float(  # noqa: E731
        make_schedule(OptimConfig(0.4, name, warmup_fraction=0.1, final_fraction=0.25), 100)(step)
    )
    for name in ("cosine", "linear", "constant"):
        assert at(name, 0) == 0.0
        assert at(name, 5) == pytest.approx(0.2)
        assert at(name, 10) == pytest.approx(0.4)
    assert at("constant", 99) == pytest.approx(0.4)
    assert at("linear", 55) == pytest.approx(0.25)
    assert at("cosine", 55) == pytest.approx(0.25)
    assert at("cosine", 40) == pytest.approx(0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert at("linear", 100) == at("cosine", 100) == pytest.approx(0.1)


def test_average_of_parameters():
    rng = np.random.default_rng(0)
    values = rng.normal(size=20)
    expected, average = 0.0, {"w": jnp.zeros(())}
    for step, value in enumerate(values):
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * value
        params = {"w": jnp.asarray(value, jnp.float32)}
        average = update_average(average, params, jnp.asarray(step), 0.6)
    np.testing.assert_allclose(average["w"], expected, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [{"learning_rate": 0.0}, {"b2": 1.0}, {"schedule": "cosin"}, {"warmup_fraction": 1.5}, {"eps": 0.0}],
)
def test_bad_settings_are_refused(settings):
    (name,) = settings
    with pytest.raises(ValueError, match=name):
        OptimConfig(**({"learning_rate": 1e-3} | settings))
