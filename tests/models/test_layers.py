"""What layers are made of, against torch."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from llm_jax.models.layers import gelu


@pytest.mark.parametrize(("dtype", "last_bit"), [("float32", 0.0), ("bfloat16", 2**-7)])
def test_gelu_is_that_of_torch(dtype, last_bit):
    """In bfloat16 to its last bit, for negative numbers too, as both compute in float32.

    In float32 within 2 = x / 2 times the roundings of erf and 1 + erf (3.6e-7), and of a product.
    """
    x = jnp.linspace(-4.0, 4.0, 4001).astype(dtype)
    theirs = torch.tensor(np.asarray(x, np.float32)).to(getattr(torch, dtype))
    expected = torch.nn.functional.gelu(theirs).float().numpy()
    found = gelu(x)
    assert found.dtype == x.dtype
    np.testing.assert_allclose(np.asarray(found, np.float32), expected, rtol=last_bit, atol=1e-6)
