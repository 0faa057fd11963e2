"""The predict functions that every objective with one encoder shares."""

import jax.numpy as jnp


def predictions(encode, modality, config) -> dict:
    """`features`, `encode`, `attention` from `encode(params, batch, collect) -> (Tokens, Encoded)`.

    features: mean over valid content tokens after the final norm, float32 [B, D];
    encode: what `Model.encode` returns; attention: the first token's over the content, [B, H, ...].
    """

    def encoded(params, extras, batch):
        tokens, out = encode(params, batch, ("layers",))
        pooled = modality.pool(out.tokens, tokens)
        result = {"tokens": out.tokens, "pooled": pooled, "layers": out.layers}
        return result if tokens.padding is None else result | {"padding": tokens.padding}

    def features(params, extras, batch):
        tokens, out = encode(params, batch, ())
        content = out.tokens[:, tokens.special :].astype(jnp.float32)
        if tokens.padding is None:
            return content.mean(1)
        real = ~tokens.padding[:, tokens.special :, None]
        return (content * real).sum(1) / jnp.maximum(real.sum(1), 1)

    def attention(params, extras, batch):
        tokens, out = encode(params, batch, ("weights",))
        first = out.weights[-1][:, :, 0, tokens.special :]
        return first.reshape(*first.shape[:2], *modality.grid(config))

    return {"features": features, "encode": encoded, "attention": attention}
