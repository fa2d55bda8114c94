"""Token stores of documents that a test makes up."""

import numpy as np

from llm_jax.data.token_store import EVAL, TRAIN, SplitWriter, id_dtype, open_store, write_manifest
from llm_jax.data.tokenizer import ByteTokenizer


def write_store(directory, train, held_out=(), *, tokenizer=None, shard_tokens=1 << 20):
    """The store of these documents, lists of ids, in a new directory."""
    tokenizer = tokenizer or ByteTokenizer()
    directory.mkdir(parents=True)
    splits = {}
    for name, documents in ((TRAIN, train), (EVAL, held_out)):
        writer = SplitWriter(directory, name, id_dtype(tokenizer.vocab_size), shard_tokens)
        for document in documents:
            writer.add(np.asarray(document, np.int32), 4 * len(document))
        split = writer.finish()
        if split.documents:
            splits[name] = split
    tokenizer.save(directory / "tokenizer")
    write_manifest(directory, tokenizer, splits)
    return open_store(directory)
