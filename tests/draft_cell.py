"""The cell of a draft head in NumPy, float64, written from its formula."""

import math

import jax
import numpy as np

from llm_jax.tree import flatten

_erf = np.vectorize(math.erf)
ACTIVATIONS = {
    "silu": lambda x: x / (1.0 + np.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1.0 + _erf(x / math.sqrt(2.0))),
    "gelu_tanh": lambda x: 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3))),
}


def cell(config, params, state, token):
    """state, token [..., D] -> the next state [..., D]."""
    p = {path: np.asarray(value, np.float64) for path, value in flatten(params).items()}

    def norm(x, name):
        if config.norm == "layer":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + config.norm_eps)
        return x * (p[f"{name}/scale"] + config.norm_plus_one) + p.get(f"{name}/bias", 0.0)

    h = norm(state, "state_norm") @ p["up_state"].T + norm(token, "token_norm") @ p["up_token"].T
    return state + ACTIVATIONS[config.activation](h) @ p["down"].T


def drawn(head, seed=0):
    """Parameters of a head with every array drawn, the zeros too."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda s: rng.normal(0.0, 0.3, s.shape).astype(s.dtype), head.shapes)
