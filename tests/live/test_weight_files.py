"""Files as PyTorch, safetensors and transformers write them, against what those read."""

import argparse
import collections
import sys

import numpy as np
import pytest

from bivl.weights.files import open_weights

pytestmark = pytest.mark.live
torch = pytest.importorskip("torch")


def as_numpy(tensor):
    """A tensor as an array: types that NumPy lacks go by their bytes."""
    tensor = tensor.detach().contiguous()
    if tensor.dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2):
        return tensor.view(torch.uint8).numpy()
    return tensor.numpy()


def same(weights, tensors):
    assert list(weights.tensors) == list(tensors)
    for name, expected in tensors.items():
        array = weights.tensors[name].read()
        assert array.shape == tuple(expected.shape), name
        assert array.dtype.name == str(expected.dtype).removeprefix("torch."), name
        expected = as_numpy(expected)
        bytes_alike = np.ascontiguousarray(array).view(expected.dtype)
        np.testing.assert_array_equal(bytes_alike.reshape(expected.shape), expected, name)


def many():
    base = torch.arange(-12, 12, dtype=torch.float32)
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
    kinds += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    kinds += [torch.complex64, torch.complex128]
    tensors = {str(kind): base.reshape(4, 6).to(kind) for kind in kinds}
    views = {
        "transposed": base.reshape(4, 6).t(),
        "column": base.reshape(4, 6)[:, 2],
        "steps": base[3::5],
        "expanded": base[:1].expand(7, 1),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 4),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "parameter": torch.nn.Parameter(base),
    }
    return tensors | views


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("new", [True, False])
def test_torch_save(new, protocol, tmp_path):
    path, tensors = tmp_path / "a.pt", many()
    options = {"_use_new_zipfile_serialization": new, "pickle_protocol": protocol}
    if new:
        newest = [torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]
        tensors |= {str(kind): torch.arange(5).to(kind) for kind in newest}
    torch.save(tensors, path, **options)
    same(open_weights(path), tensors)


def test_state_dict_among_other_parts(tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.rand(5, 3)).sum().backward()
    optimizer.step()
    args = argparse.Namespace(lr=1e-3, size=(1, 2), kind=torch.float16, shape=torch.Size([3]))
    value = {
        "model": model.state_dict(),
        "model_ema": collections.OrderedDict(model.state_dict()),
        "optimizer": optimizer.state_dict(),
        "scaler": torch.amp.GradScaler("cpu").state_dict(),
        "epoch": 3,
        "best": np.float64(0.5),
        "args": args,
    }
    torch.save(value, tmp_path / "a.pt")
    weights = open_weights(tmp_path / "a.pt")
    same(weights, model.state_dict())
    assert weights.config == {"lr": 1e-3, "size": (1, 2), "kind": "torch.float16", "shape": (3,)}
    assert weights.left["best"] == "float 0.5" and len(weights.parts["optimizer"]) == 12


def test_without_checksums(tmp_path):
    tensors = many()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(tensors, tmp_path / "a.pt")
    finally:
        torch.serialization.set_crc32_options(True)
    same(open_weights(tmp_path / "a.pt"), tensors)


def test_torchscript(tmp_path):
    class Inner(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.LayerNorm(3))
            self.register_buffer("size", torch.tensor(224))
            self.sizes, self.names, self.scale = [1, 2], {"a": 1}, 0.5

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x) * self.scale + self.sizes[0] + self.names["a"] + self.size

    class Outer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.visual, self.logit_scale = Inner(), torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.visual(x) * self.logit_scale

    model = Outer().half()
    torch.jit.script(model).save(str(tmp_path / "a.pt"))
    weights = open_weights(tmp_path / "a.pt")
    expected = model.state_dict()
    assert weights.kind == "torchscript" and set(weights.tensors) == set(expected)
    same(weights, {name: expected[name] for name in weights.tensors})


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    tensors = {
        name: tensor.contiguous().clone()
        for name, tensor in many().items()
        if tensor.dtype != torch.complex128
    }
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    weights = open_weights(tmp_path / "a.safetensors")
    same(weights, {name: tensors[name] for name in weights.tensors})
    assert set(weights.tensors) == set(tensors) and weights.config == {"format": "pt"}


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_save_pretrained(shard, tmp_path):
    transformers = pytest.importorskip("transformers")
    sizes = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48)
    model = transformers.BertModel(transformers.BertConfig(vocab_size=50, **sizes))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    weights = open_weights(tmp_path)
    expected = model.state_dict()
    assert weights.kind == "huggingface" and weights.config["model_type"] == "bert"
    assert (len(weights.files) > 4) == (shard == "20KB")
    assert set(weights.tensors) == set(expected)
    same(weights, {name: expected[name] for name in weights.tensors})


def test_without_torch(tmp_path):
    """Reading imports neither PyTorch nor jax."""
    import subprocess

    torch.save({"w": torch.ones(3, dtype=torch.bfloat16)}, tmp_path / "a.pt")
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from bivl.weights.files import open_weights\n"
        f"assert open_weights({str(tmp_path / 'a.pt')!r}).tensors['w'].read().sum() == 3\n"
        "assert 'jax' not in sys.modules and 'pickle' not in open_weights.__globals__"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
