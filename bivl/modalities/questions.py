"""Labelled pairs for image-text models: an image, or two, with a text and an answer or a truth.

A batch has image uint8 [B, S, S, 3], for two images image2 too, tokens int32 [B, L] and label int32
[B]. Records are those of `image_text`; what is the text and what the label, data.fields says:
fields.text=question and fields.label=answer.
"""

import jax
import jax.numpy as jnp

from bivl.core.errors import UserError
from bivl.modalities import image, image_text, labels

ONE, TWO = ("image",), ("image", "image2")


def inputs(config, names=ONE) -> dict[str, jax.ShapeDtypeStruct]:
    """The images `names` and tokens; texts have config.pair.length of them."""
    ids = jax.ShapeDtypeStruct((config.batch_size, config.pair.length), jnp.int32)
    return dict.fromkeys(names, image.inputs(config)["image"]) | {"tokens": ids}


def _shown(record, name: str) -> dict:
    """The record with its image NAME in the place of `image`."""
    if name not in record:
        raise UserError(
            f"the data has no {name}; set config.data.fields.{name} to the feature that holds it "
            f"(a record has {sorted(record)})"
        )
    return {**record, "image": record[name]}


def labelled_ops(config, names=ONE):
    """record, rng -> {image, image2?, tokens, label}; each image is cropped for itself."""
    pairs, crop, (_, *others) = image_text.pair_ops(config), image.train_image(config), names

    def ops(record, rng):
        label = labels.target(record, config.num_classes)
        found = pairs(_shown(record, "image"), rng) | {"label": label}
        return found | {name: crop(_shown(record, name), rng) for name in others}

    return ops


def eval_ops(config, names=ONE):
    """record -> {image, image2?, tokens, label?, id?}."""
    pairs, view, (_, *others) = image_text.eval_ops(config), image.eval_ops(config), names

    def ops(record):
        found = pairs(_shown(record, "image"))
        return found | {name: view(_shown(record, name))["image"] for name in others}

    return ops


def preprocess(config, names=ONE):
    """image=[...], text=[...], and image2=[...] where `names` has it -> numpy batch."""
    one = image_text.preprocess(config)

    def two(image=None, text=None, image2=None):
        found = one(image, text)
        if image2 is None:
            return found
        found["image2"] = one(image=image2)["image"]
        counts = len(found.get("image", ())), len(found["image2"])
        if counts[0] != counts[1]:
            raise UserError(
                f"preprocess got {counts[0]} of image and {counts[1]} of image2; each statement "
                "is about one of either"
            )
        return found

    return two if "image2" in names else one
