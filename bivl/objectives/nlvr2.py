"""Whether a statement about two images is true, as BEiT-3 learns NLVR2.

Each image is read with the text, two rows of one batch; the head reads CLS and `<s>` of both rows
(`beit3/modeling_finetune.py`). Cross-entropy.
"""

import jax.numpy as jnp

from bivl.core.objective import Objective
from bivl.modalities import questions
from bivl.models.heads import ComparisonHead
from bivl.objectives import answering
from bivl.objectives.classify import each_loss


def make(config) -> Objective:
    """Reads `modality model image_size pair augment tokenizer num_classes classifier.scale dtype`.

    classifier.scale: of both kernels of the head as they begin.
    """
    model, scale = config.model, config.classifier.scale
    head = ComparisonHead(config.num_classes, scale, model.eps, config.dtype)
    return answering.objective(config, head, questions.TWO, in_turns, mean_loss)


def in_turns(batch):
    """Two images and their text [B, ...] -> image and tokens [2 B, ...], the rows of an example
    together, so that they stay on its device."""
    both = jnp.stack([batch[name] for name in questions.TWO], axis=1)
    both = both.reshape(-1, *both.shape[2:])
    return {"image": both, "tokens": jnp.repeat(batch["tokens"], 2, axis=0)}


def mean_loss(logits, labels):
    """Cross-entropy."""
    return each_loss(logits, labels, 0.0).mean()
