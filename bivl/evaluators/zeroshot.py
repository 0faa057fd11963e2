"""Zero-shot classification by captions, after CLIP (openai/CLIP: the notebook of prompts).

Each class name is put into every template; the unit vectors of these texts are averaged, the
average scaled to unit length. An image's answer is the class whose vector is nearest.
"""

import numpy as np

from bivl.core.errors import UserError
from bivl.evaluators import features
from bivl.evaluators.retrieval import ranks

TOP = 5
NEEDS = ("image", "label")  # fields that both splits must have


def make(predict, splits, config=None):
    """Accuracy of class names as captions, as `run(params, extras) -> dict`.

    Reads predict["image_embeddings"] of the test split and predict["text_embeddings"] of the
    prompts, both [B, E] of unit length. Setting: `templates` ("a photo of a {}.",), texts with {}
    for the name. Results: `zeroshot/accuracy`, `zeroshot/accuracy_5` where there are more than
    five classes (the class is among the five nearest), and `zeroshot/chance`, the share of the
    most frequent class. Equal similarities count against the model, so no class that shares its
    name wins; underscores in names are read as spaces. Raises UserError for an objective without
    these predictions, classes without names, labels beyond them, and templates without {}.
    """
    options = features.settings(config, "zeroshot", templates=("a photo of a {}.",))
    templates = _check(options["templates"])
    features.require(predict, "zeroshot", "image_embeddings", "text_embeddings")
    if not splits.classes:
        raise UserError(
            "eval_data.train has no names of its classes; name a set that has them, or take "
            "zeroshot out of config.evaluators"
        )
    asked = prompts(splits.classes, templates)

    def run(params, extras):
        images = features.extract(predict, splits, "test", params, extras, "image_embeddings")
        features.check_labels(images.labels, "test", splits.classes)
        texts = features.embed_texts(predict, splits, asked, params, extras)
        classes = class_vectors(texts, len(splits.classes))
        rank = ranks(images.features, classes, images.labels, np.arange(len(classes)))
        found = {"zeroshot/accuracy": float(np.mean(rank == 0))}
        if len(classes) > TOP:
            found["zeroshot/accuracy_5"] = float(np.mean(rank < TOP))
        most = np.bincount(images.labels).max()
        return found | {"zeroshot/chance": float(most / len(images.labels))}

    return run


def _check(templates) -> tuple[str, ...]:
    """One template or a sequence of them -> a tuple."""
    items = (templates,) if isinstance(templates, str) else tuple(templates)
    for item in items or ("",):
        if not isinstance(item, str) or "{}" not in item:
            raise UserError(
                f"config.eval.zeroshot.templates holds {item!r}; give texts with {{}} in the "
                "place of the class name (a comma on the command line separates templates)"
            )
    return items


def prompts(classes, templates) -> list[str]:
    """Every class name in every template, class by class."""
    names = [name.replace("_", " ") for name in classes]
    return [template.replace("{}", name) for name in names for template in templates]


def class_vectors(texts, num_classes: int):
    """texts [C * T, E] of unit length, class by class -> their means at unit length [C, E]."""
    mean = texts.reshape(num_classes, -1, texts.shape[-1]).mean(axis=1)
    return mean / np.maximum(np.linalg.norm(mean, axis=-1, keepdims=True), 1e-12)
