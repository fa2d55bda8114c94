"""Pooling, against NumPy on each row's real tokens."""

import jax.numpy as jnp
import numpy as np
import pytest

from llm_jax.models.heads import pool

REFERENCE = {
    "cls": lambda row: row[0],
    "last": lambda row: row[-1],
    "mean": lambda row: row.mean(axis=0),
    "max": lambda row: row.max(axis=0),
}


@pytest.mark.parametrize("kind", REFERENCE)
def test_padding_takes_no_part_in_pooling(kind):
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(3, 6, 4)).astype(np.float32) - 5  # padding of 0 would win a maximum
    mask = np.array([[1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 1, 1], [1, 1, 0, 0, 0, 0]], np.int32)
    hidden[mask == 0] = 0.0
    want = [REFERENCE[kind](row[real > 0]) for row, real in zip(hidden, mask, strict=True)]
    got = pool(jnp.asarray(hidden), jnp.asarray(mask), kind)
    np.testing.assert_allclose(got, np.stack(want), rtol=1e-6)
