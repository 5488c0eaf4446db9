"""The report's pictures: speed-up maps, rooflines, goals, bars, loss curves."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator

from .cases import CELLS, MODES
from .goals import Outcome, Record
from .report import times, undisturbed

TORCH_COLOR, RNNFAST_COLOR, MET_COLOR = "#c1442e", "#1f5fa8", "#2e7d4f"
NEAREST = 1e-9  # what a loss curve's distance 0 is drawn as
WIDEST_RATIO = 8  # where the colours of the speed-up map end


def draw(records: Sequence[Record], outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Every picture that the records have something for, as PNG files in `folder`; those of an earlier run go."""
    for old in folder.glob("*.png"):
        old.unlink()
    grid = [record for record in undisturbed(records) if record["section"] == "grid"]
    figures: dict[str, Figure] = {}
    for dtype, threads in sorted(
        {(r["dtype"], r["threads"]) for r in grid}, key=lambda key: (key[1], key[0] != "fp32")
    ):
        part = [r for r in grid if (r["dtype"], r["threads"]) == (dtype, threads)]
        label = f"{dtype}, {threads} thread{'s' * (threads > 1)}" if part[0]["device"] == "cpu" else f"{dtype}, GPU"
        figures[f"speedup_{dtype}_{threads}"] = speedup_map(part, label)
        figures[f"roofline_{dtype}_{threads}"] = roofline(part, label)
    if outcomes:
        figures["goals"] = goals(outcomes)
    others = [record for record in undisturbed(records) if record["section"] in ("other", "workloads")]
    if others:
        figures["other_cases"] = bars(others)
    curves = [record for record in records if record.get("losses")]
    if curves:
        figures["loss_curves"] = loss_curves(curves)
    paths = []
    for name, figure in figures.items():
        paths.append(folder / f"{name}.png")
        figure.savefig(paths[-1], dpi=110)
    return paths


def speedup_map(records: Sequence[Record], label: str) -> Figure:
    """Ratio torch/rnnfast per hidden size and batch, a panel per mode and cell."""
    hidden, batches = (sorted({r[name] for r in records}) for name in ("hidden_size", "batch"))
    size = (3 + 0.75 * len(batches) * len(CELLS), max(4.6, 1.8 + 0.42 * len(hidden) * len(MODES)))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(MODES), len(CELLS), squeeze=False)
    image = None
    for row, mode in enumerate(MODES):
        for column, cell in enumerate(CELLS):
            ax: Axes = axes[row][column]
            values = [[math.nan] * len(batches) for _ in hidden]
            for r in records:
                if (r["mode"], r["cell"]) == (mode, cell):
                    values[hidden.index(r["hidden_size"])][batches.index(r["batch"])] = r["speedup"]
            logs = [[math.log2(value) for value in line] for line in values]
            limit = math.log2(WIDEST_RATIO)
            image = ax.imshow(logs, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto", origin="lower")
            for y, line in enumerate(values):
                for x, value in enumerate(line):
                    if not math.isnan(value):
                        strong = abs(math.log2(value)) > 0.65 * limit
                        ax.text(
                            x,
                            y,
                            f"{value:.2f}",
                            ha="center",
                            va="center",
                            color="white" if strong else "black",
                            fontsize=9,
                        )
            ax.set_xticks(range(len(batches)), batches)
            ax.set_yticks(range(len(hidden)), hidden)
            ax.set_title(f"{cell}, {mode}", fontsize=10)
            ax.set_facecolor("0.9")
            if row == len(MODES) - 1:
                ax.set_xlabel("batch B (rows)")
            if column == 0:
                ax.set_ylabel("hidden size H (units)")
    bar = figure.colorbar(image, ax=axes, ticks=range(-3, 4), shrink=0.8)
    bar.ax.set_yticklabels([f"{2.0**tick:g}x" for tick in range(-3, 4)])
    bar.set_label("time of torch.nn / time of rnnfast")
    figure.suptitle(f"Speed-up over torch.nn: {label}, T={records[0]['seq_len']}, I=H (blue: rnnfast is faster)")
    return figure


def roofline(records: Sequence[Record], label: str) -> Figure:
    """Rates under the machine's two measured roofs; a line joins torch.nn's point to rnnfast's of the same case."""
    hidden = sorted({r["hidden_size"] for r in records})
    colors = {h: matplotlib.colormaps["plasma"](0.88 * i / max(1, len(hidden) - 1)) for i, h in enumerate(hidden)}
    peak = max(r["peak_gflops"] for r in records)  # of runs that were merged: the least disturbed
    figure = Figure(figsize=(13, 7.4), layout="constrained")
    axes = figure.subplots(len(MODES), len(CELLS), sharey=True, squeeze=False)
    for row, mode in enumerate(MODES):
        for column, cell in enumerate(CELLS):
            ax: Axes = axes[row][column]
            members = [r for r in records if (r["mode"], r["cell"]) == (mode, cell)]
            _draw_roofs(ax, members, peak)
            for r in members:
                # Sizes of one batch have one intensity: they stand side by side around it.
                x = r["flops_per_byte"] * 2 ** (0.22 * (hidden.index(r["hidden_size"]) - (len(hidden) - 1) / 2))
                color = colors[r["hidden_size"]]
                ax.plot([x, x], [r["torch_gflops"], r["gflops"]], color=color, linewidth=1.2, alpha=0.7)
                ax.plot(x, r["torch_gflops"], "o", markerfacecolor="white", color=color, markersize=5)
                ax.plot(x, r["gflops"], "o", color=color, markersize=6)
            ax.set_xscale("log", base=2)
            ax.set_yscale("log")
            places = sorted({r["batch"]: r["flops_per_byte"] for r in members}.items())
            ax.set_xticks([x for _, x in places], [f"{x:.2g}\nB={batch}" for batch, x in places])
            ax.minorticks_off()
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            ax.set_title(f"{cell}, {mode}", fontsize=11)
            ax.grid(alpha=0.25)
            if row == len(MODES) - 1:
                ax.set_xlabel("operations per byte of weights that must be read")
            if column == 0:
                ax.set_ylabel("GFLOP/s")
    rates = [r[name] for r in records for name in ("torch_gflops", "gflops")]
    axes[0][0].set_ylim(min(rates) / 1.4, peak * 2.6)
    handles = [Line2D([], [], marker="o", linestyle="", color=colors[h], label=f"H={h}") for h in hidden]
    handles.append(Line2D([], [], marker="o", linestyle="", color="black", label="filled: rnnfast"))
    empty = {"markerfacecolor": "white", "color": "black", "label": "empty: torch.nn"}
    handles.append(Line2D([], [], marker="o", linestyle="", **empty))
    figure.legend(handles=handles, loc="outside right center", fontsize=9)
    figure.suptitle(f"Roofline: {label}, T={records[0]['seq_len']}, I=H (grey: the machine's measured limits)")
    return figure


def _draw_roofs(ax: Axes, members: Sequence[Record], peak: float) -> None:
    """The peak of arithmetic, and the rates of reading the smallest and the largest weights with what lies between."""
    if not members:
        return
    intensities = [r["flops_per_byte"] for r in members]
    left, right = min(intensities) / 4, max(intensities) * 2
    ax.set_xlim(left, right)
    ax.axhline(peak, color="0.3", linewidth=1.5)
    style = {"va": "bottom", "fontsize": 8, "color": "0.3"}
    ax.text(right / 1.1, peak * 1.06, f"arithmetic {peak:.0f} GFLOP/s", ha="right", **style)
    if members[0]["bandwidth_gbs"] is None:
        return
    fast, slow = (f(r["bandwidth_gbs"] for r in members) for f in (max, min))
    xs = [left, peak / fast, peak / slow, right]
    tops, bottoms = ([min(peak, x * rate) for x in xs] for rate in (fast, slow))
    ax.fill_between(xs, bottoms, tops, color="0.85", linewidth=0)
    ax.plot(xs, tops, color="0.3", linewidth=1.5)
    text = f"reading weights: small\n{fast:.0f} GB/s, large {slow:.0f} GB/s"
    ax.text(left * 1.08, peak * 1.06, text, ha="left", **style)


def goals(outcomes: Sequence[Outcome]) -> Figure:
    """How far every case is beyond its goal (right of the line) or short of it, a row per goal."""
    figure = Figure(figsize=(12, 1.8 + 0.3 * len(outcomes)), layout="constrained")
    ax = figure.subplots()
    for y, outcome in enumerate(outcomes):
        goal = outcome.goal
        beyond = [goal.limit / v if goal.at_most else v / goal.limit for v in outcome.values]
        color = MET_COLOR if outcome.met else TORCH_COLOR
        ax.plot(beyond, [y] * len(beyond), "|", color=color, alpha=0.45, markersize=9)
        ax.plot(min(beyond), y, "o", color=color, markersize=6)
        if goal.mean is not None:
            ax.plot(outcome.mean / goal.mean, y, "D", color=color, markersize=6, markerfacecolor="white")
    ax.axvline(1, color="black", linewidth=1)
    ax.set_yticks(range(len(outcomes)), [outcome.goal.what for outcome in outcomes], fontsize=8)
    ax.invert_yaxis()
    ax.margins(y=0.02)
    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.grid(axis="x", alpha=0.3)
    ax.set_xlabel("how far beyond the goal (right of the line: reached)")
    met = sum(outcome.met for outcome in outcomes)
    legend = "stroke: a case; dot: the worst case; diamond: the mean, against its own goal"
    ax.set_title(f"{met} of {len(outcomes)} goals met ({legend})")
    return figure


def bars(records: Sequence[Record]) -> Figure:
    """The ratio of every case that is not a point of the grid."""
    ordered = sorted(records, key=lambda record: (record["section"] == "workloads", record["speedup"]))
    figure = Figure(figsize=(10, 1.4 + 0.27 * len(ordered)), layout="constrained")
    ax = figure.subplots()
    for y, record in enumerate(ordered):
        ratio = record["speedup"]
        ax.barh(y, ratio - 1, left=1, color=RNNFAST_COLOR if ratio >= 1 else TORCH_COLOR)
        ax.text(max(ratio, 1) * 1.02, y, f"{ratio:.2f}x", va="center", fontsize=8)
    ax.set_yticks(range(len(ordered)), [record["name"] for record in ordered], fontsize=8)
    ratios = [record["speedup"] for record in ordered]
    ax.set_xscale("log", base=2)
    ax.set_xlim(min(0.9, *ratios) * 0.95, max(1.1, *ratios) * 1.2)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}x"))
    ax.axvline(1, color="black", linewidth=1)
    ax.grid(axis="x", alpha=0.3)
    ax.margins(y=0.01)
    ax.set_xlabel("time of torch.nn / time of rnnfast (right of the line: rnnfast is faster)")
    ax.set_title("Other layers, and above them the workloads on real input")
    return figure


def loss_curves(records: Sequence[Record]) -> Figure:
    """Both loss curves of every workload, and below how far each is from the same training in float64."""
    figure = Figure(figsize=(3.6 * len(records), 5.6), layout="constrained")
    axes = figure.subplots(2, len(records), sharex="col", squeeze=False)
    for column, record in enumerate(records):
        losses = record["losses"]
        curve, deviation = axes[0][column], axes[1][column]
        curve.plot(losses["torch"], color=TORCH_COLOR, linewidth=3, alpha=0.6, label="torch.nn")
        curve.plot(losses["rnnfast"], color=RNNFAST_COLOR, linewidth=1, label="rnnfast")
        title = f"{record['name']}\n{record['cell']}, H={record['hidden_size']}, B={record['batch']}"
        curve.set_title(title + (f", {times(record)[2]}x" if record["speedup"] else ", WRONG"), fontsize=10)
        for side, color, label in (("torch", TORCH_COLOR, "torch.nn"), ("rnnfast", RNNFAST_COLOR, "rnnfast")):
            distances = [max(abs(a - b), NEAREST) for a, b in zip(losses[side], losses["float64"], strict=False)]
            deviation.plot(distances, ".", color=color, markersize=4, alpha=0.7, label=label)
        limit = record["err_limit"] * max(abs(loss) for loss in losses["float64"])
        deviation.axhline(limit, color="black", linestyle="--", linewidth=1, label="allowed")
        deviation.set_yscale("log")
        deviation.set_ylim(bottom=NEAREST / 2)
        deviation.set_xlabel("training step")
        for ax in (curve, deviation):
            ax.grid(alpha=0.3)
    axes[0][0].set_ylabel("loss (nats)")
    axes[1][0].set_ylabel("distance from float64 (nats)")
    axes[0][0].legend(fontsize=8)
    axes[1][0].legend(fontsize=8, loc="lower left")
    figure.suptitle("Training with torch.nn and with rnnfast from the same seed")
    return figure
