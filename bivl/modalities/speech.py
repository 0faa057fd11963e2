"""Speech: host operations from records to waveforms, and the embedding from waveforms to frames.

Config keys read here: batch_size, audio.{length, normalize, crop}, mask_ratio, masking,
model.{width, num_heads, extractor, position_conv, embed_init, alibi}.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.data import audio, masking, sequence_masking
from bivl.modalities import given, labels
from bivl.models.convolutions import ConvolutionalPositions, Extractor, output_length
from bivl.models.heads import mean_content
from bivl.models.layers import (
    LayerNorm,
    Projection,
    Vector,
    constrain_tokens,
    gather_kept,
    spread,
    torch_uniform,
)
from bivl.models.positions import Alibi
from bivl.models.transformer import Tokens

RATE = 16_000  # samples a second
MASKINGS = ("span", "inverse_block", "random")


def num_frames(config, samples):
    """Frames that the extractor makes of `samples` (a number or an array)."""
    e = config.model.extractor
    if len(e.kernels) != len(e.strides) or not e.kernels:
        raise UserError("config.model.extractor needs as many strides as kernels, at least one")
    return output_length(samples, e.kernels, e.strides)


def grid(config) -> tuple[int]:
    """Frames of a training example, 50 a second."""
    frames = num_frames(config, config.audio.length)
    if frames < 8:
        raise UserError(
            f"config.audio.length={config.audio.length} samples make {frames} frames; "
            f"{RATE} are a second"
        )
    return (frames,)


def mask_sampler(config):
    """-> function (rng, valid frames) -> the mask arrays of one example, of fixed shapes."""
    (frames,) = grid(config)
    if choice("masking.kind", config.masking.kind, MASKINGS) != "span":
        draw = masking.sampler(config, grid(config))
        return lambda rng, valid: draw(rng)
    return masking.configured(_spans, config, frames)


def _spans(ratio: float, frames: int, span: int, equal: int, fill: str = "learned"):
    """Spans over the valid frames, and a random order in which `device_ops` takes the surplus away.

    equal: rows at a time that mask equal shares of their frames, 0: none do. fill: masked frames
    become a `learned` vector, or `zero`.
    """
    choice("masking.fill", fill, ("learned", "zero"))

    def sample(rng, valid):
        mask = np.zeros(frames, bool)
        mask[:valid] = sequence_masking.frame_spans(rng, valid, ratio, span)
        order = {"order": rng.permutation(frames).astype(np.int32)} if equal else {}
        return {"mask": mask} | order

    return sample


def inputs(config) -> dict[str, jax.ShapeDtypeStruct]:
    """audio float32 [B, T] and its length int32 [B], both in samples."""
    audios = {"audio": ((config.audio.length,), jnp.float32), "length": ((), jnp.int32)}
    B = config.batch_size
    return {k: jax.ShapeDtypeStruct((B, *shape), dtype) for k, (shape, dtype) in audios.items()}


def spec(config) -> dict[str, jax.ShapeDtypeStruct]:
    """`inputs` and what the mask sampler gives: mask bool [B, L] and order int32 [B, L], or for M
    clones mask bool [B, M, L] and keep int32 [B, M, K]."""
    B = config.batch_size
    masks = mask_sampler(config)(np.random.default_rng(0), *grid(config))
    shapes = {name: jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for name, x in masks.items()}
    return inputs(config) | shapes


def waveform(config, record) -> np.ndarray:
    """The record's samples at 16 kHz, normalised over the whole utterance where the config says."""
    if "audio" not in record:
        raise UserError(
            "the data has no audio; set config.data.fields.audio to the feature that holds it "
            f"(a record has {sorted(record)})"
        )
    x = audio.decode_audio(record["audio"], RATE)
    return audio.normalize(x) if config.audio.normalize else x


def train_ops(config):
    """record, rng -> {audio, length, mask, ...}: a random crop, short utterances padded."""
    sample, length = mask_sampler(config), config.audio.length

    def ops(record, rng):
        x, valid = audio.crop_or_pad(waveform(config, record), length, rng)
        masks = sample(rng, max(int(num_frames(config, valid)), 1))
        return {"audio": x, "length": np.int32(valid)} | masks

    return ops


def eval_ops(config):
    """record -> {audio, length, label?, id?}: the head of the utterance, padded."""

    def ops(record):
        x, valid = audio.crop_or_pad(waveform(config, record), config.audio.length)
        kept = {k: labels.number(record[k]) for k in ("label", "id") if k in record}
        return {"audio": x, "length": np.int32(valid)} | kept

    return ops


def labelled_ops(config):
    """record, rng -> {audio, length, label} for fine-tuning: a random crop."""

    def ops(record, rng):
        label = labels.target(record, config.num_classes)
        x, valid = audio.crop_or_pad(waveform(config, record), config.audio.length, rng)
        return {"audio": x, "length": np.int32(valid), "label": label}

    return ops


def preprocess(config):
    """audio=[...] (float arrays at 16 kHz, or paths) -> {audio float32 [B, T], padding bool
    [B, T]}, T that of the longest, whole seconds; padding True behind an utterance's end."""

    def ops(audio):
        rows = given.each("audio", audio, lambda x: waveform(config, {"audio": x}))
        length = -(-max(map(len, rows)) // RATE) * RATE
        batch = np.zeros((len(rows), length), np.float32)
        padding = np.ones((len(rows), length), bool)
        for i, x in enumerate(rows):
            batch[i, : len(x)], padding[i, : len(x)] = x, False
        return {"audio": batch, "padding": padding}

    return ops


def device_ops(config):
    """batch -> batch with final masks, inside the compiled step.

    Spans: every row keeps as large a share of its frames masked as the row with the smallest of
    the `masking.equal` that stand together, chosen by its random order. wav2vec 2.0
    (`require_same_masks`) does so among the crops of one GPU, and makes the counts equal, which is
    the same among rows of one length; a short, padded row would else unmask all the others.
    Clones: frames of padding are scored nowhere.
    """

    def equalize(batch):
        if "order" not in batch:
            return batch
        mask, valid = batch["mask"], jnp.maximum(num_frames(config, batch["length"]), 1)
        together = jnp.arange(len(mask)) // config.masking.equal
        share = jax.ops.segment_min(mask.sum(1) / valid, together, len(mask))[together]
        count = jnp.maximum(jnp.round(share * valid).astype(jnp.int32), 1)
        rank = jnp.where(mask, batch["order"], mask.shape[1])
        limit = jnp.take_along_axis(jnp.sort(rank, axis=1), count[:, None] - 1, 1)
        return batch | {"mask": mask & (rank <= limit)}

    def hide(batch):
        valid = jnp.arange(*grid(config)) < num_frames(config, batch["length"])[:, None]
        return batch | {"mask": batch["mask"] & valid[:, None]}

    return hide if config.masking.kind in masking.SAMPLERS else equalize


def pool(tokens, layout: Tokens):
    """Mean over the valid frames, [B, L, D] -> [B, D]."""
    return mean_content(tokens, layout)


class Embed(nn.Module):
    """Waveforms to frames: extractor, LayerNorm, projection, masks, convolutional positions.

    `clones` False (data2vec 1.0): masked frames hold a learned vector (or zeros, without
    `mask_token`), and the positions are those of the masked input. True (2.0): positions are those
    of the input with its masked frames zeroed, and only kept frames go on, M clones of each
    example, [B M, K, D]. `channels` bool [B, D] in a masked batch zeroes channels, as fine-tuning
    does. `frozen`: no gradient reaches the extractor.
    """

    width: int
    num_heads: int
    extractor: Extractor
    positions: ConvolutionalPositions
    clones: bool
    mask_token: bool
    alibi: bool
    frozen: bool
    dtype: str

    def setup(self):
        init = torch_uniform(self.extractor.width)
        options = {"kernel_init": init, "bias_init": init, "dtype": self.dtype}
        self.norm = LayerNorm(1e-5, self.dtype)
        self.projection = Projection((self.width,), (None, "embed"), **options)
        if self.mask_token:
            self.fill = Vector((self.width,), ("embed",), nn.initializers.uniform(1.0))
        if self.alibi:
            self.bias = Alibi(self.num_heads)

    def __call__(self, batch, masked: bool = False, deterministic: bool = True) -> Tokens:
        x, padding = self.features(batch)
        if masked and self.clones:
            return self._kept(x, padding, batch)
        if masked:
            fill = spread(self.fill(), x) if self.mask_token else 0
            x = jnp.where(batch["mask"][..., None], fill, x)
        if masked and "channels" in batch:
            x = jnp.where(batch["channels"][:, None], 0, x)
        x = jnp.where(padding[..., None], 0, x)
        x = x + self.positions(x)
        places = jnp.broadcast_to(jnp.arange(x.shape[1]), x.shape[:2])
        return self._tokens(x, places, padding)

    def features(self, batch):
        """-> frames [B, L, D] before masks and positions, padding bool [B, L]."""
        x = self.extractor(batch["audio"])
        x = self.projection(self.norm(jax.lax.stop_gradient(x) if self.frozen else x))
        samples = batch["length"] if "length" in batch else (~batch["padding"]).sum(1)
        frames = output_length(samples, self.extractor.kernels, self.extractor.strides)
        return x, jnp.arange(x.shape[1]) >= frames[:, None]

    def _kept(self, x, padding, batch):
        keep = batch["keep"]
        x = jnp.where(padding[..., None], 0, x)
        seen = jnp.zeros(keep.shape[:2] + x.shape[1:2], bool)
        seen = jnp.put_along_axis(seen, keep, True, axis=2, inplace=False)
        zeroed = jnp.where(seen[..., None], x[:, None], 0).reshape(-1, *x.shape[1:])
        at = jnp.take_along_axis(self.positions(zeroed), keep.reshape(-1, keep.shape[2], 1), axis=1)
        padding = jnp.take_along_axis(padding[:, None], keep, 2).reshape(at.shape[:2])
        return self._tokens(gather_kept(x, keep) + at, keep.reshape(padding.shape), padding)

    def _tokens(self, x, places, padding):
        bias = self.bias(places) if self.alibi else None
        return Tokens(constrain_tokens(x), special=0, bias=bias, padding=padding)


def make_embed(config, dtype: str) -> Embed:
    """The embedding that `config` describes."""
    m = config.model
    if m.width % m.position_conv.groups:
        raise UserError(
            f"config.model.width={m.width} is not a multiple of "
            f"model.position_conv.groups={m.position_conv.groups}"
        )
    return Embed(
        m.width,
        m.num_heads,
        Extractor(m.extractor.width, tuple(m.extractor.kernels), tuple(m.extractor.strides), dtype),
        ConvolutionalPositions(**m.position_conv, dtype=dtype),
        config.masking.kind in masking.SAMPLERS,
        config.masking.kind == "span" and config.masking.get("fill", "learned") == "learned",
        m.alibi,
        m.get("freeze_extractor", False),
        dtype,
    )
