#!/usr/bin/env python3
"""Draws what `nibble-bench op --json` measured, for docs/performance.md.

    tools/plots/op_plots.py op.json docs/plots --model 70b

writes <model>-roofline.svg (linears against memory and matrix units) and <model>-speedup.svg (linears against cuBLASLt). The
pictures have no background and grey text, so that they can be read in light and dark themes.
"""

import argparse
import json
import pathlib

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt  # noqa: E402

INK = "#7d8590"  # grey with enough contrast on white and on black
GRID = "#7d859040"
# One colour per linear, one per baseline; distinguishable with colour blindness (Okabe and Ito).
SHAPES = {"qkv": "#0072b2", "o": "#e69f00", "gate_up": "#009e73", "down": "#cc79a7"}
BASELINES = {"cublas_bf16_us": ("bf16", "#0072b2"), "cublas_fp8_us": ("fp8", "#e69f00"), "cublas_int8_us": ("int8", "#009e73")}

plt.rcParams.update({
    "font.family": "sans-serif", "font.size": 10, "svg.fonttype": "none", "svg.hashsalt": "nibble",
    "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": GRID, "grid.linewidth": 0.6,
    "axes.titlelocation": "left", "axes.titlesize": 11, "figure.constrained_layout.use": True,
})


def linears(run, model):
    rows = [r for r in run["results"] if r["op"] == "linear" and r["model"] == model and r["us"] > 0 and "error" not in r]
    if not rows:
        raise SystemExit(f"the run has no right results for linear layers of {model}")
    return rows


def caption(run):
    return f"{run['device']} · {run['date'][:4]}-{run['date'][4:6]}-{run['date'][6:8]} · nibble {run['version']}"


def roofline(run, model, path):
    rows = linears(run, model)
    bandwidth = run["read_bytes_per_second"]
    figure, axes = plt.subplots(figsize=(7.6, 4.6))
    intensity = [r["operations"] / r["bytes"] for r in rows]
    left, right = min(intensity) / 2, max(intensity) * 2
    # Matrix units slow down with the clock, so their roof is the highest that a measurement had.
    peak = max(r["operations"] / r["limit_us"] * 1e6 for r in rows)
    knee = peak / bandwidth
    axes.plot([left, knee, right], [left * bandwidth / 1e12, peak / 1e12, peak / 1e12], color=INK, linewidth=1.4)
    middle = (left * knee) ** 0.5
    axes.annotate(f"plain reads: {bandwidth / 1e12:.2f} TB/s", (middle, middle * bandwidth / 1e12), xytext=(-8, 4),
                  textcoords="offset points", ha="right", fontsize=9)
    axes.annotate(f"int8 matrix units: {peak / 1e12:.0f} TOPS", (knee, peak / 1e12), xytext=(0, 6),
                  textcoords="offset points", ha="center", fontsize=9)
    for shape, colour in SHAPES.items():
        points = sorted((r["operations"] / r["bytes"], r["operations"] / r["us"] / 1e6, r["rows"]) for r in rows if r["variant"] == shape)
        if not points:
            continue
        axes.plot([p[0] for p in points], [p[1] for p in points], "o-", color=colour, markersize=4, linewidth=1, label=shape)
        if shape == "gate_up":  # the number of rows, once
            for x, y, count in points:
                axes.annotate(str(count), (x, y), xytext=(5, -10), textcoords="offset points", fontsize=8, color=colour)
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(None, peak / 1e12 * 2), xlabel="operations per byte", ylabel="TOPS",
             title=f"W4A4 linear layers of {model}: rows 1 to {max(r['rows'] for r in rows)}")
    axes.legend(frameon=False, labelcolor="linecolor", handlelength=1.2, loc="lower right")
    figure.supxlabel(caption(run), fontsize=8, x=0.99, ha="right")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def speedup(run, model, path):
    rows = linears(run, model)
    shapes = [s for s in SHAPES if any(r["variant"] == s for r in rows)]
    baselines = {k: v for k, v in BASELINES.items() if any(k in r for r in rows)}
    if not baselines:
        raise SystemExit("the run has no baselines: was it made with --no-baselines?")
    figure, panels = plt.subplots(len(shapes), 1, figsize=(7.6, 1.75 * len(shapes) + 0.5), sharex=True, squeeze=False)
    for axes, shape in zip(panels[:, 0], shapes):
        points = sorted((r for r in rows if r["variant"] == shape), key=lambda r: r["rows"])
        width = 0.8 / len(baselines)
        for i, (key, (name, colour)) in enumerate(baselines.items()):
            ratios = [r[key] / r["us"] if key in r else 0 for r in points]
            places = [x - 0.4 + (i + 0.5) * width for x in range(len(points))]
            axes.bar(places, ratios, width * 0.9, color=colour)
            for x, y in zip(places, ratios):
                if y > 0:
                    axes.annotate(f"{y:.1f}", (x, y), xytext=(0, 1.5), textcoords="offset points", ha="center", fontsize=6.5)
        axes.axhline(1, color=INK, linewidth=0.8)
        axes.grid(axis="x", visible=False)
        axes.set_title(shape)
        axes.set_xticks(range(len(points)), [str(r["rows"]) for r in points])
        axes.margins(x=0.01, y=0.15)
    panels[-1, 0].set_xlabel("rows")
    panels[0, 0].legend(handles=[matplotlib.patches.Patch(color=c, label=n) for n, c in baselines.values()], frameon=False,
                        labelcolor="linecolor", ncols=len(baselines), loc="lower right", bbox_to_anchor=(1, 1), handlelength=0.8)
    figure.supylabel("times as fast as cuBLASLt", fontsize=10)
    figure.supxlabel(caption(run), fontsize=8, x=0.99, ha="right")
    figure.savefig(path, transparent=True, metadata={"Date": None})
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=pathlib.Path, help="of nibble-bench op, or of gpu_check.sh")
    parser.add_argument("folder", type=pathlib.Path)
    parser.add_argument("--model", default="70b")
    arguments = parser.parse_args()
    run = json.loads(arguments.json.read_text())
    run = run.get("op", run)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    roofline(run, arguments.model, arguments.folder / f"{arguments.model}-roofline.svg")
    speedup(run, arguments.model, arguments.folder / f"{arguments.model}-speedup.svg")


if __name__ == "__main__":
    main()
