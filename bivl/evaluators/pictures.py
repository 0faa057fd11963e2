"""Pictures of a run: masks, regression targets and attention of test images, training curves.

Everything is drawn without matplotlib's global state, so it works in any thread and process and
leaves a notebook's figures alone. A picture is a uint8 RGB array [height, width, 3].
"""

from collections.abc import Mapping

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from bivl.core.distributed import to_host
from bivl.core.errors import UserError
from bivl.evaluators import features
from bivl.evaluators.curves import DPI, FAINT, INK, render
from bivl.evaluators.curves import curves as curves  # the trainer draws all pictures from here

HIDDEN = 0.62  # the grey of a hidden patch
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
MOST_HEADS = 16
FIELDS = ("targets", "attention")


def make(predict, splits, config=None):
    """Pictures of a few images, as `run(params, extras) -> dict of uint8 [H, W, 3]`.

    predict["attention"] gives [B, H, h, w], the CLS token's attention to the patches a head, and
    predict["targets"] the regression targets, [B, h*w, D] or [B, h, w, D]; either may be missing.
    Setting: `num_images` 8. Results: `pictures/masks`, training images as the student sees them,
    and, of test images, `pictures/targets` and `pictures/attention` where the model has them.
    Raises UserError where there are no images or neither prediction.
    """
    options = features.settings(config, "pictures", num_images=8)
    num_images = features.number(options["num_images"], "config.eval.pictures.num_images")
    if not any(name in predict for name in FIELDS):
        raise UserError(
            "this objective has neither 'targets' nor 'attention' to draw; take pictures out of "
            "config.evaluators"
        )

    def run(params, extras):
        shown = _first(predict, splits, num_images, params, extras)
        images, names = shown["image"], shown["names"]
        grid = patch_grid(shown)
        result, masked = {}, _training_masks(splits, num_images)
        if masked:
            result["pictures/masks"] = draw_masks(masked)
        if "targets" in shown:
            maps = shown["targets"].reshape(len(images), *grid, -1)
            result["pictures/targets"] = draw_targets(images, maps, names)
        if "attention" in shown:
            result["pictures/attention"] = draw_attention(images, shown["attention"], names)
        return result

    return run


def _first(predict, splits, count, params, extras):
    """The first `count` real test images (float [N, H, W, 3] in 0..1), predictions and names."""
    parts = {"image": [], "names": []}
    for batch in splits.batches("test"):
        if "image" not in batch:
            raise UserError(
                "eval_data.test has no images to draw; name the set's image field in "
                "eval_data.test.fields.image, or take pictures out of config.evaluators"
            )
        mask = np.asarray(batch["mask"], bool)
        inputs = features.model_inputs(batch)
        parts["image"].append(raw_image(to_host(inputs["image"])[mask], splits.normalization))
        for name in FIELDS:
            if name in predict:
                values = to_host(predict[name](params, extras, inputs))[mask]
                parts.setdefault(name, []).append(values.astype(np.float32))
        labels = np.asarray(batch.get("label", np.full(len(mask), -1)))[mask]
        parts["names"].append([_name(label, splits.classes) for label in labels])
        if sum(map(len, parts["image"])) >= count:
            break
    if not parts["image"]:
        raise UserError("eval_data.test has no examples; check eval_data.test.split")
    return {name: np.concatenate(values)[:count] for name, values in parts.items()}


def _name(label, classes):
    """A class's name, its number where the set has no names, "" where it has no labels."""
    if np.ndim(label) or label < 0:
        return ""
    return classes[label] if classes and label < len(classes) else f"class {label}"


def raw_image(images, normalization=None):
    """Images uint8 (raw) or float -> float 0..1; of floats `normalization`, (mean, std), is undone,
    by default ImageNet's."""
    if images.dtype == np.uint8:
        return images.astype(np.float32) / 255
    mean, std = normalization or (IMAGENET_MEAN, IMAGENET_STD)
    return np.clip(images.astype(np.float32) * np.float32(std) + np.float32(mean), 0, 1)


def patch_grid(shown):
    """(h, w) from attention [N, H, h, w], targets [N, h, w, D], or targets [N, L, D] and images."""
    if "attention" in shown:
        return shown["attention"].shape[2:]
    targets = shown["targets"]
    if targets.ndim == 4:
        return targets.shape[1:3]
    return _grid_of(targets.shape[1], *shown["image"].shape[1:3])


def _grid_of(length, height, width):
    """(h, w) of `length` square patches on an image of height x width pixels."""
    rows = max(1, round((length * height / width) ** 0.5))
    if length % rows:
        raise UserError(
            f"{length} patches on an image of {height}x{width} pixels form no grid; take pictures "
            "out of config.evaluators"
        )
    return rows, length // rows


def _training_masks(splits, count):
    """{part: (images, masks)} of the first training examples, float [N, H, W, 3] in 0..1 and bool
    [N, h, w]; the only part of a plain set is "".

    Of M masks an image the first is shown. Parts without images or masks are left out.
    """
    examples = splits.examples(count) if splits.examples else {}
    parts = examples if any(isinstance(x, Mapping) for x in examples.values()) else {"": examples}
    found = {}
    for name, part in parts.items():
        if "image" in part and "mask" in part:
            images, hidden = raw_image(part["image"], splits.normalization), part["mask"]
            hidden = hidden[:, 0] if hidden.ndim == 3 else hidden
            grid = _grid_of(hidden.shape[1], *images.shape[1:3])
            found[name] = images, hidden.reshape(len(images), *grid)
    return found


def draw_masks(parts):
    """{part: (images [N, H, W, 3] in 0..1, hidden bool [N, h, w])} -> picture."""
    rows, shares = {}, []
    for name, (images, hidden) in parts.items():
        seen = np.where(_enlarge(hidden[..., None], images.shape[1:3]), HIDDEN, images)
        rows |= {name or "image": images, f"{name} masked".strip(): seen}
        shares.append(f"{hidden.mean():.0%} of {hidden[0].size} patches")
        shares[-1] += f" in {name}" if name else ""
    return _sheet(rows, f"Training images; hidden are {', '.join(shares)}", None)


def draw_targets(images, maps, names=None):
    """images [N, H, W, 3] in 0..1 and target maps [N, h, w, D] -> picture.

    Colours are the first three principal components over all the images shown, so that equal
    colours mean similar targets in every column.
    """
    title = "Regression targets: first three principal components as red, green, blue"
    return _sheet({"image": images, "targets": principal_colours(maps)}, title, names)


def principal_colours(maps):
    """maps [N, h, w, D] -> [N, h, w, 3] in 0..1, each component cut at its 1st and 99th percentile.

    A component's sign is arbitrary; the one that skews its values upwards is taken.
    """
    rows = maps.reshape(-1, maps.shape[-1]).astype(np.float64)
    rows = rows - rows.mean(axis=0)
    _, _, axes = np.linalg.svd(rows, full_matrices=False)
    components = np.zeros((len(rows), 3))
    components[:, : min(3, len(axes))] = rows @ axes[:3].T
    components *= np.where((components**3).sum(axis=0) < 0, -1, 1)
    low, high = np.percentile(components, (1, 99), axis=0)
    scaled = (components - low) / np.maximum(high - low, 1e-12)
    return np.clip(scaled, 0, 1).reshape(*maps.shape[:3], 3)


def draw_attention(images, attention, names=None):
    """images [N, H, W, 3] in 0..1 and attention [N, heads, h, w] -> picture.

    Each map is scaled to its own maximum: bright = looked at most, within one tile.
    """
    rows = {"image": images, "mean": overlay(images, attention.mean(axis=1))}
    for head in range(min(attention.shape[1], MOST_HEADS)):
        rows[f"head {head + 1}"] = overlay(images, attention[:, head])
    return _sheet(rows, "Attention of the CLS token in the last block", names)


def overlay(images, maps, top=None):
    """images [N, H, W, 3] under heat maps [N, h, w], in dim grey, the less to be seen the more
    attention; `top`: what is brightest, by default each map's own maximum."""
    top = maps.max(axis=(1, 2), keepdims=True) if top is None else top
    heat = _enlarge((maps / np.maximum(top, 1e-12))[..., None], images.shape[1:3])[..., 0]
    return _blend(images, matplotlib.colormaps["inferno"](heat), 0.25 + 0.7 * heat)


def signed_overlay(images, maps, top):
    """images [N, H, W, 3] under maps [N, h, w] of differences: red above 0, blue below, plain at 0;
    what is `top` from 0 is strongest."""
    value = _enlarge((maps / np.maximum(top, 1e-12))[..., None], images.shape[1:3])[..., 0]
    return _blend(images, matplotlib.colormaps["coolwarm"](0.5 + 0.5 * value), 0.9 * np.abs(value))


def _blend(images, colours, alpha):
    grey = np.repeat(images.mean(axis=-1, keepdims=True), 3, axis=-1)
    alpha = alpha[..., None]
    return (1 - alpha) * (0.05 + 0.6 * grey) + alpha * colours[..., :3]


def _enlarge(maps, size):
    """maps [N, h, w, C] -> [N, H, W, C]: every pixel takes the value of the patch it lies in."""
    row, column = (
        np.arange(n) * cells // n for n, cells in zip(size, maps.shape[1:3], strict=True)
    )
    return maps[:, row][:, :, column]


def _sheet(rows, title, names=None, tile=1.25):
    """A picture of tiles: `rows` maps a label to images [N, h, w, 3]; each column is one image."""
    count = len(next(iter(rows.values())))
    figure = Figure(figsize=(max(tile * count + 1.0, 6.0), tile * len(rows) + 0.65), dpi=DPI)
    figure.set_layout_engine("constrained", w_pad=0.04, h_pad=0.04, wspace=0, hspace=0)
    axes = figure.subplots(len(rows), count, squeeze=False)
    for line, (label, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(line, images, strict=True):
            axis.imshow(np.clip(image, 0, 1), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color=FAINT, linewidth=0.6)
        line[0].set_ylabel(label, fontsize=9, color=INK)
    if names is not None:
        for axis, name in zip(axes[0], names, strict=True):
            axis.set_title(name if len(name) < 19 else name[:17] + "…", fontsize=8, color=INK)
    figure.suptitle(title, fontsize=11, color=INK)
    return render(figure)
