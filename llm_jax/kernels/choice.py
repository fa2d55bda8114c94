"""Which implementation of an operation runs."""

import dataclasses

import jax
import jax.numpy as jnp

from llm_jax.kernels import triton
from llm_jax.kernels.chips import OLDEST_CAPABILITY, gpu_rule


@dataclasses.dataclass(frozen=True)
class Choice:
    """ "pallas", "xla" or another form (see `forms`), and why.

    possible: whether the kernel could run all the same. measured_us: what forms took, if that is known.
    """

    implementation: str
    reason: str
    possible: bool = False
    measured_us: dict[str, float] = dataclasses.field(default_factory=dict, hash=False)


def kernel_refusal(kind: str, head_dim: int) -> str:
    """Why the attention kernels do not serve a kind of device or such heads on it; "" = they do."""
    rule = gpu_rule(kind)
    if rule is None and not kind.startswith("TPU"):
        return f"there is no kernel for {kind}"
    if rule and rule.capability < OLDEST_CAPABILITY:
        return f"there is no kernel for {kind}: the GPU kernel takes an A100 or newer"
    if rule and triton.plgpu is None:
        return f"jax {jax.__version__} has no Pallas Triton, in which the GPU kernel is written"
    if head_dim % 16:
        return f"head_dim={head_dim} is no multiple of 16"
    if rule and head_dim > 256:
        return f"head_dim={head_dim}: the GPU kernel's registers hold up to 256"
    return ""


def attention_refusal(q: jax.Array, kind: str) -> str:
    """Why the attention kernels do not take such queries on a kind of device; "" = they do."""
    refusal = kernel_refusal(kind, q.shape[-1])
    if not refusal and q.dtype not in (jnp.bfloat16, jnp.float32):
        return f"the kernel computes in bfloat16 and float32, not {q.dtype}"
    return refusal


def kernel_name(kind: str) -> str:
    """The reason of a choice of a kernel."""
    return "GPU kernel" if gpu_rule(kind) else "TPU kernel"
