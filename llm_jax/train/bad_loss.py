"""Steps that must not count: a loss or gradient that is not finite, or a loss far above the recent ones.

Whether a step is bad is decided on the device, in the step itself (`is_bad`), which then keeps the state
as it was: the state is never polluted, and nothing waits. The host learns of it a few steps later,
before anything is logged, judged or saved (`take`), and does as `on_bad_loss` says.
"""

import collections
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

RECENT = 64  # losses that the median of a spike is taken of
ENOUGH = 16  # of them, before there are spikes
LAG = 4  # steps by which the host is late, so that the device never waits for it
IN_A_ROW = 50  # skipped steps that end a run all the same
FILES = 20  # bad batches that are written

ADVICE = (
    "Resume with --config.on_bad_loss=skip or rollback, or start anew with a lower optim.learning_rate, "
    "a longer warmup or a smaller optim.clip_norm"
)

Step = tuple[int, int, Mapping[str, jax.Array]]  # its number, that of its batch, its metrics


class BadLoss(FloatingPointError):
    """A bad step that ends the run or, with "rollback", a part of it."""

    def __init__(self, message: str, position: int):
        super().__init__(message)
        self.position = position  # number of the batch, from 0


def is_bad(loss: jax.Array, grad_norm: jax.Array, recent: jax.Array, spike_factor: float) -> jax.Array:
    """[] bool. recent [RECENT]: losses of good steps, NaN = none yet; spike_factor 0 = no spikes."""
    bad = ~(jnp.isfinite(loss) & jnp.isfinite(grad_norm))
    if not spike_factor:
        return bad
    known = jnp.sum(jnp.isfinite(recent))
    return bad | ((known >= ENOUGH) & (loss > spike_factor * jnp.nanmedian(recent)))


def take(steps: collections.deque[Step], leave: int) -> list[Step]:
    """Take the oldest steps until `leave` are left: their metrics are there, or nearly."""
    return [steps.popleft() for _ in range(len(steps) - leave)]


def write_bad(workdir: Path, bad: Step, loader: Callable[[int], Mapping[str, np.ndarray]]) -> str:
    """Write the batch and the metrics of a bad step to WORKDIR/bad_batches; what happened, in words."""
    step, position, metrics = bad
    numbers = {name: np.asarray(value) for name, value in metrics.items()}
    message = (
        f"step {step} is bad: loss {float(numbers['loss']):.6g}, gradient norm "
        f"{float(numbers['grad_norm']):.6g} (batch {position})"
    )
    process = f".process{jax.process_index()}" if jax.process_count() > 1 else ""  # each has its rows
    path = workdir / "bad_batches" / f"{step}{process}.npz"
    try:
        path.parent.mkdir(exist_ok=True)
        if len(list(path.parent.iterdir())) < FILES:
            np.savez(path, **loader(position), **{f"metrics/{k}": v for k, v in numbers.items()})
            message += f"; it is in {path}"
    except OSError as error:
        message += f"; it could not be written: {error}"
    logging.error("%s", message)
    return message
