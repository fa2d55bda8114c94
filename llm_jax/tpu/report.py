"""Reports as people read them: one program in full, several side by side."""

from collections.abc import Iterator, Sequence

from llm_jax.tpu.chips import chip_of
from llm_jax.tpu.profile import KernelReport, Report

TOP = 6  # loops and operations that are shown
MIB = 1 << 20


def text(report: Report) -> str:
    """All that is known about one program."""
    chip = chip_of(report.topology)
    options = ", ".join(f"{name}={value}" for name, value in report.arguments.items())
    lines = [
        f"{report.target}({options}) for {report.topology}: {chip.clock / 1e9:.2f} GHz, "
        f"{chip.peak_flops / 1e12:.0f} bfloat16 TFLOP/s, {chip.hbm_bandwidth / 1e9:.0f} GB/s a device",
        "Counted in the compiler's final code, not measured on a TPU.",
    ]
    for kernel in report.kernels:
        lines += ["", *_kernel(kernel, report)]
    if report.operations:
        lines += ["", f"XLA's own operations, by its estimate: {report.xla_us:.1f} us"]
        largest = sorted(report.operations, key=lambda x: -x.estimate_us)[:TOP]
        lines += [f"  {x.name} ({x.kind}) x {x.times}: {x.estimate_us:.1f} us" for x in largest]
    lines += [
        "",
        f"HBM: arguments {report.argument_bytes / MIB:.1f} MiB, temporaries "
        f"{report.temp_bytes / MIB:.1f} MiB; compiled in {report.compile_s:.1f} s",
    ]
    return "\n".join(lines)


def _kernel(k: KernelReport, report: Report) -> Iterator[str]:
    chip = chip_of(report.topology)
    yield f"{k.kernel}: {k.bundles:,} bundles, {k.issued_cycles:,} cycles issued"
    more = [
        f"{cycles:,} {what}"
        for cycles, what in (
            (k.branch_cycles, "lost to branches"),
            (k.mxu_wait_cycles, "waiting for the matrix units"),
            (k.dma_wait_cycles, "waiting for DMAs"),
        )
        if cycles
    ]
    if more:
        yield f"  and cycles {', '.join(more)}"
    parts = f"compute {k.compute_us:.1f} us, HBM {k.hbm_us:.1f} us, overlapped"
    yield f"  estimate {k.estimate_us:.1f} us: {parts}"
    if k.share_of_peak_flops is not None:
        rate = k.share_of_peak_flops * chip.peak_flops / 1e12
        yield f"  {k.share_of_peak_flops:.1%} of bfloat16 peak ({rate:.1f} TFLOP/s)"
    yield f"  {k.share_of_hbm:.1%} of HBM bandwidth; {k.hbm_bytes / 1e6:.1f} MB moved"
    yield f"  limit: {k.limit}; matrix units busy {k.mxu_share:.0%}"
    yield f"  slots in use: {_slots(k.slots)}"
    yield f"  VMEM {k.vmem_bytes / MIB:.2f} MiB, SMEM {k.smem_bytes:,} B, {k.spills} spill slots"
    for way, traffic in k.dma.items():
        each = traffic["bytes"] / max(traffic["count"], 1) / 1024
        yield f"  DMA {way}: {traffic['count']:,} x {each:,.1f} KiB"
    for loop in k.loops[:TOP]:
        share = loop.issued / max(k.issued_cycles, 1)
        yield (
            f"  {'  ' * loop.depth}loop {loop.first:#x}-{loop.last:#x} x {loop.iterations:,}: "
            f"{loop.issued / loop.iterations:,.1f} cycles each, {share:.0%} of all; {_slots(loop.slots)}"
        )
    if k.in_vmem:
        yield f"  in VMEM already, so their HBM traffic is not counted: {'; '.join(k.in_vmem)}"
    for what, times in k.blind.items():
        yield f"  not seen: {what}: {times}"
    if not k.complete:
        yield "  NOT EXECUTED TO ITS END: every figure above is of a part"


def _slots(slots: dict[str, float]) -> str:
    return " ".join(f"{kind} {share:.0%}" for kind, share in slots.items() if share >= 0.005)


ROWS = (  # of a comparison: (name, of a kernel)
    ("estimate, us", lambda k: k.estimate_us),
    ("compute, us", lambda k: k.compute_us),
    ("HBM, us", lambda k: k.hbm_us),
    ("issued cycles", lambda k: k.issued_cycles),
    ("bundles", lambda k: k.bundles),
    ("share of bfloat16 peak, %", lambda k: 100 * (k.share_of_peak_flops or 0.0)),
    ("share of HBM bandwidth, %", lambda k: 100 * k.share_of_hbm),
    ("VMEM, MiB", lambda k: k.vmem_bytes / MIB),
    ("spill slots", lambda k: k.spills),
)


def side_by_side(reports: Sequence[Report], markdown: bool = False) -> str:
    """The kernels of each report summed (shares: of the first kernel), a column each, beside the first's
    ratio; markdown: as a table of that, for documents.
    """
    heads = ["", *(_name(r) for r in reports)]
    table = [heads]
    for name, value in ROWS:
        row, first = [name], None
        for report in reports:
            values = [value(k) for k in report.kernels]
            number = float(values[0] if name.startswith("share") else sum(values)) if values else 0.0
            ratio = "" if first is None or not first else f" ({number / first:.2f}x)"
            row.append(f"{number:,.1f}{ratio}")
            first = number if first is None else first
        table.append(row)
    table.append(["limit", *((r.kernels[0].limit.split(";")[0] if r.kernels else "-") for r in reports)])
    if markdown:
        table.insert(1, ["---"] * len(heads))
        return "\n".join(f"| {' | '.join(row)} |" for row in table)
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in table
    ]
    return "\n".join(lines)


def _name(report: Report) -> str:
    options = ",".join(f"{name}={value}" for name, value in report.arguments.items())
    return f"{report.topology.partition(':')[0]} {options}".strip()
