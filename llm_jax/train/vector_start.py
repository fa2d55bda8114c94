"""First parameters whose token embeddings are word vectors of the training texts."""

import os
from collections.abc import Iterable
from pathlib import Path

import jax
import numpy as np
from jax.sharding import Mesh

from llm_jax.data.cooccurrence import cooccurrence_vectors
from llm_jax.distributed import main_first
from llm_jax.models import Model, Params, complete_params
from llm_jax.sharding import put
from llm_jax.tree import flatten

TABLE = "embed/tokens"


def vector_start(
    documents: Iterable[np.ndarray], model: Model, mesh: Mesh, workdir: Path, key: jax.Array
) -> Params:
    """Parameters of `model`: token embeddings [V, D] by `cooccurrence_vectors`, the others random.

    documents: token ids [T] int of each text. Process 0 finds the vectors and leaves them in
    WORKDIR/vectors.npy, float32, where all read them.
    """
    path, shape = workdir / "vectors.npy", flatten(model.shapes)[TABLE].shape
    with main_first("vectors"):
        if not path.is_file():
            part = path.with_suffix(".part.npy")
            np.save(part, cooccurrence_vectors(documents, *shape))
            os.replace(part, path)
    vectors = np.load(path)
    if vectors.shape != shape:
        raise ValueError(f"{path}: vectors {vectors.shape}; expected {shape}; remove it to count anew")
    known = {TABLE: put(vectors, flatten(model.shardings(mesh))[TABLE])}
    return complete_params(known, model, mesh, key)[0]
