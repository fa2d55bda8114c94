"""What scripts/benchmark.py can measure, beside whom, and which flags a case has no use for."""

from collections.abc import Mapping, Sequence
from typing import Any

from llm_jax.bench import generation_cases, serving_cases
from llm_jax.bench.peers import STATIC
from llm_jax.bench.runtimes import RUNTIMES

CASES = generation_cases.CASES | serving_cases.CASES
_SEVERAL = ("decode", "prefill")  # which take turns with any number of peers
PEERS: dict[str, tuple[str, ...]] = {
    "train": ("torch", "torch_compile"),
    "mixed_traffic": ("transformers",),
    "bandwidth": ("machine",),
    **dict.fromkeys(_SEVERAL, ("transformers", STATIC, *RUNTIMES)),
}
PEERS |= {case: ("llm_jax",) for case in (*serving_cases.CASES, "drafters") if case not in PEERS}
OF_CASE = {  # flag: the cases that have it
    "mesh": ("train",),
    "plot": ("arrivals",),
    "draft_head": ("drafters",),
    "draft_model": ("drafters",),
    "dtype": tuple(CASES),
    "weights": (*_SEVERAL, *serving_cases.CASES),
}


def check_flags(case: str, peers: Sequence[str], given: Mapping[str, Any]) -> None:
    """Raises ValueError for peers that the case has not, and for flags of other cases.

    given: what each flag of `OF_CASE` says.
    """
    if set(peers) - set(PEERS[case]) or (peers[1:] and case not in _SEVERAL):
        raise ValueError(f"--peer={','.join(peers)}: expected one of {PEERS[case]} with --case={case}")
    for name, cases in OF_CASE.items():
        if given[name] and case not in cases:
            raise ValueError(f"--{name}={given[name]}: only --case={'|'.join(cases)} has it")
