"""A quote: what a workload needs and how fast it runs on a slice, from its compiled steps."""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

from llm_jax.models import describe
from llm_jax.models.cost import forward_flops
from llm_jax.plan.kernels import Traffic, kernel_cost
from llm_jax.plan.steps import device_bytes, mesh_on, serving_arrays, training_arrays
from llm_jax.plan.workload import Workload, chips, devices, price_of
from llm_jax.sharding import data_shards
from llm_jax.tpu.chips import chip_of
from llm_jax.tpu.compile import WITHOUT_CODE, CompileError, Program, compile_for
from llm_jax.tpu.hlo import Loop, Operation, each, operations, read_module
from llm_jax.tpu.links import Slice
from llm_jax.tpu.timing import Assumptions, Timeline, time_program

# As the compiler says that a program does not fit: what is too large, or its temporaries alone.
NO_ROOM = ("memory space hbm", "CompileTimeHbmOom")
RESERVED = 256 << 20  # bytes of HBM that the runtime keeps (v5e: 15.75 of 16 GiB are left)
# What the engine's host needs for a step, and of that for each row, measured: see docs/plan.md.
HOST_S, HOST_ROW_S = 400e-6, 7e-6


@dataclasses.dataclass(frozen=True)
class StepQuote:
    """One step on each device.

    limit: "compute", "memory", "interconnect", "overhead" or "host". by_limit: seconds that go to each.
    mfu: of the bfloat16 peak, by the operations that the model needs; hbm_share: of HBM's bandwidth.
    collectives: of each kind, how many and how many bytes a step. argument_bytes: of the arrays that the
    step is given, as the compiler counts them; 0 on paper, as are code_bytes and compile_s.
    """

    name: str
    seconds: float
    limit: str
    by_limit: dict[str, float]
    tokens: int
    mfu: float
    hbm_share: float
    collectives: dict[str, dict[str, float]]
    argument_bytes: int
    temp_bytes: int
    code_bytes: int
    compile_s: float
    longest: tuple[tuple[float, int, str], ...]
    unknown_kernels: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Quote:
    """What is said of a workload on a slice with a mesh; times are a model's, see docs/plan.md.

    hbm_bytes: of the fullest device by category; free_bytes: what is left, negative where it does not
    fit. refused: what the compiler said where it does not. paper: by `paper.estimate`, not compiled.
    """

    workload: Workload
    topology: str
    mesh: str
    fits: bool
    hbm_bytes: dict[str, int]
    hbm_limit: int
    free_bytes: int
    steps: dict[str, StepQuote]
    prefill_s: float | None = None
    decode_step_s: float | None = None
    train_step_s: float | None = None
    tokens_per_s_per_sequence: float | None = None
    tokens_per_s: float | None = None
    tokens_per_s_per_chip: float | None = None
    limit: str | None = None
    usd_per_hour: float | None = None
    usd_per_million_tokens: float | None = None
    usd_per_million_prompt_tokens: float | None = None
    advice: str = ""
    refused: str = ""
    paper: bool = False

    def record(self) -> dict[str, Any]:
        """As JSON holds it; the collectives of the step that decides the speed stand at the top too."""
        main = self.steps.get("decode") or self.steps.get("train") or self.steps.get("prefill")
        return dataclasses.asdict(self) | {"collectives": main.collectives if main else {}}


def quote(
    work: Workload,
    topology: str,
    mesh: str,
    steps: Sequence[str] = ("prefill", "decode"),
    *,
    assumptions: Assumptions = Assumptions(),  # noqa: B008 (frozen)
    timeout_s: float = 1800.0,
) -> Quote:
    """Compile the steps for the slice and say what they need and take.

    mesh: as --mesh has it; its sizes must make up all devices of the slice. Raises ValueError for a mesh
    that does not, or a workload that the mesh cannot split, and where libtpu is missing.
    """
    memory = arrays_of(work, topology, mesh, steps)
    partial = functools.partial(conclude, work, topology, mesh, memory)
    if sum(memory.values()) > hbm_limit(topology):
        return partial({}, "")
    found: dict[str, StepQuote] = {}
    names = [name for step in steps for name in ((step, "choose") if step == "decode" else (step,))]
    for name in names:
        order = {"workload": dataclasses.asdict(work), "mesh": mesh}
        try:
            target = f"llm_jax.plan.steps:{name}"
            program = compile_for(target, topology, order, flags=WITHOUT_CODE, timeout_s=timeout_s)
        except CompileError as error:
            if not any(words in str(error) for words in NO_ROOM):
                raise
            return partial(found, str(error))
        found[name] = _step(name, work, program, mesh, assumptions)
    return partial(found, "")


def hbm_limit(topology: str) -> int:
    """Bytes of HBM that programs may use on a device."""
    return chip_of(topology).hbm_bytes - RESERVED


def arrays_of(work: Workload, topology: str, mesh: str, steps: Sequence[str]) -> dict[str, int]:
    """Bytes of one device by category, before anything is compiled.

    Raises ValueError for a mesh that does not make up the slice, or cannot split the model.
    """
    on = mesh_on(topology, mesh)
    if on.size != devices(topology):
        raise ValueError(
            f"mesh={mesh!r} has {on.size} devices, topology={topology!r} {devices(topology)}: their "
            "product must be that"
        )
    needs: dict[str, int] = {}
    if "train" in steps:
        _, _, state = training_arrays(work, on)
        needs["weights"] = device_bytes(state.params)
        needs["optimizer"] = device_bytes((state.opt_state, state.ema))
    if set(steps) - {"train"}:
        _, params, cache = serving_arrays(work, on)
        served = {"weights": device_bytes(params), "cache": device_bytes(cache)}
        needs = {name: max(needs.get(name, 0), served.get(name, 0)) for name in needs | served}
    return needs


def _step(name: str, work: Workload, program: Program, mesh: str, assumed: Assumptions) -> StepQuote:
    module = operations(read_module(program.text("hlo.txt")))
    line = time_step(name, work, program, module, assumed)
    return step_quote(
        name,
        work,
        program.topology,
        mesh,
        line,
        module,
        argument_bytes=program.memory["argument_size_in_bytes"],
        temp_bytes=program.memory["temp_size_in_bytes"],
        code_bytes=program.memory["generated_code_size_in_bytes"],
        compile_s=program.compile_s,
    )


def step_quote(
    name: str,
    work: Workload,
    topology: str,
    mesh: str,
    line: Timeline,
    module: tuple[Operation | Loop, ...],
    **rest: Any,
) -> StepQuote:
    """What is said of a step that takes this time. rest: of `StepQuote`, what is known already."""
    chip, on = chip_of(topology), mesh_on(topology, mesh)
    tokens, seen = _tokens(name, work, data_shards(on))
    flops = 0.0
    if name != "choose":
        flops = forward_flops(describe(work.config), tokens, seen) * (3 if name == "train" else 1)
    collectives: dict[str, dict[str, float]] = {}
    for operation, times in each(module):
        if operation.collective is not None:
            entry = collectives.setdefault(operation.collective.kind, {"count": 0, "bytes": 0.0})
            entry["count"] += times
            entry["bytes"] += times * operation.collective.bytes
    limits = dict(sorted(line.by_limit.items(), key=lambda item: -item[1]))
    return StepQuote(
        name=name,
        seconds=line.seconds,
        limit=line.limit,
        by_limit=limits,
        tokens=tokens,
        mfu=flops / (line.seconds * chip.peak_flops * on.size),
        hbm_share=line.hbm_bytes / (line.seconds * chip.hbm_bandwidth),
        collectives=collectives,
        longest=tuple(line.operations[:8]),
        unknown_kernels=tuple(sorted(line.unknown)),
        **rest,
    )


def time_step(
    name: str, work: Workload, program: Program, module: tuple, assumed: Assumptions
) -> Timeline:
    """The time model of a compiled step at the workload's lengths."""
    cost = functools.partial(kernel_cost, generation=program.chip.name, traffic=traffic_of(work, name))
    place = Slice(program.topology, program.coords)
    return time_program(module, program.chip, place, cost, assumed)


def traffic_of(work: Workload, name: str) -> Traffic:
    """What the kernels of a step see: single tokens the whole context, prompts half of it on average.

    A step of prompts has room for single tokens too, but none in it.
    """
    config = work.config
    single = 0 if name == "prefill" else work.context
    experts = (config.num_experts, config.experts_per_token)
    return Traffic(single, work.context / 2, config.layer_windows, *experts)


def _tokens(name: str, work: Workload, shards: int) -> tuple[int, int]:
    """(tokens of a step on all devices, keys that each sees)."""
    match name:
        case "train":
            return work.batch * work.context, work.context // 2
        case "prefill":
            of_shard = min(work.prefill_tokens, work.rows(shards) * work.context)
            return shards * of_shard, work.context // 2
        case _:
            return shards * work.rows(shards), work.context


def conclude(
    work: Workload,
    topology: str,
    mesh: str,
    memory: dict[str, int],
    found: dict[str, StepQuote],
    refused: str,
) -> Quote:
    """What follows from the bytes of arrays, the steps that compiled, and what the compiler refused."""
    needs, limit = dict(memory), hbm_limit(topology)
    if found:
        needs["temporaries"] = max(step.temp_bytes for step in found.values())
        needs["programs"] = sum(step.code_bytes for step in found.values())
    used = sum(needs.values())
    fits = bool(found) and not refused and used <= limit
    rate = price_of(topology)
    hourly = None if rate is None else rate * chips(topology)
    shards = data_shards(mesh_on(topology, mesh))
    values: dict[str, Any] = {"usd_per_hour": hourly}
    decode, prefill, train = (found.get(name) for name in ("decode", "prefill", "train"))
    if prefill is not None:
        values["prefill_s"] = prefill.seconds * work.prefill_steps(shards)
        read = shards * work.rows(shards) * work.context
        values["usd_per_million_prompt_tokens"] = _usd(hourly, read / values["prefill_s"])
    if decode is not None:
        device = decode.seconds + found["choose"].seconds if "choose" in found else decode.seconds
        step = max(device, HOST_S + HOST_ROW_S * decode.tokens)
        values |= {"decode_step_s": step, "tokens_per_s_per_sequence": 1 / step}
        values |= _speed(decode.tokens / step, topology, hourly)
        values["limit"] = "host" if step > device else decode.limit
    if train is not None:
        values["train_step_s"] = train.seconds
        if decode is None:
            values |= _speed(train.tokens / train.seconds, topology, hourly)
            values["limit"] = train.limit
    elif decode is None and prefill is not None:
        values["limit"] = prefill.limit
    advice = "" if fits else _advice(work, topology, needs, limit, refused)
    return Quote(
        work,
        topology,
        mesh,
        fits,
        needs,
        limit,
        limit - used,
        found,
        **values,
        advice=advice,
        refused=refused,
    )


def _speed(tokens_per_s: float, topology: str, hourly: float | None) -> dict[str, float | None]:
    return {
        "tokens_per_s": tokens_per_s,
        "tokens_per_s_per_chip": tokens_per_s / chips(topology),
        "usd_per_million_tokens": _usd(hourly, tokens_per_s),
    }


def _usd(hourly: float | None, tokens_per_s: float) -> float | None:
    return None if hourly is None else hourly / 3600 / tokens_per_s * 1e6


def _advice(work: Workload, topology: str, needs: dict[str, int], limit: int, refused: str) -> str:
    """By how much it does not fit, and what to change."""
    over = sum(needs.values()) - limit
    largest = max(needs, key=lambda name: needs[name])
    gib = lambda n: f"{n / (1 << 30):.1f} GiB"  # noqa: E731
    what = {
        "weights": "a larger tensor or fsdp axis, or more chips",
        "cache": "a smaller batch or context, cache=int8, or a larger data axis",
        "optimizer": "a larger fsdp axis, optimizer=adafactor or lion, or more chips",
        "temporaries": "fewer prefill_tokens, or a smaller batch",
        "programs": "fewer steps",
    }[largest]
    if over > 0:
        return f"{gib(over)} more than the {gib(limit)} of a device: most are {largest}, so take {what}"
    temporaries = re.search(r"HLO temporaries \(([\d.]+)G\)", refused)
    if temporaries:
        less = "shorter or fewer sequences for each device: a larger data, fsdp or context axis"
        return f"the temporaries of a compiled step alone are {temporaries[1]} GiB: take {less}"
    said = re.search(r"Exceeded hbm capacity by ([\d.]+\w)", refused)
    more = f"by {said[1]}" if said else "by its temporaries"
    return f"the compiled step does not fit ({more}): most are {largest}, so take {what}"
