"""What layers are made of, against torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.models.layers import gelu


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 3e-7), ("bfloat16", 0.0)])
def test_gelu_is_that_of_torch(dtype, tolerance):
    """In bfloat16 to the last bit, for negative numbers too: both compute in float32."""
    x = jnp.linspace(-4.0, 4.0, 4001).astype(dtype)
    theirs = torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, dtype))
    expected = torch.nn.functional.gelu(theirs).float().numpy()
    found = gelu(x)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=0, atol=tolerance)
