"""Attention kernels that never hold all L x L weights: cuDNN's on GPU, jax's Pallas one on TPU.

config.model.attention names one for `models/attention.py`'s `attend`. Both take any length: what a
kernel wants in whole blocks is padded with hidden keys and cut again. They have no dropout, return
no weights and learn no bias; `check`, `chosen` and `constant` refuse that, so that training never
runs anything but what its config names.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec

from bivl.core.config import choice
from bivl.core.errors import UserError

PLATFORMS = {"xla": None, "cudnn": "gpu", "flash": "tpu"}  # name: where alone it runs
CUDNN_DTYPES = ("bfloat16", "float16")
LANES = 128  # of a TPU: lengths are padded to whole ones, and cuDNN's where there is a bias
MOST = 512  # tokens in a block of the TPU kernel


def check(model) -> None:
    """UserError where `model`, config.model as a mapping, asks of a kernel what it cannot do."""
    kernel = choice("model.attention", model.get("attention", "xla"), PLATFORMS)
    if kernel == "xla":
        return
    cure = f"model.attention={kernel!r} {{}}; change it, or attention to 'xla'"
    if model.get("attention_dropout", 0):
        dropout = model["attention_dropout"]
        raise UserError(f"config.model.attention_dropout={dropout}: {cure.format('has none')}")
    for name, learned in (("positions", ("relative", "relative_layers")), ("alibi", (True,))):
        if model.get(name) in learned:
            no_bias = cure.format("learns no bias")
            raise UserError(f"config.model.{name}={model[name]!r}: {no_bias}")
    size = model["width"] // model["num_heads"]
    if kernel == "cudnn" and (size % 8 or size > 256):
        wanted = "takes a multiple of 8 up to 256"
    elif kernel == "flash" and size > LANES and size % LANES:
        wanted = f"takes up to {LANES} or a multiple of it"
    else:
        return
    raise UserError(f"config.model.width / num_heads={size}: {cure.format(wanted)}")


def platform() -> str:
    """What the program that is traced is for: the devices of the mesh, else those of jax."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return device.platform if device is not None else jax.default_backend()


def chosen(kernel: str, dtype: str, deterministic: bool, weights: bool = False) -> str:
    """The kernel that one call of an encoder runs.

    It is the config's, except that `xla` runs where attention weights are asked for (evaluation's
    pictures), and, in deterministic calls alone, where the kernel cannot: so a checkpoint of a TPU
    or GPU loads anywhere, in float32 too, and a float32 teacher stands beside a bfloat16 student.
    UserError where a student in training is on another platform or computes in another dtype.
    """
    if kernel == "xla" or weights:
        return "xla"
    here, there = platform(), PLATFORMS[kernel]
    if kernel == "cudnn" and dtype not in CUDNN_DTYPES:
        problem = f"cannot compute in config.dtype={dtype}; use bfloat16"
    elif here != there:
        problem = f"runs on {there}s alone and this is for {here}"
    else:
        return kernel
    if deterministic:
        return "xla"
    raise UserError(f"config.model.attention={kernel!r} {problem}; or set attention to 'xla'")


def attend(kernel: str, q, k, v, bias=None, padding=None):
    """What `models/attention.py`'s `attend` returns first, by `kernel`; see there for the shapes.

    bias is constant: a gradient of it raises UserError. padding: bool [B, L], True = pad.
    """
    if bias is not None:
        bias = constant(kernel, bias.reshape((1,) * (4 - bias.ndim) + bias.shape))
    return over_mesh({"cudnn": cudnn, "flash": flash}[kernel], q, k, v, bias, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def constant(kernel: str, bias):
    """The bias, which must not be learned: its gradient through a kernel would cost all L x L."""
    del kernel
    return bias


def _constant_fwd(kernel, bias):
    del kernel
    return bias, None


def _constant_bwd(kernel, saved, gradient):
    raise UserError(
        f"config.model.attention={kernel!r} learns no attention bias; use 'xla', or other positions"
    )


constant.defvjp(_constant_fwd, _constant_bwd)


def over_mesh(function, q, k, v, bias, padding):
    """`function` on every device's own examples and heads: XLA cannot divide a kernel by itself.

    An axis whose size its devices do not divide (initialisation has one example) stays whole.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.size < 2:  # 0: no mesh
        return function(q, k, v, bias, padding)
    axes = nn.logical_to_mesh_axes(("batch", "heads"))

    def split(x, count):
        """The first `count` axes of x over the mesh."""
        spec = [None] * count
        for i, names in enumerate(axes[:count]):
            names = (names,) if isinstance(names, str) else names or ()
            if x.shape[i] % math.prod(mesh.shape[name] for name in names) == 0:
                spec[i] = names or None
        return PartitionSpec(*spec)

    given = {"q": (q, 2), "k": (k, 2), "v": (v, 2), "bias": (bias, 2), "padding": (padding, 1)}
    given = {name: pair for name, pair in given.items() if pair[0] is not None}
    specs = {name: split(*pair) for name, pair in given.items()}
    run = jax.shard_map(
        lambda inputs: function(**{"bias": None, "padding": None} | inputs),
        in_specs=(specs,),
        out_specs=specs["q"],
        check_vma=False,  # Pallas calls do not say how their outputs vary
    )
    return run({name: x for name, (x, _) in given.items()})


def cudnn(q, k, v, bias, padding):
    """cuDNN's flash attention, for float16 and bfloat16.

    Padding goes as lengths, for pads stand last (`Tokens.padding`); a row of nothing but pads reads
    its first one. jax 0.10 differentiates even lengths alone, although only a bias needs them. A
    bias is wanted in q's dtype (NaN otherwise, jax issue 32242), and its backward pass has been
    wrong for lengths that are no multiple of 128 (pytorch issue 196678).
    """
    L = q.shape[2]
    length, lengths = _whole(L, 2 if bias is None else LANES), None
    if bias is not None:
        bias = jnp.broadcast_to(bias, (*bias.shape[:2], L, L)).astype(q.dtype)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, length - L), (0, length - L)))
    if padding is not None:
        lengths = jnp.maximum((~padding).sum(1), 1).astype(jnp.int32)
    elif length > L:
        lengths = jnp.full(q.shape[0], L, jnp.int32)
    inputs = (_longer(x, length).swapaxes(1, 2) for x in (q, k, v))
    try:
        out = jax.nn.dot_product_attention(
            *inputs, bias=bias, key_value_seq_lengths=lengths, implementation="cudnn"
        )
    except (NotImplementedError, RuntimeError) as error:  # no cuDNN; too old a GPU for the heads
        message = str(error).rstrip(".")
        raise UserError(f"config.model.attention='cudnn': {message}; use 'xla'") from error
    return out[:, :L].swapaxes(1, 2)


def flash(q, k, v, bias, padding):
    """jax's `pallas.ops.tpu.flash_attention`; hidden keys have another segment than all queries.

    A constant bias works, but as all [B, H, L, L], so that it saves no memory.
    """
    from jax.experimental.pallas.ops.tpu import flash_attention  # a second or more to import

    B, H, L, d = q.shape
    length, block = blocks(L)
    segments = None
    if padding is not None or length > L:
        seen = jnp.ones((B, L), jnp.int32) if padding is None else (~padding).astype(jnp.int32)
        seen = jnp.pad(seen, ((0, 0), (0, length - L)))
        segments = flash_attention.SegmentIds(jnp.ones_like(seen), seen)
    if bias is not None:
        bias = jnp.broadcast_to(bias, (B, H, L, L)).astype(jnp.float32)
        bias = jnp.pad(bias, ((0, 0), (0, 0), (0, length - L), (0, length - L)))
    q, k, v = (_longer(x, length) for x in (q * d**-0.5, k, v))
    sizes = flash_attention.BlockSizes(block, block, block, 1, *[block] * 7)
    return flash_attention.flash_attention(q, k, v, bias, segments, block_sizes=sizes)[:, :, :L]


def blocks(length: int) -> tuple[int, int]:
    """The length to which `length` tokens are padded, and that of the blocks it is cut into."""
    if length <= MOST:
        whole = _whole(length, LANES)
        return whole, whole
    sizes = range(MOST, LANES, -LANES)  # a block of 128 costs more than the tokens it spares
    return min(((_whole(length, size), size) for size in sizes), key=lambda pair: pair[0])


def _whole(length: int, block: int) -> int:
    return -(-length // block) * block


def _longer(x, length: int):
    """[B, H, L, d] with zeros behind, to `length` tokens."""
    return jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]), (0, 0)))
