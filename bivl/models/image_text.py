"""The heads on a multiway encoder: token classes, regression and projections for contrast."""

import dataclasses
import math

import jax.numpy as jnp
from flax import linen as nn

from bivl.models.decoders import Decoder, DecoderConfig
from bivl.models.heads import RegressionHead
from bivl.models.layers import Embedding, Projection, Vector, truncated_normal

INITIAL_TEMPERATURE = 0.07  # of contrast: BEiT-3's and CLIP's


@dataclasses.dataclass(frozen=True)
class HeadsConfig:
    """Which heads there are.

    codes: classes of an image's masked patches (visual tokens), 0 for none; words: those of masked
    text. regression: teacher's targets in the images or texts named. decoder: fills in patches that
    the student does not see, else masked patches have tokens. contrast: width of the projections.
    patches: the image's projection reads its patches side by side, [B, N D]. bag: words that have
    vectors of that width, of which a text's is the sum; 0: a text is projected like an image.
    """

    codes: int = 0
    words: int = 0
    regression: tuple[str, ...] = ()
    decoder: DecoderConfig | None = None
    contrast: int = 0
    patches: bool = False
    bag: int = 0


class Heads(nn.Module):
    """BEiT-3's heads under their own names, and those of regression."""

    config: HeadsConfig
    grid: tuple[int, ...]
    dtype: str = "float32"

    def setup(self):
        c = self.config

        def linear(outputs, **options):
            init = truncated_normal(0.02)
            options |= {"kernel_init": init, "dtype": self.dtype}
            return Projection((outputs,), ("embed", None), **options)

        if c.codes:
            self.mim_head = linear(c.codes)
        if c.words:
            self.mlm_head = linear(c.words)
        if c.decoder:
            self.decoder = Decoder(c.decoder, self.grid, self.dtype)
        if "image" in c.regression and not c.decoder:  # the decoder's last map is the head
            self.image_regression = RegressionHead(dtype=self.dtype)
        if "text" in c.regression:
            self.text_regression = RegressionHead(2, dtype=self.dtype)
        if c.contrast:
            self.vision_head = linear(c.contrast, use_bias=False)
            if c.bag:
                self.word_vectors = Embedding(c.bag, c.contrast)
            else:
                self.language_head = linear(c.contrast, use_bias=False)
            init = nn.initializers.constant(math.log(1 / INITIAL_TEMPERATURE))
            self.logit_scale = Vector((), (), init)

    def fill(self, x, keep, deterministic):
        """Patches [B, N, D] as they are, or the kept ones [B M, K, D] completed by the decoder;
        keep: int [B, M, K]."""
        if not self.config.decoder:
            return x
        return self.decoder(x, keep.reshape(len(x), -1), deterministic)

    def classify(self, x, modality: str):
        """[..., D] -> logits over codes (image) or words (text), float32."""
        head = self.mim_head if modality == "image" else self.mlm_head
        return head(x).astype(jnp.float32)

    def regress(self, x, modality: str):
        """[..., D] -> [..., D]."""
        if modality == "text":
            return self.text_regression(x)
        return x if self.config.decoder else self.image_regression(x)

    def project(self, x, modality: str):
        """Pooled [B, D] -> unit vectors [B, E], float32."""
        head = self.vision_head if modality == "image" else self.language_head
        return _unit(head(x).astype(jnp.float32))

    def add_words(self, ids, seen):
        """ids int [B, L], seen bool [B, L], those that count -> unit vectors [B, E], float32."""
        return _unit(jnp.sum(self.word_vectors(ids) * seen[..., None], axis=1))

    def __call__(self, x, keep):
        """Reads every parameter: [B, N, D] -> a list of outputs, for initialisation alone."""
        c = self.config
        outputs = [self.fill(x, keep, True)] if c.decoder else []
        outputs += [self.regress(x, name) for name in c.regression]
        outputs += [self.classify(x, "image")] if c.codes else []
        outputs += [self.classify(x, "text")] if c.words else []
        if c.contrast:
            pooled = x.reshape(len(x), -1) if c.patches else x[:, 0]
            text = self.word_vectors(jnp.int32(0)) if c.bag else self.project(x[:, 0], "text")
            outputs += [self.project(pooled, "image"), text, self.logit_scale()]
        return outputs


def _unit(x):
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
