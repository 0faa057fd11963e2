"""Records how many parameters the reference models have: data2vec_sizes.json.

    python tests/golden/record_data2vec_sizes.py

needs torch. `head` is the regression head, final projection or decoder; `encoder` all the rest.
"""

import json
from pathlib import Path

import torch
import torch_data2vec2_audio as audio2
import torch_data2vec2_text as text2
import torch_data2vec_audio as audio1
import torch_data2vec_text as text1
import torch_postnorm as parts

PATH = Path(__file__).with_name("data2vec_sizes.json")
HEADS = ("regression_head.", "final_proj.", ".decoder.")
LARGE = {"width": 1024, "depth": 24, "num_heads": 16, "mlp_dim": 4096}
MODELS = {
    "data2vec_text_base": (text1.Data2VecText, text1.ModelConfig()),
    "data2vec_text_large": (text1.Data2VecText, text1.ModelConfig(**LARGE)),
    "data2vec_audio_base": (audio1.Data2VecAudio, audio1.ModelConfig()),
    "data2vec_audio_large": (audio1.Data2VecAudio, audio1.ModelConfig(**LARGE)),
    "data2vec2_text_base": (text2.Data2Vec2Text, text2.ModelConfig()),
    "data2vec2_text_large": (text2.Data2Vec2Text, text2.ModelConfig(**LARGE)),
    "data2vec2_audio_base": (audio2.Data2Vec2Audio, audio2.ModelConfig()),
    "data2vec2_audio_large": (
        audio2.Data2Vec2Audio,
        audio2.ModelConfig(
            **LARGE | {"depth": 16, "prenet_depth": 8},
            decoder=parts.DecoderConfig(768, 7, 16, 4),
        ),
    ),
}


def counts(model):
    """Parameters of a model, and how many of them are its head's."""
    sizes = {name: value.numel() for name, value in model.named_parameters()}
    head = sum(size for name, size in sizes.items() if any(part in name for part in HEADS))
    return {"encoder": sum(sizes.values()) - head, "head": head, "total": sum(sizes.values())}


if __name__ == "__main__":
    with torch.device("meta"):  # modules without memory
        sizes = {name: counts(make(config)) for name, (make, config) in MODELS.items()}
    PATH.write_text(json.dumps(sizes, indent=1) + "\n")
    print(PATH.read_text())
