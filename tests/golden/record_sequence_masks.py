"""Records statistics of masks drawn by plain_masks.py: sequence_masks.json.

    python tests/golden/record_sequence_masks.py

needs numpy. Each entry: `rule`, its `options`, `draws`, and by quantity [mean, std, min, max] over
the draws. Quantities of a mask of length T: `hidden` count of hidden places; `fraction` of T;
`runs` stretches of hidden places; `first`, `middle`, `last` whether place 0, T // 2, T - 1 is
hidden; of BERT's also `kept` and `random` counts; of blocks `marked` the count before single places
bring it to the target. `frame_spans_batch`: one draw is a batch of `rows` rows, equalised; `hidden`
is each row's count after it.
"""

import json
import pathlib

import numpy as np
import plain_masks as masks

PATH = pathlib.Path(__file__).with_name("sequence_masks.json")
DRAWS = 2000
BASE = {"ratio": 0.5, "adjust": 0.05, "block": 5}
LARGE = {"ratio": 0.55, "adjust": 0.1, "block": 5}
CASES = {
    "text_spans/512": ("text_spans", {"size": 512, "ratio": 0.35, "span": 4}),
    "text_spans/30": ("text_spans", {"size": 30, "ratio": 0.35, "span": 4}),
    "bert/512": ("bert", {"size": 512, "ratio": 0.15, "kept": 0.1, "randomized": 0.1}),
    "bert/30": ("bert", {"size": 30, "ratio": 0.15, "kept": 0.1, "randomized": 0.1}),
    "frame_spans/499": ("frame_spans", {"frames": 499, "ratio": 0.65, "span": 10}),
    "frame_spans/99": ("frame_spans", {"frames": 99, "ratio": 0.65, "span": 10}),
    "block_line/250": ("block_line", {"length": 250, **BASE, "inverse": False}),
    "block_line/250_inverse": ("block_line", {"length": 250, **BASE, "inverse": True}),
    "block_line/499_large": ("block_line", {"length": 499, **LARGE, "inverse": False}),
    "block_line/499_large_inverse": ("block_line", {"length": 499, **LARGE, "inverse": True}),
    "uniform/512_base": ("uniform", {"length": 512, "ratio": 0.48}),
    "uniform/512_large": ("uniform", {"length": 512, "ratio": 0.5}),
    "uniform/24": ("uniform", {"length": 24, "ratio": 0.48}),
}


def measure(mask):
    """Quantities of one mask."""
    edges = np.diff(np.concatenate([[False], mask]).astype(int))
    return {
        "hidden": mask.sum(),
        "fraction": mask.mean(),
        "runs": (edges == 1).sum(),
        "first": mask[0],
        "middle": mask[len(mask) // 2],
        "last": mask[-1],
    }


def draw(rule, options, rng):
    """Quantities of one draw of a rule."""
    drawn = getattr(masks, rule)(rng, **options)
    if rule == "bert":
        mask, same, random = drawn
        return measure(mask) | {"kept": same.sum(), "random": random.sum()}
    if rule == "block_line":
        mask, before = drawn
        return measure(mask) | {"marked": before}
    return measure(drawn)


def summary(rule, options, lines):
    """The entry of a rule from the quantities of its draws."""
    quantities = {}
    for key in lines[0]:
        values = np.array([line[key] for line in lines], float)
        numbers = (values.mean(), values.std(), values.min(), values.max())
        quantities[key] = [round(float(number), 6) for number in numbers]
    return {"rule": rule, "options": options, "draws": len(lines)} | quantities


def batches(rng, frames=499, rows=64, draws=100):
    """Equalised batches of data2vec 1.0 audio: quantities of their first rows."""
    lines = []
    for _ in range(draws):
        batch = masks.equalize(rng, [masks.frame_spans(rng, frames) for _ in range(rows)])
        assert len({int(mask.sum()) for mask in batch}) == 1
        lines.append(measure(batch[0]))
    options = {"frames": frames, "ratio": 0.65, "span": 10, "rows": rows}
    return summary("frame_spans, equalize", options, lines)


def main():
    """Writes the file beside this script."""
    out = {}
    for number, (name, (rule, options)) in enumerate(CASES.items()):
        rng = np.random.default_rng(number)
        out[name] = summary(rule, options, [draw(rule, options, rng) for _ in range(DRAWS)])
    for rows in (2, 64):
        rng = np.random.default_rng(100 + rows)
        out[f"frame_spans_batch/499x{rows}"] = batches(rng, rows=rows)
    entries = [f"{json.dumps(name)}: {json.dumps(entry)}" for name, entry in out.items()]
    PATH.write_text("{\n" + ",\n".join(entries) + "\n}\n")
    for name, entry in out.items():
        print(name, entry["fraction"], entry["runs"][0])


if __name__ == "__main__":
    main()
