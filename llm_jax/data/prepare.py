"""From texts to a token store: clean, drop duplicates, split, tokenize; by several processes.

What a document becomes does not depend on the number of processes: they clean, hash and tokenize, and
one process decides in the order of the documents which are kept.
"""

import collections
import concurrent.futures
import dataclasses
import functools
import hashlib
import logging
import multiprocessing
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import TypeVar

import numpy as np

from llm_jax.config import nearest
from llm_jax.data.cleaning import Step, clean, parse_steps
from llm_jax.data.duplicates import NearDuplicates, digest, signature
from llm_jax.data.tasks import documents
from llm_jax.data.token_store import EVAL, TRAIN, SplitWriter, TokenStore, id_dtype, open_store
from llm_jax.data.token_store import write_manifest as write_store_manifest
from llm_jax.data.tokenizer import Tokenizer, load_tokenizer

_LOG = logging.getLogger(__name__)
T, R = TypeVar("T"), TypeVar("R")

DEDUP = ("none", "exact", "near")
SHARD_TOKENS = 1 << 28
_CHUNK = 1 << 18  # characters that a process gets at a time
_EXACT, _NEAR, _EMPTY = "exact duplicate", "near duplicate", "no tokens"


@dataclasses.dataclass(frozen=True)
class Plan:
    """How texts become documents of a store."""

    clean: tuple[str, ...]  # steps of data/cleaning.py
    dedup: str  # "none", "exact" (equal once normalized) or "near" (similar ones as well)
    near_threshold: float  # Jaccard similarity of character 5-grams
    eval_fraction: float  # of the different texts, held out
    seed: int  # of what is held out

    def __post_init__(self):
        parse_steps(self.clean)
        if self.dedup not in DEDUP:
            raise ValueError(
                f"dedup={self.dedup!r}: expected one of {DEDUP}{nearest(self.dedup, DEDUP)}"
            )
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction={self.eval_fraction}: expected 0 (none) or more, below 1")
        if not 0 <= self.seed < 1 << 64:
            raise ValueError(f"seed={self.seed}: expected 0 to 2**64 - 1")
        NearDuplicates(self.near_threshold)


@dataclasses.dataclass(frozen=True)
class _Document:
    """One text as a worker hands it back."""

    tokens: np.ndarray  # [T], of the store's dtype
    size: int  # bytes of the text
    digest: bytes
    signature: np.ndarray | None  # where near duplicates are looked for


def prepare(
    texts: Iterable[str],
    tokenizer: str | Path,
    output: str | Path,
    plan: Plan,
    *,
    workers: int = 0,
    shard_tokens: int = SHARD_TOKENS,
) -> tuple[TokenStore, dict[str, dict[str, int]]]:
    """Write a store of `texts` to the directory `output`; (store, report).

    report: documents {"read", "kept"}, how many each step of cleaning {"changed"}, and how many it or
    the search for duplicates {"removed"}. workers: processes besides this one, 0 = none.

    The store appears under its name when it is whole. What a run that was cut off left under
    OUTPUT.partial is thrown away by the next. ValueError when `output` exists, or nothing is kept.
    """
    output = Path(output)
    if output.exists():
        raise ValueError(f"output={output} exists already; remove it, or choose another directory")
    loaded = load_tokenizer(tokenizer)
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists():
        _LOG.warning("%s is of a run that was cut off; starting anew", partial)
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    try:
        report = _fill(partial, texts, tokenizer, loaded, plan, workers, shard_tokens)
        os.rename(partial, output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return open_store(output), report


def _fill(
    directory: Path,
    texts: Iterable[str],
    path: str | Path,
    tokenizer: Tokenizer,
    plan: Plan,
    workers: int,
    shard_tokens: int,
) -> dict[str, dict[str, int]]:
    dtype = id_dtype(tokenizer.vocab_size)
    writers = {name: SplitWriter(directory, name, dtype, shard_tokens) for name in (TRAIN, EVAL)}
    counts, changed, removed = Counter(), Counter(), Counter()
    keep = _Duplicates(plan)
    for found, done, gone in _in_order(_chunks(texts), path, plan, workers):
        changed.update(done)
        removed.update(gone)
        counts["read"] += len(found) + sum(gone.values())
        for document in found:
            reason = keep.reason_to_drop(document)
            if reason:
                removed[reason] += 1
                continue
            counts["kept"] += 1
            side = EVAL if held_out(document.digest, plan.eval_fraction, plan.seed) else TRAIN
            writers[side].add(document.tokens, document.size)
    splits = {name: writer.finish() for name, writer in writers.items()}
    if not splits[TRAIN].documents or (plan.eval_fraction and not splits[EVAL].documents):
        sides = {name: split.documents for name, split in splits.items()}
        raise ValueError(
            f"of {counts['read']} documents {counts['kept']} were kept, {sides}; removed: "
            f"{dict(removed)}. Expected some on each side: clean less, or change eval_fraction or seed"
        )
    report = {"documents": dict(counts), "changed": dict(changed), "removed": dict(removed)}
    tokenizer.save(directory / "tokenizer")
    whole = {name: split for name, split in splits.items() if split.documents}
    write_store_manifest(directory, tokenizer, whole, plan=dataclasses.asdict(plan), report=report)
    return report


def held_out(digest: bytes, fraction: float, seed: int) -> bool:
    """Whether a text of this digest is held out: decided by it and the seed alone."""
    rank = hashlib.blake2b(digest, digest_size=8, salt=seed.to_bytes(8, "little")).digest()
    return int.from_bytes(rank, "little") < fraction * 2**64


class _Duplicates:
    """What was kept, as far as the plan asks for it."""

    def __init__(self, plan: Plan):
        self._digests: set[bytes] | None = None if plan.dedup == "none" else set()
        self._near = NearDuplicates(plan.near_threshold)

    def reason_to_drop(self, document: _Document) -> str:
        """ "" for a document that is to be kept, which is remembered."""
        if self._digests is None:
            return ""
        if document.digest in self._digests:
            return _EXACT
        self._digests.add(document.digest)
        near = document.signature is not None and not self._near.add(document.signature)
        return _NEAR if near else ""


def _chunks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Lists of texts of about `_CHUNK` characters."""
    chunk, size = [], 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


_Done = tuple[list[_Document], Counter, Counter]  # documents; steps that changed, that removed one


def _in_order(
    chunks: Iterable[list[str]], path: str | Path, plan: Plan, workers: int
) -> Iterator[_Done]:
    """`_work` of all chunks in their order, by so many processes, none far ahead of what is taken."""
    if workers == 0:
        tokenizer, steps = load_tokenizer(path), parse_steps(plan.clean)
        yield from (_work(chunk, tokenizer, steps, plan.dedup == "near") for chunk in chunks)
        return
    context = multiprocessing.get_context("spawn")  # as this process may hold threads, of JAX say
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        under_way = collections.deque()
        try:
            for chunk in chunks:
                under_way.append(pool.submit(_work_there, chunk, path, plan))
                if len(under_way) > 2 * workers:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        except BrokenProcessPool as error:
            reason = "one of them died, as for lack of memory; take fewer"
            raise MemoryError(f"workers={workers}: {reason}") from error
        finally:
            pool.shutdown(cancel_futures=True)


def _work_there(chunk: Sequence[str], path: str | Path, plan: Plan) -> _Done:
    return _work(chunk, _tokenizer(path), parse_steps(plan.clean), plan.dedup == "near")


_tokenizer: Callable[[str | Path], Tokenizer] = functools.lru_cache(maxsize=1)(load_tokenizer)


def _work(texts: Sequence[str], tokenizer: Tokenizer, steps: Sequence[Step], near: bool) -> _Done:
    """Clean, hash and tokenize."""
    changed, removed, kept = Counter(), Counter(), []
    dtype = id_dtype(tokenizer.vocab_size)
    for given in texts:
        text, did = clean(given, steps)
        if text is None:
            removed[did.pop()] += 1
        changed.update(did)
        if text is None:
            continue
        (tokens,) = documents([text], tokenizer.encode, tokenizer.eos_id)
        if not tokens.size:
            removed[_EMPTY] += 1
            continue
        mark = signature(text) if near else None
        kept.append(_Document(tokens.astype(dtype), len(text.encode()), digest(text), mark))
    return kept, changed, removed
