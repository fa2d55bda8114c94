"""Which implementation of an operation runs."""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True)
class Choice:
    """ "pallas" or "xla", and why. possible: whether the kernel could run all the same."""

    implementation: str
    reason: str
    possible: bool = False


def attention_refusal(q: jax.Array, kind: str) -> str:
    """Why the TPU's attention kernels do not take such queries on a kind of device; "" = they do."""
    if not kind.startswith("TPU"):
        return f"there is no kernel for {kind}"
    if q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel computes in bfloat16 and float32, not {q.dtype}"
    if q.shape[-1] % 16:
        return f"head_dim={q.shape[-1]} is no multiple of 16"
    return ""
