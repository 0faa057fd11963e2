"""One metric of several finished runs over seconds of training and over FLOPs, as a table and plot.

    python launch/compare.py --metric=knn/accuracy --out=PICTURE.png NAME=WORKDIR [NAME=WORKDIR ...]

Seconds are those of the training steps alone (`step_seconds`), FLOPs those of an update's matmuls
and convolutions counted from the program (`bivl/core/flops.py`), times the updates.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from bivl import train
from bivl.core import config as configs


def read(workdir: Path, metric: str) -> list[dict]:
    """The run's evaluations as [{step, seconds, flops, value}]."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = np.array([0, *(line["step"] for line in lines)])
    means = np.array([line["step_seconds"] for line in lines])
    seconds = np.cumsum([0.0, *(means * np.diff(steps))])
    config = configs.from_dict(json.loads((workdir / "config.json").read_text()))
    flops = train.build(config).flops()
    found = []
    for line in (workdir / "evaluations.jsonl").read_text().splitlines():
        point = json.loads(line)
        step = point["step"]  # a line of metrics may stand for several updates
        at = {"step": step, "seconds": float(np.interp(step, steps, seconds))}
        found.append(at | {"flops": flops * step, "value": point[metric]})
    return found


def draw(runs: dict[str, list[dict]], metric: str) -> Figure:
    """A panel over seconds and one over FLOPs."""
    figure = Figure(figsize=(10, 3.8), dpi=110, layout="constrained")
    panels = zip(
        figure.subplots(1, 2, sharey=True),
        ("seconds", "flops"),
        ("seconds of training", "FLOPs of training"),
        strict=True,
    )
    for axis, key, label in panels:
        for name, points in runs.items():
            axis.plot(
                [p[key] for p in points], [p["value"] for p in points], marker="o", label=name
            )
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel(metric)
    figure.axes[0].legend(frameon=False)
    return figure


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", metavar="NAME=WORKDIR")
    parser.add_argument("--metric", default="knn/accuracy")
    parser.add_argument("--out", required=True)
    arguments = parser.parse_args()
    pairs = [run.partition("=") for run in arguments.runs]
    runs = {name: read(Path(folder), arguments.metric) for name, _, folder in pairs}
    print(f"| run | updates | seconds | FLOPs | {arguments.metric} |\n|---|---|---|---|---|")
    for name, points in runs.items():
        for p in points:
            numbers = f"{p['step']} | {p['seconds']:.0f} | {p['flops']:.2e} | {p['value']:.3f}"
            print(f"| {name} | {numbers} |")
    draw(runs, arguments.metric).savefig(arguments.out)


if __name__ == "__main__":
    main()
