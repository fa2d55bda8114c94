"""Run a TPU kernel on a CPU with its memories, DMAs and semaphores simulated, and look for races.

A race is a buffer that is read or written while a DMA that nobody waited for uses it: on a TPU the
result depends on luck, and in a test there it mostly comes out right. Reads beyond a buffer are errors
as well, and memory that nothing wrote is not-a-number, so that it shows.
"""

import contextlib
import io
from collections.abc import Callable
from typing import Any

import jax
from jax._src.pallas.mosaic.interpret import interpret_pallas_call  # it tells nobody else of its races
from jax.experimental.pallas import tpu as pltpu

FOUND = "RACE DETECTED"
MEANING = "a buffer is used while a DMA may still use it"


class RaceError(AssertionError):
    """A kernel whose result depends on when its DMAs end."""


def run_checked(function: Callable[..., Any], *args: Any, eager_dmas: bool = False) -> Any:
    """function(*args), each TPU kernel in it simulated; slow: some 0.1 s for a step of the grid.

    eager_dmas: DMAs are carried out when they start; else when they are waited for, which shows a
    missing wait in the result too. Raises RaceError, which names both accesses, for a race, and what the
    simulator raises for a read or write beyond a buffer.
    """
    mode = pltpu.InterpretParams(
        detect_races=True,
        dma_execution_mode="eager" if eager_dmas else "on_wait",
        out_of_bounds_reads="raise",
        uninitialized_memory="nan",
    )
    said = io.StringIO()  # where the simulator describes races
    try:
        with pltpu.force_tpu_interpret_mode(mode), contextlib.redirect_stdout(said):
            result = jax.block_until_ready(jax.jit(function)(*args))
        races = interpret_pallas_call.races
    except jax.errors.JaxRuntimeError as error:  # jax 0.12 raises at the first race, older ones print
        _, found, accesses = str(error).partition(FOUND)
        if not found:
            raise
        accesses = accesses.partition("\n\n")[0]  # jax's remarks on its stack trace follow
        raise RaceError(f"{MEANING}:\n{found}{accesses}") from None
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    if races is not None and races.races_found:
        raise RaceError(f"{MEANING}:\n{said.getvalue().strip()}")
    return result
