"""The CTC loss and its gradient against PyTorch's, which the recipes were trained with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bivl.objectives import ctc

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.live


def draw(seed, batch=12, frames=40, classes=9, letters=15):
    """Logits [B, T, V], valid frames [B], transcripts [B, U] with doubled letters, lengths [B]."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, letters + 1, batch)
    transcripts = rng.integers(1, classes, (batch, letters))
    double = rng.random((batch, letters)) < 0.3
    double[:, 0] = False
    transcripts = np.where(double, np.roll(transcripts, 1, axis=1), transcripts)
    transcripts[np.arange(letters) >= lengths[:, None]] = 0
    valid = rng.integers(8, frames + 1, batch)
    logits = 2 * rng.normal(size=(batch, frames, classes))
    return logits.astype(np.float32), valid, transcripts.astype(np.int32), lengths


@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient(seed):
    logits, valid, transcripts, lengths = draw(seed)
    x = torch.tensor(logits, dtype=torch.float64, requires_grad=True)
    theirs = torch.nn.functional.ctc_loss(
        x.log_softmax(-1).transpose(0, 1),
        torch.tensor(transcripts, dtype=torch.long),
        torch.tensor(valid),
        torch.tensor(lengths),
        reduction="none",
        zero_infinity=True,
    )
    theirs.sum().backward()
    padding = jnp.arange(logits.shape[1]) >= valid[:, None]

    def total(logits):
        losses = ctc.ctc_loss(jax.nn.log_softmax(logits), padding, jnp.asarray(transcripts))
        return losses.sum(), losses

    gradient, ours = jax.grad(total, has_aux=True)(jnp.asarray(logits))
    assert (theirs == 0).any() and (theirs > 0).any()
    np.testing.assert_allclose(ours, theirs.detach().numpy(), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(gradient, x.grad.numpy(), atol=1e-4)
