"""One metric of several finished runs over seconds of training and over FLOPs, as a table and plot.

    python launch/compare.py --metric=knn/accuracy --out=PICTURE.png NAME=WORKDIR [NAME=WORKDIR ...]

Seconds are those of the training steps alone (`step_seconds`), FLOPs those of an update's matmuls
and convolutions counted from the program (`bivl/core/flops.py`), times the updates. What was
trained before, a tokenizer and its teacher say, adds its own: NAME=BEFORE+BEFORE+WORKDIR. Seconds
say little where other work ran beside: --over flops leaves them out.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bivl import train
from bivl.core import config as configs

LABELS = {"seconds": "seconds of training", "flops": "FLOPs of training"}


def read_costs(workdir: Path) -> tuple[np.ndarray, np.ndarray, float]:
    """Steps from 0 on, the seconds of training up to each of them, and the FLOPs of an update."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = np.array([0, *(line["step"] for line in lines)])
    means = np.array([line["step_seconds"] for line in lines])
    seconds = np.cumsum([0.0, *(means * np.diff(steps))])
    config = configs.from_dict(json.loads((workdir / "config.json").read_text()))
    return steps, seconds, train.build(config).flops()


def read(folders: list[Path], metric: str) -> list[dict]:
    """The evaluations of the last run as [{step, seconds, flops, value}], after the others."""
    *before, (steps, seconds, flops) = [read_costs(folder) for folder in folders]
    spent = sum(theirs[-1] for _, theirs, _ in before)
    counted = sum(int(theirs[-1]) * update for theirs, _, update in before)
    found = []
    for line in (folders[-1] / "evaluations.jsonl").read_text().splitlines():
        point = json.loads(line)
        step = point["step"]  # a line of metrics may stand for several updates
        at = {"step": step, "seconds": float(spent + np.interp(step, steps, seconds))}
        found.append(at | {"flops": counted + flops * step, "value": point[metric]})
    return found


def draw(runs: dict[str, list[dict]], metric: str, over: list[str]) -> Figure:
    """A panel for each of LABELS that `over` names."""
    figure = Figure(figsize=(5 * len(over), 3.8), dpi=110, layout="constrained")
    axes = figure.subplots(1, len(over), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, over, strict=True):
        for name, points in runs.items():
            axis.plot(
                [p[key] for p in points], [p["value"] for p in points], marker="o", label=name
            )
        axis.set_xlabel(LABELS[key])
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(metric)
    figure.axes[0].legend(frameon=False)
    return figure


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=[BEFORE+]WORKDIR")
    parser.add_argument("--metric", default="knn/accuracy")
    parser.add_argument("--over", nargs="+", choices=LABELS, default=list(LABELS))
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    pairs = [run.partition("=") for run in arguments.runs]
    runs = {
        name: read([Path(folder) for folder in folders.split("+")], arguments.metric)
        for name, _, folders in pairs
    }
    print(f"| run | updates | seconds | FLOPs | {arguments.metric} |\n|---|---|---|---|---|")
    for name, points in runs.items():
        for p in points:
            numbers = f"{p['step']} | {p['seconds']:.0f} | {p['flops']:.2e} | {p['value']:.3f}"
            print(f"| {name} | {numbers} |")
    draw(runs, arguments.metric, arguments.over).savefig(arguments.out)


if __name__ == "__main__":
    main()
