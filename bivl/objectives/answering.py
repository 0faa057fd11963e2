"""What VQA and NLVR2 share: a multiway encoder under a head that reads images and a text together.

microsoft/unilm `beit3/modeling_finetune.py` and `engine_for_finetuning.py`.
"""

import jax
import jax.numpy as jnp

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.modalities import image_text, questions
from bivl.models.multiway import MultiwayConfig
from bivl.objectives import encoding
from bivl.objectives.classify import Classifier, agreement, checked, no_targets, no_update


def objective(config, head, names, seen, mean_loss) -> Objective:
    """The objective of a head.

    names: the images that are read; seen: batch -> the batch that the encoder gets; mean_loss:
    (logits [B, C], labels [B]) -> their loss. predict, besides `logits`, is of the pair of `image`
    and the text, or of the one that there is: `features` (the mean after the encoder of what is
    neither CLS nor pad), `encode`, and `attention` of CLS to the patches.
    """
    choice("modality", config.modality, ("image_text",))
    if config.num_classes < 2:
        raise UserError(f"config.num_classes={config.num_classes} must be 2 or more")
    inputs, (B, classes) = questions.inputs(config, names), (config.batch_size, config.num_classes)
    encoder = MultiwayConfig.of(config.model, config.dtype)
    model = Classifier(image_text.make_embed(config, config.dtype), encoder, head)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in inputs.items()}
        return model.init({"params": key}, seen(batch))["params"], {}, {}

    def loss(params, extras, batch, targets, key):
        del extras, targets
        options = {"deterministic": False, "rngs": {"dropout": key}}
        logits = model.apply({"params": params}, seen(batch), **options)
        metrics = {"train_accuracy": agreement(logits, batch["label"])}
        aux = {"weight": jnp.float32(len(logits)), "metrics": metrics}
        return mean_loss(logits, batch["label"]), aux

    def encode(params, batch, collect):
        return model.apply({"params": params}, batch, collect=collect, method="encode")

    def attention(params, extras, batch):
        tokens, out = encode(params, batch, ("weights",))
        first = out.weights[-1][:, :, 0, 1 : tokens.images]
        return first.reshape(*first.shape[:2], *image_text.grid(config))

    def logits(params, extras, batch):
        for name in inputs:
            if name not in batch:
                what = {"tokens": "text"}.get(name, name)
                raise UserError(
                    f"the batch has no {what}, which the answer depends on; set "
                    f"config.data.fields.{what}, or pass {what}=[...]"
                )
        return model.apply({"params": params}, seen(batch))

    predict = encoding.predictions(encode, image_text, config)
    predict |= {"attention": attention, "logits": logits}
    spec = inputs | {"label": jax.ShapeDtypeStruct((B,), jnp.int32)}
    ops = questions.labelled_ops(config, names), questions.eval_ops(config, names)
    further = questions.preprocess(config, names), checked(classes)
    return Objective(spec, init, no_targets, loss, no_update, predict, *ops, *further)
