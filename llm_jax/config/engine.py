"""Settings of the inference engine."""

import dataclasses

from llm_jax.config.checks import choice, require

CACHE_DTYPES = ("", "float32", "bfloat16", "int8", "float8_e4m3fn", "float8_e5m2")
SPECULATION = ("off", "prompt_lookup", "draft_model", "draft_head")


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Sizes and policy of an engine; each data shard of the mesh has so much of its own.

    Attributes:
        max_rows: sequences that run at once, at most.
        token_budget: new tokens of a step, at most; prompts longer than what decoding leaves of it come
            in chunks.
        max_length: tokens of a sequence, prompt and answer; 0 = what the model's positions allow.
        page_size: tokens of a page of keys and values.
        pages: of each pool (full attention, windows); () = as many as `memory_share` of the free memory
            holds, or as the rows can use.
        memory_share: of the memory that the device has free when the engine begins.
        cache_dtype: of keys and values; "" = the model's.
        max_queue: waiting requests; more are refused.
        prefix_cache: requests share the pages of a common beginning, also with earlier ones.
        preemption: what happens to a sequence when pages run out: "recompute" or "offload" to the host.
        host_pages: of each pool, for "offload".
        prefix_host_pages: of each pool, in host memory: the prefix cache moves there what it would
            forget, and back; 0 = it forgets. Offloaded sequences may take them.
        aging_s: seconds of waiting that are worth one priority.
        overlap: plan a step while the one before runs.
        speculation: "off"; "prompt_lookup": propose what followed the same words before; "draft_model":
            what a smaller LLM would write, "draft_head": a head on the model's own hidden states;
            these two the engine is given as `drafter`.
        draft_tokens: proposed at once, at most.
        prompt_logprobs: requests may ask for them; twice as many programs are compiled.
        strict_numerics: a token at a time, by the same code: what a request gets depends in no bit on
            the other requests, on how its prompt was cut, on the prefix cache or on speculation. Slow.
        adapters: LoRA adapters that run at once; 0 = none. More may be loaded: they take turns.
        adapter_rank: of each at most.
        adapter_targets: patterns of the weights that adapters may change; () = all of the layers.
        max_beams: of a beam search, at most; 0 = none. Each beam takes a row.
        compile_ahead: compile all programs when the engine begins; else each where it is first needed.
        trace: a file that all calls and decisions of the scheduler are written to, for
            scripts/replay.py; it has prompts and replies as ids. "" = none. Further data shards' go to
            files with .1, .2 ... after the name.
        seed: for requests that name none.
    """

    max_rows: int = 64
    token_budget: int = 512
    max_length: int = 0
    page_size: int = 32
    pages: tuple[int, ...] = ()
    memory_share: float = 0.8
    cache_dtype: str = ""
    max_queue: int = 1024
    prefix_cache: bool = True
    preemption: str = "recompute"
    host_pages: int = 0
    prefix_host_pages: int = 0
    aging_s: float = 10.0
    overlap: bool = True
    speculation: str = "off"
    draft_tokens: int = 8
    prompt_logprobs: bool = False
    strict_numerics: bool = False
    adapters: int = 0
    adapter_rank: int = 16
    adapter_targets: tuple[str, ...] = ()
    max_beams: int = 0
    compile_ahead: bool = True
    trace: str = ""
    seed: int = 0

    def __post_init__(self):
        sizes = ("max_rows", "token_budget", "page_size", "max_queue", "draft_tokens", "adapter_rank")
        for name in sizes:
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("max_length", "host_pages", "prefix_host_pages", "seed", "adapters"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(all(n >= 2 for n in self.pages), "pages", self.pages, "at least 2 of each pool")
        require(
            0 < self.memory_share <= 1, "memory_share", self.memory_share, "a share above 0, up to 1"
        )
        if self.trace and self.adapters:
            raise ValueError(
                f"trace={self.trace!r} with adapters={self.adapters}: decisions depend on the adapters' "
                "places, which a trace does not hold; leave one out"
            )
        require(
            0 <= self.max_beams <= self.max_rows,
            "max_beams",
            self.max_beams,
            f"0 to max_rows={self.max_rows}",
        )
        choice("cache_dtype", self.cache_dtype, CACHE_DTYPES)
        choice("speculation", self.speculation, SPECULATION)
