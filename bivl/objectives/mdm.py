"""Masked data modeling, BEiT-3's one task: name what is masked in images, texts and pairs.

The pre-training code was never published. The task, the mask rates and the batch are the paper's
(arXiv 2208.10442, section 2.2): in each step as many images, texts and pairs, 40 % of patches
masked block-wise, 15 % of the tokens of texts and 50 % of those of pairs; cross-entropy on the ids
of masked tokens and on the codes of masked patches, by the VQ-KD tokenizer of BEiT v2 on the whole
crop. Nothing is asked of CLS and `<s>`, nor is there contrast or matching.

What the paper leaves open is named in the config, with defaults taken from the authors' other code
(configs/pretrain/beit3.py says which): loss_weights, pair.corrupt, text.masking, pair.masking,
text.break_mode, the lengths, crops and statistics of pixels. The tokenizer sees the image at its
own size, so that a patch size of 14 meets codes of 16 pixels.
"""

import jax
import jax.numpy as jnp

from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.modalities import image_text
from bivl.models.image_text import HeadsConfig
from bivl.objectives import streams
from bivl.objectives.classify import no_update


def make(config) -> Objective:
    """Reads what streams.py reads, and `loss_weights teacher teacher_dtype decoder`."""
    setup = streams.open_streams(config)
    names = tuple(name for name in setup.losses if config.loss_weights[name])
    if not names and config.steps:  # without updates it may be an encoder alone
        raise UserError(
            f"config.loss_weights of {', '.join(setup.losses)} are all 0; raise one of them"
        )
    tokenizer = streams.open_tokenizer(config, names)
    sizes = streams.heads_sizes(config, tokenizer, names)
    heading = HeadsConfig(**sizes, decoder=streams.decoding(config))
    model = setup.model(heading, config.dtype)

    def init(key):
        held = tokenizer.state(jax.random.fold_in(key, 1)) if tokenizer else {}
        return setup.init(model, key), held, {}

    def targets(params, teacher, extras, batch, key):
        return streams.image_codes(tokenizer, teacher, batch, names)

    def loss(params, extras, batch, codes, key):
        totals = batch.get("totals") or setup.totals(batch)
        places = setup.masked(model, params, batch, key)
        wanted = streams.classes_at(places, codes, batch, names)
        losses, metrics = streams.token_losses(model, params, places, wanted, totals)
        value = sum(config.loss_weights[name] * losses[name] for name in names)
        return value, {"weight": jnp.float32(1), "metrics": metrics}

    predict = streams.predictions(model, config, "first")
    ops = image_text.train_ops(config), image_text.eval_ops(config), image_text.preprocess(config)
    return Objective(
        setup.spec,
        init,
        targets,
        loss,
        no_update,
        predict,
        *ops,
        image_text.examples(config),
        totals=setup.totals,
        frozen=tokenizer.checkpoints if tokenizer else {},
    )
