"""Texts: host operations from records to token ids, and the embedding from ids to tokens.

Config keys read here: batch_size, tokenizer, text.{length, break_mode, cache}, mask_ratio, masking,
model.{width, dropout, embed_dropout}, target.input.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from bivl.core.config import choice
from bivl.core.errors import UserError
from bivl.data import masking, packing, sequence_masking, tokenizers
from bivl.modalities import labels
from bivl.models.layers import (
    Embedding,
    LayerNorm,
    Vector,
    constrain_tokens,
    gather_kept,
)
from bivl.models.transformer import Tokens

POSITION_OFFSET = 2  # the first token stands at 2, pads at 1 (fairseq's `make_positions`)


def grid(config) -> tuple[int]:
    """Tokens in a row, special ones included."""
    if config.text.length < 4:
        raise UserError(f"config.text.length={config.text.length} must be at least 4 tokens")
    return (config.text.length,)


def keeps_all(config) -> bool:
    """Whether masked tokens stay in their places (data2vec 1.0) and are not left out (2.0)."""
    return config.masking.kind in CORRUPTIONS


def mask_sampler(config):
    """-> function (rng, ids int32 [n]) -> the mask arrays of one example, of fixed shapes."""
    kinds = (*CORRUPTIONS, "inverse_block", "random")
    if choice("masking.kind", config.masking.kind, kinds) not in CORRUPTIONS:
        draw = masking.sampler(config, grid(config))
        return lambda rng, ids: draw(rng)
    tokenizer, length = tokenizers.load(config.tokenizer), config.text.length
    corrupt = masking.configured(CORRUPTIONS[config.masking.kind], config, tokenizer)

    def sample(rng, ids):
        inputs, mask = corrupt(rng, ids)
        whole = np.zeros(length, bool)
        whole[: len(ids)] = mask
        return {"inputs": padded(inputs, length, tokenizer.pad), "mask": whole}

    return sample


def _spans(ratio: float, tokenizer, span: int):
    """-> (rng, ids) -> (ids with spans masked, mask): the recipe that data2vec ships for text."""

    def corrupt(rng, ids):
        mask = sequence_masking.text_spans(rng, len(ids), ratio, span)
        return np.where(mask, tokenizer.mask, ids), mask

    return corrupt


def _bert(ratio: float, tokenizer, kept: float, randomized: float, score: str):
    """BERT's masks. score: `masked` regresses only where the input is the mask token, as the code
    does; `all` also where it was kept or replaced, as the paper says."""
    choice("masking.score", score, ("masked", "all"))
    ordinary = np.setdiff1d(np.arange(tokenizer.size), tokenizer.special)

    def corrupt(rng, ids):
        mask, same, random = sequence_masking.bert_mask(rng, len(ids), ratio, kept, randomized)
        inputs = np.where(mask & ~same, tokenizer.mask, ids)
        inputs = np.where(random, rng.choice(ordinary, len(ids)), inputs)
        return inputs, mask if score == "all" else mask & ~same & ~random

    return corrupt


def _beit3(ratio: float, tokenizer, kept: float, randomized: float):
    """As BEiT-3 masks captions for fine-tuning (`beit3/datasets.py`), which its pre-training is
    taken to share: round(ratio n) tokens, at least one and not all, never the first, <s>; a random
    token may be any but <s>, <pad> and </s>. All of them are scored."""

    def corrupt(rng, ids):
        n, mask = len(ids), np.zeros(len(ids), bool)
        count = min(max(round(ratio * n), 1), max(n - 1, 0))
        mask[1 + rng.permutation(max(n - 1, 0))[:count]] = True
        fate = rng.random(n)
        inputs = np.where(mask & (fate >= kept + randomized), tokenizer.mask, ids)
        random = mask & (fate < randomized)
        ordinary = rng.choice(np.setdiff1d(np.arange(tokenizer.size), tokenizer.special[:3]), n)
        return np.where(random, ordinary, inputs), mask

    return corrupt


CORRUPTIONS = {"span": _spans, "bert": _bert, "beit3": _beit3}


def padded(ids, length: int, pad: int) -> np.ndarray:
    """ids [n] with pads behind them: int32 [length]."""
    out = np.full(length, pad, np.int32)
    out[: len(ids)] = ids
    return out


def inputs(config) -> dict[str, jax.ShapeDtypeStruct]:
    """tokens int32 [B, L], pads at the end."""
    return {"tokens": jax.ShapeDtypeStruct((config.batch_size, *grid(config)), jnp.int32)}


def spec(config) -> dict[str, jax.ShapeDtypeStruct]:
    """`inputs` and what the mask sampler gives: inputs int32 [B, L] (tokens with the masked ones
    replaced) and mask bool [B, L], or for M clones mask bool [B, M, L] and keep int32
    [B, M, K]."""
    masks = mask_sampler(config)(np.random.default_rng(0), np.zeros(*grid(config), np.int32))
    B = config.batch_size
    shapes = {name: jax.ShapeDtypeStruct((B, *x.shape), x.dtype) for name, x in masks.items()}
    return inputs(config) | shapes


def examples(config):
    """-> function source of texts -> source of blocks of at most `text.length` tokens."""
    choice("text.break_mode", config.text.break_mode, packing.BREAK_MODES)

    def pack(source):
        t, tokenizer = config.text, tokenizers.load(config.tokenizer)
        return packing.pack(source, tokenizer, t.length, t.break_mode, t.cache or None)

    return pack


def train_ops(config):
    """{tokens}, rng -> {tokens, mask, ...} of fixed shapes."""
    sample, length = mask_sampler(config), config.text.length
    pad = tokenizers.load(config.tokenizer).pad

    def ops(record, rng):
        ids = record["tokens"]
        return {"tokens": padded(ids, length, pad)} | sample(rng, ids)

    return ops


def encode_pair(tokenizer, text: str, pair: str | None, length: int) -> np.ndarray:
    """`<s> text </s>` or `<s> text </s> </s> pair </s>` as int32 [n], n <= length (RoBERTa).

    What is too long is cut at the end, the longer of the two first.
    """
    first = tokenizer.encode(text)
    second = None if pair is None else tokenizer.encode(pair)
    ends = 2 if second is None else 4
    if second is not None:
        short = min(len(first), len(second), (length - ends) // 2)
        first = first[: max(length - ends - len(second), short)]
        second = second[: length - ends - len(first)]
    first = first[: length - ends]
    parts = [[tokenizer.bos], first, [tokenizer.eos]]
    parts += [] if second is None else [[tokenizer.eos], second, [tokenizer.eos]]
    return np.concatenate(parts).astype(np.int32)


def record_ids(tokenizer, record, length: int) -> np.ndarray:
    """The ids of a record: a packed block's `tokens`, or its `text` (and `text_pair`)."""
    if "tokens" in record:
        return record["tokens"]
    if "text" not in record:
        raise UserError(
            "the data has no text; set config.data.fields.text to the feature that holds it "
            f"(a record has {sorted(record)})"
        )
    return encode_pair(tokenizer, record["text"], record.get("text_pair"), length)


def eval_ops(config):
    """record -> {tokens, label?, id?}: the text from its start, cut at `text.length` tokens."""
    tokenizer, length = tokenizers.load(config.tokenizer), config.text.length

    def ops(record):
        kept = {k: labels.number(record[k]) for k in ("label", "id") if k in record}
        ids = record_ids(tokenizer, record, length)
        return {"tokens": padded(ids, length, tokenizer.pad)} | kept

    return ops


def labelled_ops(config):
    """record, rng -> {tokens, label} for fine-tuning."""
    encode = eval_ops(config)

    def ops(record, rng):
        del rng
        label = labels.target(record, config.num_classes)
        return {"tokens": encode(record)["tokens"], "label": label}

    return ops


def preprocess(config):
    """text=[...] (and text_pair=[...]) -> {tokens int32 [B, L], padding bool [B, L], True = pad},
    L the longest of the batch, at most `text.length`."""
    tokenizer, length = tokenizers.load(config.tokenizer), config.text.length

    def ops(text, text_pair=None):
        pairs = text_pair or [None] * len(text)
        if isinstance(text, str) or not len(text) or len(pairs) != len(text):
            raise UserError("preprocess wants text=[...], and as many in text_pair where given")
        rows = [encode_pair(tokenizer, a, b, length) for a, b in zip(text, pairs, strict=True)]
        tokens = np.stack([padded(ids, max(map(len, rows)), tokenizer.pad) for ids in rows])
        return {"tokens": tokens, "padding": tokens == tokenizer.pad}

    return ops


def teacher_input(config):
    """batch -> the batch that the teacher sees; config.target.input says which.

    `full`: the whole text, as the paper says. `masked`: only the ids under the mask, pads
    elsewhere, as fairseq's code has it (its `target_tokens` are the labels of masked language
    modeling), so that positions are counted over masked tokens alone.
    """
    pad = tokenizers.load(config.tokenizer).pad
    if choice("target.input", config.target.input, ("full", "masked")) == "full":
        return lambda batch: batch
    if not keeps_all(config):
        raise UserError("config.target.input='masked' is of data2vec 1.0; use full")
    return lambda batch: batch | {"tokens": jnp.where(batch["mask"], batch["tokens"], pad)}


def pool(tokens, layout: Tokens):
    """The first token, <s>: [B, L, D] -> [B, D], which RoBERTa's classifiers read."""
    del layout
    return tokens[:, 0]


def _pad_row(init, row: int):
    """`init` with one row of the table zero, which no gradient reaches."""

    def rows(key, shape, dtype=jnp.float32):
        return init(key, shape, dtype).at[row].set(0)

    return rows


class Embed(nn.Module):
    """Ids to tokens: embedding plus learned position, LayerNorm, dropout; pads are zeros.

    `clones`: a masked input leaves masked tokens out, M clones of each example [B M, K, D] that
    share one dropout (data2vec 2.0); else it reads the corrupted `inputs` (data2vec 1.0).
    """

    vocabulary: int
    length: int
    pad: int
    width: int
    clones: bool
    dropout: float
    eps: float
    dtype: str

    @nn.compact
    def __call__(self, batch, masked: bool = False, deterministic: bool = True) -> Tokens:
        ids = batch["inputs"] if masked and not self.clones else batch["tokens"]
        padding = ids == self.pad
        places = jnp.where(padding, 0, jnp.cumsum(~padding, axis=1)) + POSITION_OFFSET - 1
        init, options = nn.initializers.normal(0.02), {"dtype": self.dtype}
        embed = Embedding(
            self.vocabulary, self.width, _pad_row(init, self.pad), name="tokens", **options
        )
        shape = (self.length + POSITION_OFFSET, self.width)
        at = Vector(shape, (None, "embed"), _pad_row(init, POSITION_OFFSET - 1), name="positions")()
        x = embed(ids) + jnp.take(at, places, axis=0).astype(self.dtype)
        x = LayerNorm(self.eps, self.dtype, name="norm")(x)
        x = nn.Dropout(self.dropout)(x, deterministic)
        x = jnp.where(padding[..., None], 0, x)
        if masked and self.clones:
            keep = batch["keep"]
            x = gather_kept(x, keep)
            padding = jnp.take_along_axis(padding[:, None], keep, 2).reshape(x.shape[:2])
        return Tokens(constrain_tokens(x), special=0, padding=padding)


def make_embed(config, dtype: str) -> Embed:
    """The embedding that `config` describes."""
    m, tokenizer = config.model, tokenizers.load(config.tokenizer)
    return Embed(
        tokenizer.size,
        config.text.length,
        tokenizer.pad,
        m.width,
        not keeps_all(config),
        m.embed_dropout,
        m.eps,
        dtype,
    )
