"""Questions about images, answered by one of a list of answers, as BEiT-3 learns VQAv2.

Each answer is told to be right or wrong by itself: binary cross-entropy, summed over the answers,
the mean over the batch (`beit3/engine_for_finetuning.py`). VQAv2 has ten annotators a question, of
whom 1, 2, 3 or more make an answer 0.3, 0.6, 0.9 or 1 right. A record here has one answer, its
label, and that is 1 right; the others are 0.
"""

import jax
import jax.numpy as jnp

from bivl.core.objective import Objective
from bivl.modalities import questions
from bivl.models.heads import AnswerHead
from bivl.objectives import answering


def make(config) -> Objective:
    """Reads `modality model image_size pair augment tokenizer num_classes dtype`."""
    head = AnswerHead(config.num_classes, config.model.eps, config.dtype)
    return answering.objective(config, head, questions.ONE, lambda batch: batch, mean_loss)


def mean_loss(logits, right):
    """Logits [B, C] and answers int [B], or how right each answer is, [B, C] in [0, 1] -> binary
    cross-entropy, the sum over answers, the mean over the batch."""
    logits = logits.astype(jnp.float32)
    if right.ndim == 1:
        right = jax.nn.one_hot(right, logits.shape[-1])
    told = right * jax.nn.log_sigmoid(logits) + (1 - right) * jax.nn.log_sigmoid(-logits)
    return -told.sum(-1).mean()
