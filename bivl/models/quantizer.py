"""The cosine codebook of VQ-KD: V unit vectors [V, E], moved towards what they stand for.

Formulas: BEiT v2 (arXiv 2208.06366) section 2.1 as `beit2/norm_ema_quantizer.py` of
microsoft/unilm has them: neither a codebook loss nor a restart of unused codes. Everything is
float32 and over the global batch, whatever it is sharded over.
"""

import jax
import jax.numpy as jnp

NEVER = 2**30  # `idle` of a code that was not used yet


def create(key, size: int, width: int) -> dict:
    """A codebook: `vectors` [V, E], random of unit length; `idle` int32 [V], updates since a code
    was last used; `fitted`, whether k-means has been run."""
    vectors = unit(jax.random.normal(key, (size, width)))
    idle = jnp.full((size,), NEVER, jnp.int32)
    return {"vectors": vectors, "idle": idle, "fitted": jnp.zeros((), bool)}


def unit(x):
    """x [..., E] over its length, at least 1e-12, in float32."""
    x = x.astype(jnp.float32)
    return x * jax.lax.rsqrt(jnp.maximum(jnp.square(x).sum(-1, keepdims=True), 1e-24))


def nearest(units, vectors):
    """Unit vectors [..., E] -> int32 [...], the first of the codes with the largest cosine.

    The product is exact float32 on every device: rounded to bfloat16, codes would change.
    """
    cosines = jnp.einsum("...e,ve->...v", units, vectors, precision="highest")
    return cosines.argmax(-1).astype(jnp.int32)


def straight_through(units, chosen):
    """`chosen`, with the gradient of `units`."""
    return units + jax.lax.stop_gradient(chosen - units)


def commitment(units, chosen):
    """Mean over tokens AND E of (stopped chosen - units)^2."""
    return jnp.square(jax.lax.stop_gradient(chosen) - units).mean()


def totals(units, codes, size: int) -> dict:
    """`counts` [V] and `sums` [V, E] of the unit vectors [..., E] of each code: what an update
    needs, and what micro-batches add up."""
    rows, places = units.reshape(-1, units.shape[-1]), codes.reshape(-1)
    counts = jax.ops.segment_sum(jnp.ones(places.shape), places, size)
    return {"counts": counts, "sums": jax.ops.segment_sum(rows, places, size)}


def moved(vectors, found: dict, decay: float):
    """e <- unit(decay e + (1 - decay) unit(s / n)); codes that nothing chose stay as they are."""
    towards = unit(decay * vectors + (1 - decay) * unit(found["sums"]))
    return jnp.where(found["counts"][:, None] > 0, towards, vectors)


def kmeans(units, centres, iterations: int):
    """Cosine k-means of unit vectors [N, E] from centres [V, E]; empty clusters keep theirs.

    One iteration is `moved` with nothing kept.
    """

    def body(_, centres):
        found = totals(units, nearest(units, centres), len(centres))
        return moved(centres, found, 0.0)

    return jax.lax.fori_loop(0, iterations, body, centres)


def fit(key, units, size: int, iterations: int):
    """k-means [V, E] of unit vectors [N, E] from V of them drawn without replacement, N >= V."""
    places = jax.random.choice(key, len(units), (size,), replace=False)
    return kmeans(units, units[places], iterations)


def perplexity(counts):
    """exp of the entropy of counts [V]: V where all codes are equally frequent, 1 where one is."""
    shares = counts / jnp.maximum(counts.sum(), 1)
    return jnp.exp(jax.scipy.special.entr(shares).sum())
