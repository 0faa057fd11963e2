"""The predict functions that every objective with one encoder shares."""

from bivl.models import heads


def predictions(encode, modality, config) -> dict:
    """`features`, `encode`, `attention` from `encode(params, batch, collect) -> (Tokens, Encoded)`.

    features: mean over valid content tokens after the final norm, float32 [B, D];
    encode: what `Model.encode` returns; attention (of images): the first token's over the content,
    [B, H, h, w].
    """

    def encoded(params, extras, batch):
        tokens, out = encode(params, batch, ("layers",))
        pooled = modality.pool(out.tokens, tokens)
        result = {"tokens": out.tokens, "pooled": pooled, "layers": out.layers}
        return result if tokens.padding is None else result | {"padding": tokens.padding}

    def features(params, extras, batch):
        tokens, out = encode(params, batch, ())
        return heads.mean_content(out.tokens, tokens)

    def attention(params, extras, batch):
        tokens, out = encode(params, batch, ("weights",))
        first = out.weights[-1][:, :, 0, tokens.special :]
        return first.reshape(*first.shape[:2], *modality.grid(config))

    found = {"features": features, "encode": encoded}
    return found | {"attention": attention} if len(modality.grid(config)) == 2 else found
