"""Pictures of reports: where kernels stand under a chip's roof, and which slots they use."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np

matplotlib.use("Agg")
from matplotlib import pyplot as plt

from llm_jax.tpu.chips import chip_of
from llm_jax.tpu.profile import Report


def plot_reports(reports: Sequence[Report], path: Path) -> None:
    """Roofline and slot use of the kernels in `reports`, as a PNG. One chip per colour."""
    kernels = [(r, k) for r in reports for k in r.kernels]
    figure, (roof, bars) = plt.subplots(1, 2, figsize=(13, 5))
    chips = list(dict.fromkeys(r.topology.partition(":")[0] for r in reports))
    colours = dict(zip(chips, plt.rcParams["axes.prop_cycle"].by_key()["color"], strict=False))
    intensity = np.logspace(0, 5, 200)  # operations a byte
    for name in chips:
        chip = chip_of(name)
        top = np.minimum(chip.peak_flops, intensity * chip.hbm_bandwidth) / 1e12
        roof.loglog(intensity, top, color=colours[name], label=f"{name}: peak and HBM bandwidth")
    for report, k in kernels:
        if report.flops and k.hbm_bytes:
            name = report.topology.partition(":")[0]
            reached = report.flops / k.estimate_us / 1e6
            roof.plot(report.flops / k.hbm_bytes, reached, "o", color=colours[name])
            roof.annotate(k.kernel, (report.flops / k.hbm_bytes, reached), fontsize=7)
    roof.set(
        xlabel="FLOP a byte of HBM traffic", ylabel="TFLOP/s", title="Counted in the code, not measured"
    )
    roof.legend(fontsize=8)
    kinds = list(dict.fromkeys(kind for _, k in kernels for kind in k.slots))
    height = 0.8 / max(len(kernels), 1)
    for i, (report, k) in enumerate(kernels):
        slots = k.loops[0].slots if k.loops else k.slots
        label = f"{k.kernel} {report.topology.partition(':')[0]} {report.arguments or ''}"
        bars.barh(
            np.arange(len(kinds)) + i * height,
            [100 * slots.get(x, 0.0) for x in kinds],
            height,
            label=label,
        )
    bars.set_yticks(np.arange(len(kinds)) + 0.4 - height / 2, kinds)
    bars.invert_yaxis()
    bars.set(xlim=(0, 100), xlabel="% of the slots of the bundles issued", title="Hot loop")
    bars.legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
