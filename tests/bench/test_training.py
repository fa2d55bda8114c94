"""The peer of the training benchmark takes the same steps as we do."""

import dataclasses

import jax
import numpy as np
import pytest
import torch

from llm_jax.bench.training import gpt2, our_step, random_batch, rivals, torch_step
from llm_jax.models import describe, init_params
from llm_jax.sharding import make_mesh

SHAPE = (gpt2(vocab_size=50, num_layers=2, num_heads=2, head_dim=8), 2, 16)


@pytest.mark.parametrize(("activation", "mesh"), [("gelu", "data:1"), ("gelu_tanh", "data:2")])
def test_both_sides_take_the_same_steps(activation, mesh):
    config = dataclasses.replace(SHAPE[0], activation=activation)
    model, batch = describe(config), random_batch(config, *SHAPE[1:])
    params = init_params(model, make_mesh("data:1"), jax.random.key(0))
    params = jax.tree.map(np.array, params)
    ours = our_step(model, params, batch, make_mesh(mesh))
    theirs = torch_step(torch, compiled=False)(model, params, batch)
    found = [(float(ours()), float(theirs())) for _ in range(6)]
    # Three float32 roundings of a loss near 4; a missing clip or decay differs by more after a step.
    np.testing.assert_allclose(*np.array(found).T, rtol=5e-6)
    assert found[-1][0] < found[0][0], "it learns"


def test_an_unknown_shape_is_refused():
    with pytest.raises(ValueError, match="llama160m.*gpt2.*shakespeare_char"):
        rivals(torch, "llama160m", compiled=False, steps=1)
