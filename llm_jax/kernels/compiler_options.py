"""Settings of libtpu that our programs are compiled with, where its own cost them time.

Found by reading compiled programs of libtpu 0.0.42 and 0.0.52 (docs/plan.md); nobody has measured them.
"""

import functools
import logging
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp

from llm_jax.kernels.chips import RULES

logger = logging.getLogger(__name__)

SERVE: dict[str, dict[str, int]] = {  # by generation
    # It would rather have bfloat16 weights in tiles of 16 rows, which arguments cannot have, and would
    # copy all weights to such tiles in every step.
    "tpu7x": {"xla_tpu_control_large_2nd_minor_layout_for_x16": 0},
}
# It would cut a product with a weight that `fsdp` splits into as many as there are parts, and pass the
# parts round a ring of all chips meanwhile, which lie several links apart. Now it gathers them.
GATHER = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 1 << 20}
TRAIN: dict[str, dict[str, int]] = {rule.name: GATHER for rule in RULES.values()}


def compiler_options(table: dict[str, dict[str, int]], devices: Iterable[Any]) -> dict[str, int]:
    """Of SERVE or TRAIN, what the compiler of a program's devices knows; {} for what is no TPU."""
    here = jax.process_index()  # which alone can compile for its devices
    device = min(devices, key=lambda x: x.process_index != here)
    kind = device.device_kind
    found = table.get(RULES[kind].name, {}) if kind in RULES else {}
    return {name: value for name, value in found.items() if is_known(device, name, value)}


@functools.lru_cache(maxsize=16)
def is_known(device: Any, name: str, value: int) -> bool:
    """Whether a device's compiler has such an option; where it has not, that is logged once."""
    number = jax.ShapeDtypeStruct((), jnp.float32, sharding=jax.sharding.SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x + 1).lower(number).compile({name: value})
    except jax.errors.JaxRuntimeError as error:
        if "No such compile option" not in str(error):
            raise
        logger.warning("this compiler does not know %s: programs may be slower", name)
        return False
    return True
