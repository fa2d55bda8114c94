"""Speed of a run: FLOPs as XLA counts them, and the arithmetic of a fake clock."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.config import ModelConfig
from llm_jax.models import describe
from llm_jax.models.cost import forward_flops
from llm_jax.ops.attention import FullContext
from llm_jax.sharding import make_mesh
from llm_jax.train import speed

SHAPE = dict(num_layers=1, embed_dim=64, num_heads=4, num_kv_heads=2, head_dim=16, mlp_dim=192)
MODEL = ModelConfig("llama", vocab_size=640, max_positions=64, param_dtype="float32", **SHAPE)


@pytest.mark.parametrize("tied", [True, False])
def test_flops_are_those_that_xla_counts(tied):
    """XLA counts a scanned layer once, so there is one; it also counts norms and the softmax."""
    model = describe(ModelConfig(**vars(MODEL) | {"tie_embeddings": tied}))

    def forward(params, tokens):
        net, (rows, length) = model.bind(params), tokens.shape
        positions = jnp.broadcast_to(jnp.arange(length), (rows, length))
        hidden, _ = net(tokens, positions, FullContext(jnp.ones((rows, length), jnp.int32)))
        return net.unembed(hidden)

    tokens = jax.ShapeDtypeStruct((4, 64), jnp.int32)
    counted = jax.jit(forward).lower(model.shapes, tokens).compile().cost_analysis()["flops"]
    assert forward_flops(model, 4 * 64, 64) == pytest.approx(counted, rel=0.1)


@pytest.fixture
def seconds(monkeypatch):
    """A clock that shows what the test says."""
    now = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: now[0])
    return now


def test_rates_of_a_run(seconds, monkeypatch):
    mesh, model = make_mesh("data:2"), describe(MODEL)
    clock = speed.Clock(model, mesh)

    def batches():
        for _ in range(3):
            seconds[0] += 0.5
            yield np.float32(100)

    for tokens in clock.waiting(batches()):
        seconds[0] += 1.5  # the step
        clock.count(tokens, 32)
    rates = clock.rates()  # of two steps: the first one is left out
    assert rates["perf/tokens_per_s"] == 50 and rates["perf/steps_per_s"] == 0.5
    assert rates["perf/input_wait"] == 0.25
    flops = 50 * 3 * forward_flops(model, 1, 32)
    assert rates["perf/tflops_per_s"] == pytest.approx(flops / 1e12)
    assert "perf/mfu" not in rates, "nobody knows the peak of a CPU"
    assert rates["perf/host_memory_gib"] > 0.05

    kind = mesh.devices.flat[0].device_kind
    monkeypatch.setitem(speed.PEAK_FLOPS, kind, 1e9)
    seconds[0] += 4
    clock.count(np.float32(100), 32)
    assert clock.rates()["perf/mfu"] == pytest.approx(25 * 3 * forward_flops(model, 1, 32) / 2e9)
