"""Memory of a whole train step, as the compiler plans it."""

import dataclasses

from llm_jax.sharding import make_mesh
from tests.train.step_memory import GPT2, temporary_bytes

ROWS, LENGTH = 2, 256
# GPT-2's vocabulary on a model so small that the logits, 98 MiB, are most of what a step holds.
SMALL = dataclasses.replace(
    GPT2, num_layers=1, embed_dim=16, num_heads=1, num_kv_heads=1, head_dim=16, mlp_dim=32
)


def test_a_step_in_chunks_holds_less_than_the_logits():
    mesh = make_mesh("data:1")
    held = {
        chunk: temporary_bytes(SMALL, mesh, rows=ROWS, length=LENGTH, loss_chunk=chunk)
        for chunk in (0, 16, 8)
    }
    logits = ROWS * LENGTH * SMALL.vocab_size * 4
    assert held[0] > 2 * logits, "the logits and their gradient"
    # XLA:CPU has some seven arrays of a chunk's size; it moves masks and constants out of the loop.
    assert logits > held[16] > 1.5 * held[8]
