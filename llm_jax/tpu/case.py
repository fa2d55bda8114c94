"""What there is to compile: a function and its arguments, with the values that steer its kernels.

    def my_kernel(block=512) -> Case:
        x = jax.ShapeDtypeStruct((4096, 4096), jnp.bfloat16)
        return Case(functools.partial(matmul, block=block), (x, x), flops=2 * 4096**3)

A kernel's loops may depend on integers that it is given: lengths, page tables, masks. Such an argument
is a numpy array instead of a shape. `kernel_integers` finds what reaches each kernel from there.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.extend import core

Integers = dict[int, np.ndarray]  # of one kernel: operand -> values


@dataclasses.dataclass(frozen=True)
class Case:
    """A function to compile for a TPU, jitted or not, and what it is to be judged by.

    args: trees of `jax.ShapeDtypeStruct` or numpy arrays; those with a sharding are placed by it, the
    others whole on the first device. flops and hbm_bytes: what the result needs at least, from which the
    shares of peak are taken; 0 = not known. options: of the compiler, by name.
    """

    function: Callable[..., Any]
    args: tuple[Any, ...]
    flops: float = 0.0
    hbm_bytes: float = 0.0
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


def kernel_integers(function: Callable[..., Any], args: tuple[Any, ...]) -> list[tuple[str, Integers]]:
    """(name, its integer operands whose values are known) of every Pallas kernel, in the order of the
    program.

    Known is what follows from the arrays among `args` and from constants; it is computed here, on the
    CPU.
    """
    closed = jax.make_jaxpr(function)(*args)
    known = [x if isinstance(x, np.ndarray) else None for x in jax.tree.leaves(args)]
    found: list[tuple[str, Integers]] = []
    _evaluate(closed.jaxpr, closed.consts, known, found)
    return found


def _evaluate(jaxpr: Any, consts: Any, args: list[Any], found: list[tuple[str, Integers]]) -> list[Any]:
    """The values of a jaxpr's results, None where not known; kernels are added to `found`."""
    values: dict[Any, Any] = dict(zip(jaxpr.constvars, consts, strict=True))
    values |= dict(zip(jaxpr.invars, args, strict=True))

    def read(atom: Any) -> Any:
        return atom.val if isinstance(atom, core.Literal) else values.get(atom)

    for eqn in jaxpr.eqns:
        inputs = [read(atom) for atom in eqn.invars]
        if eqn.primitive.name == "pallas_call":
            integers = {
                i: np.asarray(x)
                for i, x in enumerate(inputs)
                if x is not None and np.issubdtype(np.asarray(x).dtype, np.integer)
            }
            found.append((_kernel_name(eqn.params), integers))
            continue
        if all(x is not None for x in inputs) and not _of_a_mesh(eqn) and not _is_large(eqn):
            outputs = _run(eqn, inputs)
        else:
            outputs = [None] * len(eqn.outvars)
            inner = list(_inner(eqn.params))
            for (
                sub
            ) in inner:  # a call hands its arguments on; a loop's body is only searched for kernels
                fits = len(inner) == 1 and len(sub.jaxpr.invars) == len(inputs)
                called = (
                    inputs if fits and eqn.primitive.name in CALLS else [None] * len(sub.jaxpr.invars)
                )
                results = _evaluate(sub.jaxpr, sub.consts, called, found)
                if eqn.primitive.name in CALLS and len(results) == len(outputs):
                    outputs = results
        values.update(zip(eqn.outvars, outputs, strict=True))
    return [read(atom) for atom in jaxpr.outvars]


def _of_a_mesh(eqn: Any) -> bool:
    """Whether an equation asks which device runs it, or another device: it has no one value."""
    return eqn.primitive.name in ON_MESH


def _is_large(eqn: Any) -> bool:
    """Whether an equation makes more than steers a kernel, as the numbers of all logits of a batch."""
    return any(math.prod(x.aval.shape) > LARGEST for x in eqn.outvars)


LARGEST = 1 << 24  # numbers
ON_MESH = ("axis_index", "psum", "psum_invariant", "pmax", "pmin", "ppermute", "all_gather")
ON_MESH += ("all_to_all", "reduce_scatter", "shard_map")


def _run(eqn: Any, inputs: list[Any]) -> list[Any]:
    """The results of one equation."""
    bound = eqn.primitive.get_bind_params(eqn.params)
    functions, params = bound if isinstance(bound, tuple) else ((), bound)  # the latter as of jax 0.10
    outputs = eqn.primitive.bind(*functions, *inputs, **params)
    return list(outputs) if eqn.primitive.multiple_results else [outputs]


CALLS = (
    "pjit",
    "jit",
    "closed_call",
    "core_call",
    "custom_jvp_call",
    "custom_vjp_call",
    "remat",
    "checkpoint",
)


def _inner(params: dict[str, Any]) -> Iterator[Any]:
    """The closed jaxprs among the parameters of an equation."""
    for value in params.values():
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, core.ClosedJaxpr):
                yield x
            elif isinstance(x, core.Jaxpr):
                yield core.ClosedJaxpr(x, [None] * len(x.constvars))


def _kernel_name(params: dict[str, Any]) -> str:
    """The name that the kernel has in the compiled program, but for the number at its end."""
    info = params.get("name_and_src_info") or params["jaxpr"].debug_info
    name = params.get("name") or getattr(info, "name", None) or getattr(info, "func_name", "kernel")
    return str(name)
