"""Skip-gram word vectors: two tables, which training takes as it takes a transformer.

A word has one vector as the centre of a window and another one as a neighbour in it (Mikolov et al.
2013, arXiv:1310.4546). The first are the word vectors; the second are needed for training only.

Letters: V vocab, D embed.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from llm_jax.models.describe import Params
from llm_jax.sharding import shardings


class WordTables(NamedTuple):
    """The two vectors of each word."""

    centers: jax.Array  # [V, D]
    contexts: jax.Array  # [V, D]


@dataclasses.dataclass(frozen=True)
class SkipGram:
    """What there is to know of the tables before they have numbers; see `models.Trainable`."""

    vocab_size: int
    embed_dim: int

    @property
    def shapes(self) -> Params:
        """ShapeDtypeStruct of each table, float32."""
        shape = jax.ShapeDtypeStruct((self.vocab_size, self.embed_dim), jnp.float32)
        return WordTables(shape, shape)._asdict()

    @property
    def axes(self) -> Params:
        """Logical axis names."""
        return WordTables(("vocab", "embed"), ("vocab", "embed"))._asdict()

    @property
    def contract(self) -> Params:
        """Rows are looked up, so no product sums over an axis of a whole table."""
        return WordTables((), ())._asdict()

    def shardings(self, mesh: Mesh) -> Params:
        """NamedSharding of both tables on `mesh`."""
        return shardings(self.axes, self.shapes, mesh)

    def bind(self, params: Params) -> WordTables:
        """The tables as an objective takes them."""
        return WordTables(**params)

    def init(self, mesh: Mesh, key: jax.Array) -> Params:
        """First numbers, born on their shards: centres uniform in +-0.5 / D, neighbours 0."""

        def make(key):
            shape = (self.vocab_size, self.embed_dim)
            reach = 0.5 / self.embed_dim
            centers = jax.random.uniform(key, shape, jnp.float32, -reach, reach)
            return WordTables(centers, jnp.zeros(shape, jnp.float32))._asdict()

        return jax.jit(make, out_shardings=self.shardings(mesh))(key)
