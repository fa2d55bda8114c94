"""Which rows a kernel takes at a time, by the sizes of the groups; written by its scalar unit.

A visit is up to `most` rows of one group. In HBM sixteen rows of bfloat16 share tiles, so a visit begins
at a multiple of 16, and rows of the groups before and after may lie in its first and last sixteen.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

UNIT = 16


class Visits(NamedTuple):
    """Of each visit, in SMEM: its group and how many visits that has; its first row; of the rows from
    there, the first of the group and the first that is not of the group any more.
    """

    group: Any
    count: Any
    first: Any
    inside: Any
    end: Any


def most_visits(rows: int, groups: int, most: int) -> int:
    """As many as there can be of `rows` rows in this many groups."""
    return groups + -(-(rows + (UNIT - 1) * groups) // most)


def write_visits(sizes: Any, visits: Visits, rows: int, most: int, empty: bool = False) -> Any:
    """Writes the visits of groups of these sizes (SMEM [E]), in order, and returns how many there are.

    Rows that belong to no group are visits of group E, the last ones. empty: a group without rows has
    one visit, of no rows, and group E has none; else it has none. rows, most: multiples of 16.
    """
    groups = sizes.shape[0]

    def of_group(group, state):
        count, start = state
        last = group == groups
        size = jnp.where(last, rows, sizes[jnp.minimum(group, groups - 1)])
        end = jnp.minimum(start + size, rows)
        low = start // UNIT * UNIT
        needed = jnp.where(end > start, (end - low + most - 1) // most, int(empty))

        def one(i, _):
            first = low + i * most
            visits.group[count + i] = group
            visits.count[count + i] = needed
            visits.first[count + i] = first
            visits.inside[count + i] = jnp.maximum(start - first, 0)
            visits.end[count + i] = jnp.minimum(end - first, most)

        lax.fori_loop(0, needed, one, None)
        return count + needed, end

    start = (jnp.int32(0), jnp.int32(0))
    return lax.fori_loop(0, groups + (0 if empty else 1), of_group, start)[0]
