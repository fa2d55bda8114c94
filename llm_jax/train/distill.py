"""Knowledge distillation: a student learns a teacher's distributions beside the text.

The teacher's parameters are frozen arguments of the step, so they are neither trained nor saved.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.models import Model, Params
from llm_jax.models.transformer import Transformer
from llm_jax.ops.attention import FullContext
from llm_jax.ops.losses import cross_entropy, distillation_kl, sum_over_chunks
from llm_jax.train.objectives import Batch, Metrics, router_loss, text_context


@dataclasses.dataclass(frozen=True)
class StudentAndTeacher:
    """Both networks, bound to their parameters."""

    student: Transformer
    teacher: Transformer


class Distillation:
    """A student in training beside its teacher; to the training loop it is the student.

    Raises ValueError when they do not speak of the same tokens.
    """

    def __init__(self, student: Model, teacher: Model):
        ours, theirs = student.config.vocab_size, teacher.config.vocab_size
        if ours != theirs:
            raise ValueError(f"model.vocab_size={ours}: expected {theirs}, that of the teacher")
        self.student, self.teacher = student, teacher
        self.shapes, self.axes, self.contract = student.shapes, student.axes, student.contract

    def shardings(self, mesh: Mesh) -> Params:
        """Those of the student."""
        return self.student.shardings(mesh)

    def bind(self, params: Params, teacher: Params) -> StudentAndTeacher:
        """Both networks, for `distillation_loss`; call it inside a jit."""
        return StudentAndTeacher(self.student.bind(params), self.teacher.bind(teacher))


def distillation_loss(
    nets: StudentAndTeacher,
    batch: Batch,
    key: jax.Array | None,
    *,
    temperature: float,
    weight: float,
    hidden_weight: float,
    chunk: int = 0,
) -> tuple[jax.Array, jax.Array, Metrics]:
    """(1 - weight) cross entropy + weight KL(teacher || student) + hidden_weight distance, by target.

    batch: tokens, targets, segment_ids, positions [B, T] int32. The distance is the mean squared
    difference of the last hidden states, which must be equally wide. chunk: as in `vocabulary_loss`.
    """
    inputs, segments, targets = (
        (batch["tokens"], batch["positions"]),
        batch["segment_ids"],
        batch["targets"],
    )
    hidden, context = nets.student(*inputs, text_context(nets.student, batch, key))
    wanted = jax.lax.stop_gradient(nets.teacher(*inputs, FullContext(segments))[0])

    def sums(hidden, wanted, targets):
        ours = nets.student.unembed(hidden)
        theirs = jax.lax.stop_gradient(nets.teacher.unembed(wanted))
        text = cross_entropy(ours, targets).sum()
        divergence = distillation_kl(ours, theirs, targets, temperature=temperature).sum()
        return text, divergence, jnp.sum(targets >= 0, dtype=jnp.float32)

    text, divergence, count = sum_over_chunks(sums, (hidden, wanted, targets), chunk)
    loss = (1.0 - weight) * text + weight * divergence
    balance, metrics = router_loss(nets.student, context, count)
    loss += balance
    metrics |= {"text_loss": (text, count), "divergence": (divergence, count)}
    if hidden_weight:
        squares = jnp.square(hidden.astype(jnp.float32) - wanted.astype(jnp.float32)).mean(axis=-1)
        distance = jnp.sum(jnp.where(targets >= 0, squares, 0.0))
        loss += hidden_weight * distance
        metrics["hidden_distance"] = (distance, count)
    return loss, count, metrics
