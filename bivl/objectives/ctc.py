"""Fine-tuning to speech recognition: letters by connectionist temporal classification (CTC).

After fairseq's `models/wav2vec/wav2vec2_asr.py` and `examples/wav2vec/config/finetuning`: dropout
and a linear map on every frame, spans of time and of channels masked, the extractor frozen, the
encoder too for the first updates (`optimizer.freeze`), loss averaged over sentences.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import Undecodable, UserError
from bivl.core.objective import Objective
from bivl.data import sequence_masking
from bivl.data.audio import crop_or_pad
from bivl.data.decoding import BLANK, Letters
from bivl.modalities import speech
from bivl.models.layers import Projection
from bivl.models.transformer import Encoder, EncoderConfig
from bivl.objectives import encoding
from bivl.objectives.classify import no_targets, no_update


class Recognizer(nn.Module):
    """Embed, encoder and a linear map to letters; `embed` and `trunk` are those of pre-training."""

    embed: nn.Module
    encoder: EncoderConfig
    classes: int
    dropout: float

    def setup(self):
        self.trunk = Encoder(self.encoder)
        init = nn.initializers.xavier_uniform()
        options = {"kernel_init": init, "dtype": "float32"}
        self.letters = Projection((self.classes,), ("embed", None), **options)
        self.drop = nn.Dropout(self.dropout)

    def encode(self, batch, masked=False, deterministic: bool = True, collect=()):
        """-> (Tokens, Encoded)."""
        tokens = self.embed(batch, masked, deterministic)
        return tokens, self.trunk(tokens, deterministic, collect)

    def __call__(self, batch, masked: bool = False, deterministic: bool = True):
        """-> (log probabilities float32 [B, L, V], padding bool [B, L])."""
        tokens, encoded = self.encode(batch, masked, deterministic)
        logits = self.letters(self.drop(encoded.tokens, deterministic))
        return jax.nn.log_softmax(logits.astype(jnp.float32)), tokens.padding


def transcribed(config, letters, key: str = "length"):
    """-> function record -> {audio, length, transcript int32 [U], padded with blanks}.

    Whole utterances: one that is longer than `audio.KEY` or `max_letters` is Undecodable.
    """
    length = config.audio[key]

    def read(record):
        if "text" not in record:
            raise UserError(
                "the data has no text; set config.data.fields.text to the feature that holds the "
                f"transcripts (a record has {sorted(record)})"
            )
        x, ids = speech.waveform(config, record), letters.encode(record["text"])
        if len(x) > length or len(ids) > config.max_letters:
            raise Undecodable(
                f"{len(x)} samples and {len(ids)} letters are over config.audio.{key}={length} "
                f"or config.max_letters={config.max_letters}; raise these"
            )
        x, valid = crop_or_pad(x, length)
        transcript = np.full(config.max_letters, BLANK, np.int32)
        transcript[: len(ids)] = ids
        return {"audio": x, "length": np.int32(valid), "transcript": transcript}

    return read


def train_ops(config, letters):
    """record, rng -> {audio, length, transcript, mask, order, channels}."""
    read, sample, c = transcribed(config, letters), speech.mask_sampler(config), config.channels

    def ops(record, rng):
        example = read(record)
        frames = max(int(speech.num_frames(config, example["length"])), 1)
        masks = sample(rng, frames)
        width, hidden = config.model.width, np.zeros(config.model.width, bool)
        if c.ratio:
            hidden = sequence_masking.frame_spans(rng, width, c.ratio, c.span)
        return example | masks | {"channels": hidden}

    return ops


def eval_ops(config, letters):
    """record -> {audio, length, transcript, id?}, padded to `audio.eval_length`."""
    read = transcribed(config, letters, "eval_length")

    def ops(record):
        try:
            example = read(record)
        except Undecodable as error:  # a score over part of the data would be no score
            raise UserError(f"record {record.get('id', '?')}: {error}") from error
        return example | {k: np.int32(record[k]) for k in ("id",) if k in record}

    return ops


def ctc_loss(log_probs, padding, transcript):
    """log_probs [B, L, V], padding bool [B, L], transcript int32 [B, U] -> [B], in nats.

    -log of the sum over all alignments (Graves et al. 2006), by optax; 0 where there is none
    (fairseq's `zero_infinity`, which the recipes switch on).
    """
    ends = transcript == BLANK
    losses = optax.ctc_loss(log_probs, padding * 1.0, transcript, ends * 1.0, blank_id=BLANK)
    return jnp.where(alignable(padding, transcript), losses, 0.0)


def alignable(padding, transcript):
    """bool [B]: whether there are frames for every letter, and for a blank between equal ones."""
    real = transcript != BLANK
    doubled = (transcript[:, 1:] == transcript[:, :-1]) & real[:, 1:]
    return real.sum(1) + doubled.sum(1) <= (~padding).sum(1)


def check(config) -> None:
    """UserError for settings that cannot be."""
    if config.modality != "speech":
        raise UserError(f"config.modality={config.modality!r} has no frames to spell; use speech")
    choice("masking.kind", config.masking.kind, ("span",))
    if config.max_letters < 1:
        raise UserError(f"config.max_letters={config.max_letters} must be at least 1")
    for name, value in (
        ("channels.ratio", config.channels.ratio),
        ("ctc_dropout", config.ctc_dropout),
    ):
        if not 0 <= value < 1:
            raise UserError(f"config.{name}={value} must lie in [0, 1)")
    if config.channels.span < 1:
        raise UserError(f"config.channels.span={config.channels.span} must be at least 1")


def make(config) -> Objective:
    """Reads `model audio letters max_letters masking mask_ratio channels ctc_dropout dtype`."""
    check(config)
    letters = Letters(config.letters)
    shapes = {
        "transcript": ((config.max_letters,), jnp.int32),
        "channels": ((config.model.width,), jnp.bool_),
    }
    B = config.batch_size
    extra = {k: jax.ShapeDtypeStruct((B, *shape), dtype) for k, (shape, dtype) in shapes.items()}
    spec = speech.spec(config) | extra
    encoder = EncoderConfig.of(config.model, config.dtype)
    embed = speech.make_embed(config, config.dtype)
    model = Recognizer(embed, encoder, letters.size, config.ctc_dropout)

    def init(key):
        batch = {name: jnp.zeros((1, *s.shape[1:]), s.dtype) for name, s in spec.items()}
        return model.init({"params": key}, batch, True)["params"], {}, {}

    def loss(params, extras, batch, targets, key):
        rngs = {"dropout": key}
        out, padding = model.apply({"params": params}, batch, True, False, rngs=rngs)
        value = ctc_loss(out, padding, batch["transcript"]).mean()
        metrics = {"alignable": alignable(padding, batch["transcript"]).mean()}
        return value, {"weight": jnp.float32(len(batch["audio"])), "metrics": metrics}

    def encode(params, batch, collect):
        return model.apply({"params": params}, batch, collect=collect, method="encode")

    def log_probs(params, extras, batch):
        out, padding = model.apply({"params": params}, batch)
        return out, jnp.logical_not(padding).sum(1)

    predict = encoding.predictions(encode, speech, config) | {"log_probs": log_probs}
    ops = train_ops(config, letters), eval_ops(config, letters), speech.preprocess(config)
    prepare = speech.device_ops(config)
    return Objective(spec, init, no_targets, loss, no_update, predict, *ops, prepare=prepare)
