"""Fine-tuning to classes or a number: images, texts, pairs of texts, utterances.

Images as data2vec fine-tunes them (data2vec_vision's `run_class_finetuning.py`, fairseq's
`models/mae_image_classification.py`): mean of the patches, RandAugment, erasing, Mixup, CutMix and
smoothing. Texts as RoBERTa does (fairseq `examples/roberta/config/finetuning`): a tanh head on the
first token. num_classes=1 is regression by squared error. `image_text` models classify images alone
(BEiT-3's `modeling_finetune.py`).
"""

import importlib

import jax
import jax.numpy as jnp
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.core.objective import Objective
from bivl.modalities import image
from bivl.models.heads import ClassificationHead
from bivl.models.multiway import Multiway, MultiwayConfig
from bivl.models.transformer import Encoder, EncoderConfig
from bivl.objectives import encoding, mixing

IMAGES = ("image", "image_text")


class Classifier(nn.Module):
    """Embed, encoder and classification head; `embed` and `trunk` are those of pre-training."""

    embed: nn.Module
    encoder: EncoderConfig
    head: ClassificationHead

    def setup(self):
        multiway = isinstance(self.encoder, MultiwayConfig)
        self.trunk = (Multiway if multiway else Encoder)(self.encoder)

    def encode(self, batch, deterministic: bool = True, collect=()):
        """-> (Tokens, Encoded)."""
        tokens = self.embed(batch, False, deterministic)
        return tokens, self.trunk(tokens, deterministic, collect)

    def __call__(self, batch, deterministic: bool = True):
        """Logits [B, C] in float32."""
        tokens, encoded = self.encode(batch, deterministic)
        return self.head(encoded.tokens, tokens, deterministic)


def make(config) -> Objective:
    """Reads `modality model num_classes label_scale classifier smoothing augment dtype text`.

    Regression learns labels times `label_scale`; predict["logits"] is in the labels' own unit.
    """
    check(config)
    modality = importlib.import_module(f"bivl.modalities.{config.modality}")
    shown, images = shortened(config), config.modality in IMAGES
    records = image if images else modality
    inputs, classes = records.inputs(shown), config.num_classes
    scale = config.label_scale if classes == 1 else 1
    unit = jnp.float32 if classes == 1 else jnp.int32
    spec = inputs | {"label": jax.ShapeDtypeStruct((config.batch_size,), unit)}
    if images:
        spec["erase"] = jax.ShapeDtypeStruct((config.batch_size, 4), jnp.int32)
    head = ClassificationHead(classes, **config.classifier, eps=config.model.eps)
    kind = MultiwayConfig if config.modality == "image_text" else EncoderConfig
    encoder = kind.of(config.model, config.dtype)
    model = Classifier(modality.make_embed(config, config.dtype), encoder, head)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in inputs.items()}
        return model.init({"params": key}, batch)["params"], {}, {}

    def loss(params, extras, batch, targets, key):
        rest, wanted = {name: batch[name] for name in inputs}, batch["label"]
        if images:
            rest["image"], wanted = augmented(config, batch, jax.random.fold_in(key, 1))
        rngs = {"dropout": key}
        logits = model.apply({"params": params}, rest, deterministic=False, rngs=rngs)
        value = each_loss(logits, wanted * scale, config.smoothing).mean()
        metrics = {} if classes == 1 else {"train_accuracy": agreement(logits, wanted)}
        return value, {"weight": jnp.float32(len(logits)), "metrics": metrics}

    def encode(params, batch, collect):
        return model.apply({"params": params}, batch, collect=collect, method="encode")

    def logits(params, extras, batch):
        return jnp.divide(model.apply({"params": params}, batch), scale)

    predict = encoding.predictions(encode, modality, config) | {"logits": logits}
    ops = records.labelled_ops(shown), records.eval_ops(shown), records.preprocess(shown)
    return Objective(spec, init, no_targets, loss, no_update, predict, *ops, checked(classes))


def checked(num_classes: int):
    """-> function source -> source; UserError where its labels have more names than classes."""

    def same(source):
        names = source.classes or ()
        if num_classes > 1 and len(names) > num_classes:
            raise UserError(
                f"config.num_classes={num_classes} but the data has {len(names)} classes "
                f"({source.title}); set config.num_classes={len(names)}"
            )
        return source

    return same


def no_targets(params, teacher, extras, batch, key):
    """Supervised objectives have their targets in the batch."""
    return {}


def no_update(teacher, extras, params, aux, step):
    """... and no teacher."""
    return teacher, extras, {}


def shortened(config):
    """The config of the inputs: texts are padded to `text.input_length` tokens, and not to the
    `text.length` for which pre-training made positions."""
    if config.modality != "text":
        return config
    length, most = config.text.input_length, config.text.length
    if not 4 <= length <= most:
        raise UserError(
            f"config.text.input_length={length} must lie between 4 and text.length={most}"
        )
    shown = config.copy_and_resolve_references()
    shown.text.length = length
    return shown


def check(config) -> None:
    """UserError for settings that cannot be."""
    if config.num_classes < 1:
        raise UserError(f"config.num_classes={config.num_classes} must be 1 (regression) or more")
    if not 0 <= config.smoothing < 1:
        raise UserError(f"config.smoothing={config.smoothing} must lie in [0, 1)")
    if not config.label_scale > 0:
        raise UserError(f"config.label_scale={config.label_scale} must be positive")
    choice("classifier.pool", config.classifier.pool, ("mean", "first"))
    if config.num_classes == 1 and config.modality in IMAGES:
        raise UserError("config.num_classes=1 is regression, which Mixup does not know; use texts")


def augmented(config, batch, key):
    """Normalised images erased and mixed, with soft targets [B, C]."""
    a, (key_erase, key_mix) = config.augment, jax.random.split(key)
    images = image.normalized(batch["image"], config.image_mean, config.image_std)
    images = mixing.erase(images, batch["erase"], key_erase)
    return mixing.mix(
        images,
        batch["label"],
        config.num_classes,
        key_mix,
        a.mixup,
        a.cutmix,
        a.mix_probability,
        a.mix_switch,
        config.smoothing,
    )


def each_loss(logits, wanted, smoothing: float):
    """Logits [B, C] and labels int [B] or soft targets [B, C] -> cross-entropy [B] in nats; with
    one output and float labels [B], squared error [B]."""
    logits = logits.astype(jnp.float32)
    if logits.shape[-1] == 1:
        return jnp.square(logits[:, 0] - wanted)
    if wanted.ndim == 1:
        wanted = mixing.smooth_labels(wanted, logits.shape[-1], smoothing)
    return -(wanted * jax.nn.log_softmax(logits)).sum(-1)


def agreement(logits, wanted):
    """Share of examples whose likeliest class is the (soft) target's."""
    best = wanted if wanted.ndim == 1 else wanted.argmax(-1)
    return (logits.argmax(-1) == best).mean()
