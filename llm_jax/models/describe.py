"""A model without its arrays: structure, shapes, logical axes; and how parameters are born.

`describe(config)` allocates nothing. From there on parameters are a plain nested dict, which every
jitted step takes as an argument and opens with `model.bind(params)`, an act of trace time only.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from llm_jax.config import ModelConfig
from llm_jax.models.transformer import Transformer
from llm_jax.sharding import shardings
from llm_jax.tree import flatten, unflatten

Params = dict[str, Any]  # nested; every leaf under "layers" leads with the layer axis


@dataclasses.dataclass(frozen=True, eq=False)
class Model:
    """What there is to know of a model before it has parameters. Holds no arrays."""

    config: ModelConfig
    graphdef: nnx.GraphDef
    shapes: Params  # ShapeDtypeStruct in the parameter dtype; to serve, as `key_heads.served` has them
    axes: Params  # logical axis names, a tuple for each leaf
    contract: Params  # the axes that products sum over, a tuple for each leaf

    def bind(self, params: Params) -> Transformer:
        """The modules with these parameters in them; call it inside a jit."""
        return nnx.merge(self.graphdef, params)

    def shardings(self, mesh: Mesh) -> Params:
        """NamedSharding of every parameter on `mesh`."""
        return shardings(self.axes, self.shapes, mesh)


class Trainable(Protocol):
    """What training needs of a model: a `Model`, or what stands for one (`LoraModel`)."""

    @property
    def shapes(self) -> Params: ...

    @property
    def axes(self) -> Params: ...

    @property
    def contract(self) -> Params: ...

    def shardings(self, mesh: Mesh) -> Params:
        """NamedSharding of every parameter that is trained."""
        ...

    def bind(self, params: Params, *frozen: Params) -> Any:
        """What an objective calls, with these parameters and those that are not trained in it."""
        ...


@functools.lru_cache(maxsize=64)
def describe(config: ModelConfig) -> Model:
    """Model of a config, with nothing allocated; unset dtypes take the backend's default."""
    config = config.with_dtypes(jax.default_backend())
    return Model(config, *outline(lambda rngs: Transformer(config, rngs=rngs), config.param_dtype))


def outline(
    build: Callable[[nnx.Rngs], nnx.Module], dtype: str
) -> tuple[nnx.GraphDef, Params, Params, Params]:
    """(graphdef, shapes in `dtype`, axes, contract) of what `build` makes, with nothing allocated."""
    graphdef, state = nnx.split(nnx.eval_shape(lambda: build(nnx.Rngs(0))))

    def metadata(name):
        is_variable = lambda v: isinstance(v, nnx.Variable)  # noqa: E731
        values = jax.tree.map(lambda v: v.get_metadata(name), state, is_leaf=is_variable)
        return nnx.to_pure_dict(values)

    shape = lambda s: jax.ShapeDtypeStruct(s.shape, jnp.dtype(dtype))  # noqa: E731
    shapes = jax.tree.map(shape, nnx.to_pure_dict(state))
    return graphdef, shapes, metadata("axes"), metadata("contract")


def init_params(model: Model, mesh: Mesh, key: jax.Array) -> Params:
    """Random parameters born on their shards: no device ever holds the whole tree."""
    with jax.set_mesh(mesh):
        return _make_params(model, mesh)(key)


@functools.lru_cache(maxsize=64)
def _make_params(model: Model, mesh: Mesh) -> Callable[[jax.Array], Params]:
    """The jitted function of `init_params`, compiled once for a model and a mesh."""
    build = lambda rngs: Transformer(model.config, rngs=rngs)  # noqa: E731
    return make_draw(build, model.shapes, model.shardings(mesh))


def make_draw(
    build: Callable[[nnx.Rngs], nnx.Module], shapes: Params, places: Params
) -> Callable[[jax.Array], Params]:
    """f(key) -> the parameters that `build` draws, in the dtypes of `shapes`, born on `places`."""

    def make(key):
        params = nnx.to_pure_dict(nnx.split(build(nnx.Rngs(key)))[1])
        return jax.tree.map(lambda p, s: p.astype(s.dtype), params, shapes)

    return jax.jit(make, out_shardings=places)


def complete_params(
    known: Mapping[str, jax.Array],
    model: Model,
    mesh: Mesh,
    key: jax.Array,
    *,
    dtype: str | None = None,
) -> tuple[Params, list[str]]:
    """`known` parameters (path -> array) and the others of `model`, drawn; the paths of those.

    What is drawn has the value that `init_params` gives it from the same key; nothing else is made.
    dtype: of what is drawn; the model's parameter dtype when not given.
    """
    shapes, places = flatten(model.shapes), flatten(model.shardings(mesh))
    lacking = [path for path in shapes if path not in known]

    def make(key):
        params = flatten(nnx.to_pure_dict(nnx.split(Transformer(model.config, rngs=nnx.Rngs(key)))[1]))
        return {path: params[path].astype(dtype or shapes[path].dtype) for path in lacking}

    with jax.set_mesh(mesh):
        drawn = jax.jit(make, out_shardings={path: places[path] for path in lacking})(key)
    return unflatten({path: drawn[path] if path in drawn else known[path] for path in shapes}), lacking
