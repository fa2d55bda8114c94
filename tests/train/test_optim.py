"""Every optimizer against torch; schedules and average against their formulas."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch

from llm_jax.config import OPTIMIZERS, ModelConfig, OptimConfig
from llm_jax.models import describe
from llm_jax.models.skip_gram import SkipGram
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


# What is one matrix to an optimizer, "out, in", in each layer; all other parameters are vectors.
MATRICES = {
    "layers/attn/wq": (8, 8),
    "layers/attn/wk": (8, 8),
    "layers/attn/wv": (8, 8),
    "layers/attn/wo": (8, 8),
    "layers/mlp/up": (12, 8),
    "layers/mlp/down": (8, 12),
    "embed/tokens": (13, 8),
    "embed/positions": (6, 8),
}
DECAY, PEAK, SETTLE, STEPS = 0.3, 3e-2, 20, 25


class SGD(torch.optim.SGD):
    """torch's, with its weight decay taken out of the momentum."""

    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.mul_(1 - group["lr"] * group["decay"])
        super().step()


class Lion(torch.optim.Optimizer):
    """Algorithm 2 of Chen et al. 2023."""

    def __init__(self, params, lr, betas):
        super().__init__(params, {"lr": lr, "betas": betas})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            b1, b2 = group["betas"]
            for p in group["params"]:
                m = self.state[p].setdefault("m", torch.zeros_like(p))
                c = b1 * m + (1 - b1) * p.grad
                p -= group["lr"] * (torch.sign(c) + group["weight_decay"] * p)
                m.mul_(b2).add_((1 - b2) * p.grad)


def references(config, decayed, rest, hidden):
    """The torch optimizers that do the same; hidden: the matrices of the layers."""
    groups = [
        {"params": decayed, "weight_decay": DECAY},
        {"params": rest, "weight_decay": 0.0},
    ]
    betas = (config.b1, config.b2)
    if config.optimizer == "adamw":
        return [torch.optim.AdamW(groups, lr=1.0, betas=betas, eps=config.eps)]
    if config.optimizer == "adafactor":
        return [torch.optim.Adafactor(groups, lr=1.0)]
    if config.optimizer == "lion":
        return [Lion(groups, 1.0, betas)]
    if config.optimizer == "sgd":
        groups = [{"params": g["params"], "decay": g["weight_decay"]} for g in groups]
        return [SGD(groups, lr=1.0, momentum=config.momentum)]
    others = [
        {"params": [p for p in g["params"] if not any(p is h for h in hidden)]}
        | {"weight_decay": g["weight_decay"]}
        for g in groups
    ]
    muon = torch.optim.Muon(
        hidden, lr=1.0, weight_decay=DECAY, momentum=config.momentum, adjust_lr_fn="match_rms_adamw"
    )
    return [muon, torch.optim.AdamW(others, lr=1.0, betas=betas, eps=config.eps)]


def as_matrices(name, value):
    """One float64 tensor for each matrix or vector that this parameter stacks."""
    layers = np.asarray(value, np.float64) if name.startswith("layers/") else np.asarray(value)[None]
    return [torch.tensor(x.reshape(MATRICES.get(name, -1)), dtype=torch.float64) for x in layers]


@pytest.mark.parametrize(
    ("settings", "clip"),
    [
        ({}, 0.0),
        ({}, 0.05),
        ({"optimizer": "adafactor"}, 0.0),
        ({"optimizer": "lion", "b2": 0.99}, 0.05),
        ({"optimizer": "muon", "momentum": 0.5}, 0.0),
        ({"optimizer": "sgd", "momentum": 0.9}, 0.05),
    ],
)
def test_steps_match_torch(model, settings, clip, monkeypatch):
    # Muon in float64 there too; torch orthogonalizes in bfloat16.
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    config = OptimConfig(PEAK, "linear", 0.4, weight_decay=DECAY, clip_norm=clip, **settings)
    optimizer = make_optimizer(config, model, STEPS)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype(np.float32), model.shapes)
    tensors = {n: [torch.nn.Parameter(x) for x in as_matrices(n, p)] for n, p in flatten(params).items()}
    decayed = [p for n, parts in tensors.items() if n in MATRICES for p in parts]
    rest = [p for n, parts in tensors.items() if n not in MATRICES for p in parts]
    hidden = [p for n, parts in tensors.items() if n in MATRICES and "layers" in n for p in parts]
    rivals = references(config, decayed, rest, hidden)
    state, update = optimizer.transform.init(params), jax.jit(optimizer.transform.update)
    for step in range(STEPS):
        grads = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), params)
        with jax.numpy_dtype_promotion("standard"):
            updates, state = update(grads, state, params)
        params = optax.apply_updates(params, updates)
        for name, grad in flatten(grads).items():
            for p, g in zip(tensors[name], as_matrices(name, grad), strict=True):
                p.grad = g
        if clip:
            torch.nn.utils.clip_grad_norm_([*decayed, *rest], clip)
        for rival in rivals:
            for group in rival.param_groups:  # warmup of 10 steps, then down to 0 in 15
                group["lr"] = PEAK * (step / 10 if step < 10 else (STEPS - step) / 15)
            rival.step()
        if config.optimizer == "muon" and step < SETTLE:
            # Of our momentum, unlike torch's, the bias is corrected: they agree after 0.5^20 = 1e-6.
            for name, value in flatten(params).items():
                for p, x in zip(tensors[name], as_matrices(name, value), strict=True):
                    p.data.copy_(x)
    for name, value in flatten(params).items():
        for p, x in zip(tensors[name], as_matrices(name, value), strict=True):
            # float32 against float64: rounding of tiny moments shows up at 1e-6 of an update, and the
            # polynomial of Muon makes it some ten times larger.
            np.testing.assert_allclose(x, p.detach(), rtol=2e-5, atol=5e-6)


def test_every_setting_that_nothing_reads_is_refused():
    assert set(OPTIMIZERS) == {"adamw", "adafactor", "lion", "muon", "sgd"}
    values = {"momentum": 0.5, "b1": 0.5, "b2": 0.5, "eps": 0.5}
    for optimizer, read in OPTIMIZERS.items():
        for name, value in values.items():
            if name in read:
                OptimConfig(1e-3, optimizer=optimizer, **{name: value})
            else:
                with pytest.raises(ValueError, match=f"optim.{name}=0.5.*optimizer='{optimizer}'"):
                    OptimConfig(1e-3, optimizer=optimizer, **{name: value})
    with pytest.raises(ValueError, match="decay_fraction=0.5.*schedule='cosine'"):
        OptimConfig(1e-3, decay_fraction=0.5)
    with pytest.raises(ValueError, match="final_fraction=0.1.*schedule='constant'"):
        OptimConfig(1e-3, "constant", final_fraction=0.1)
    with pytest.raises(ValueError, match="decay_fraction=0.9.*at most"):
        OptimConfig(1e-3, "wsd", warmup_fraction=0.2, decay_fraction=0.9)


def test_muon_wants_matrices_of_layers():
    with pytest.raises(ValueError, match="optim.optimizer='muon'.*adamw"):
        make_optimizer(OptimConfig(1e-3, optimizer="muon"), SkipGram(10, 4), 5)


def test_adafactor_keeps_rows_and_columns_also_of_tables_alone():
    state = make_optimizer(OptimConfig(1e-3, optimizer="adafactor"), SkipGram(10, 4), 5).transform.init(
        {name: jnp.zeros((10, 4)) for name in ("centers", "contexts")}
    )
    assert sorted(x.size for x in jax.tree.leaves(state) if x.size > 1) == [4, 4, 10, 10]


def test_schedules_follow_their_formulas():
    def at(name, step):
        final = {} if name == "constant" else {"final_fraction": 0.25}
        return float(make_schedule(OptimConfig(0.4, name, warmup_fraction=0.1, **final), 100)(step))

    for name in ("cosine", "linear", "constant", "wsd"):
        assert at(name, 0) == 0.0
        assert at(name, 5) == pytest.approx(0.2)
        assert at(name, 10) == pytest.approx(0.4)
    assert at("constant", 99) == pytest.approx(0.4)
    assert at("linear", 55) == pytest.approx(0.25)
    assert at("cosine", 55) == pytest.approx(0.25)
    assert at("cosine", 40) == pytest.approx(0.1 + 0.3 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert at("wsd", 80) == pytest.approx(0.4)
    assert at("wsd", 90) == pytest.approx(0.25)
    assert at("linear", 100) == at("cosine", 100) == at("wsd", 100) == pytest.approx(0.1)


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
