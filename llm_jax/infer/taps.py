"""Looking into a model and changing what it computes, without an engine: one forward of whole texts.

logits, found = run_with_taps(llm.model, llm.params, tokens, Taps(record=("resid", "attn_probs")))
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from llm_jax.models import Model
from llm_jax.ops.attention import FullContext
from llm_jax.ops.tap_context import Record, TapContext, TapInputs, pack_patches
from llm_jax.ops.taps import MAPS, ONCE, Taps


def run_with_taps(
    model: Model, params: Any, tokens: Any, taps: Taps
) -> tuple[jax.Array, dict[str, np.ndarray]]:
    """Logits [B, T, V] float32 of texts [B, T] of one length, and what was recorded of them, by point.

    That is [layers, B, T, ...] with the point's shape, without layers of "embed" and "final", and of
    maps [layers, B, N, T, T]. Patches are of every text. Call it with a mesh set, if there is one.
    Raises ValueError as `Taps.check` does, and for a model without vocabulary logits.
    """
    tokens = np.asarray(tokens, np.int32)
    if tokens.ndim != 2 or not tokens.size:
        raise ValueError(f"tokens has shape {tokens.shape}: expected [B, T], texts of one length")
    batch, count = tokens.shape
    taps.check(model.config, count)
    spans = [(row, *span) for row in range(batch) for span in taps.spans(0, count, 0)]
    keep: Any = np.tile(np.arange(count, dtype=np.int32), (batch, 1))
    points = {patch.point for patch in taps.patches}
    given = TapInputs(keep, pack_patches(model.config, points, spans, batch))
    record = tuple(sorted(taps.recorded(model.config).items()))
    logits, found = _make_run(model, record)(params, tokens, given)
    found = {point: np.asarray(x) for point, x in found.items()}
    for point in found:
        if point in ONCE:
            found[point] = found[point][0]
        elif point == MAPS:
            found[point] = found[point].swapaxes(2, 3)
    return logits, found


@functools.lru_cache(maxsize=64)
def _make_run(model: Model, record: Record) -> Callable:
    @jax.jit
    def run(params, tokens, given):
        net = model.bind(params)
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)
        whole = FullContext(jnp.ones_like(tokens))
        context = TapContext.begin(whole, model.config, record, given, keys=tokens.shape[1])
        hidden, context = net(tokens, positions, context)
        return net.unembed(hidden), context.results()

    return run
