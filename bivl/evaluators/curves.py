"""The training curves of a run, drawn from its metrics.jsonl.

Drawn without matplotlib's global state, so that it works in any thread and process.
"""

import json

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bivl.core.errors import UserError

DPI = 110
INK, FAINT = "#333333", "#b0b0b0"  # text; axes and grids
COLOURS = ("#2f6fbb", "#d9822b", "#3f9c6b", "#8b5fbf", "#c2485a", "#6b7785")


def render(figure):
    """A matplotlib Figure -> uint8 RGB array [height, width, 3]."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


def curves(metrics_path):
    """The training curves of a run's metrics.jsonl as a picture, a panel for each of PANELS.

    One JSON object a line, each with `step`; a torn last line is passed over. Raises UserError for
    a missing file and for any other line that is not such an object.
    """
    lines = read_metrics(metrics_path)
    figure = Figure(figsize=(14.5, 6.6), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.1, h_pad=0.1)
    last = max((line["step"] for line in lines), default=0)
    for axis, (title, pick, noisy) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        keys = sorted({key for line in lines for key in line if pick(key)}, reverse=True)
        _panel(axis, title, lines, keys, noisy)
        axis.set_xlim(0, max(last, 1))
    figure.suptitle(f"Training curves, {last:,} updates", fontsize=12, color=INK)
    return render(figure)


PANELS = (  # title, which keys of a metrics line the panel draws, whether they are noisy
    ("Loss", lambda key: key == "loss", True),
    ("Std over masked tokens", lambda key: key in ("target_std", "prediction_std"), True),
    ("Std of the teacher", lambda key: key.split("/")[0] == "std", True),
    ("Effective rank of the teacher", lambda key: key.split("/")[0] == "effective_rank", True),
    ("Distance of teacher and student", lambda key: key.split("/")[0] == "teacher_distance", True),
    ("Learning rate", lambda key: key == "learning_rate", False),
)


def read_metrics(path):
    """metrics.jsonl -> a list of dicts; only the last line may be torn."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            texts = [text for text in file.read().split("\n") if text.strip()]
    except FileNotFoundError:
        raise UserError(f"no metrics at {path}; name the metrics.jsonl of a workdir") from None
    lines = []
    for number, text in enumerate(texts, 1):
        try:
            line = json.loads(text)
            if not _is_number(line["step"]):
                raise TypeError
        except (ValueError, TypeError, KeyError):
            if number == len(texts):
                break
            raise UserError(
                f"line {number} of {path} is no metrics object; restore the file or cut that line"
            ) from None
        lines.append(line)
    return lines


def _panel(axis, title, lines, keys, noisy):
    """A line a key over step; many noisy points are drawn pale, under their running mean."""
    axis.set_title(title, fontsize=10, color=INK, loc="left")
    axis.set_xlabel("step", fontsize=9, color=INK)
    axis.tick_params(labelsize=8, colors=INK)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[["left", "bottom"]].set_color(FAINT)
    axis.ticklabel_format(axis="y", scilimits=(-2, 4))
    axis.yaxis.get_offset_text().set(fontsize=8, color=INK)
    axis.grid(color=FAINT, alpha=0.35, linewidth=0.6)
    if not keys:
        axis.text(0.5, 0.5, "not recorded", transform=axis.transAxes, ha="center", color=FAINT)
    for index, key in enumerate(keys):
        points = [(line["step"], line[key]) for line in lines if _is_number(line.get(key))]
        if not points:
            continue
        steps, values = np.array(points, float).T
        colour = COLOURS[index % len(COLOURS)]
        window = len(values) // 50
        if noisy and window > 1:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _running_mean(values, window)
        axis.plot(steps, values, color=colour, linewidth=1.6, label=key.split("/")[-1])
    if len(keys) > 1 or any("/" in key for key in keys):
        axis.legend(fontsize=8, frameon=False, labelcolor=INK)


def _is_number(value):
    return isinstance(value, int | float) and bool(np.isfinite(value))


def _running_mean(values, window):
    """The mean over the `window` values round each one (fewer at both ends)."""
    total = np.cumsum(np.concatenate([[0.0], values]))
    middle = np.arange(len(values))
    start = np.maximum(middle - window // 2, 0)
    end = np.minimum(middle + window // 2 + 1, len(values))
    return (total[end] - total[start]) / (end - start)
