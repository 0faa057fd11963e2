"""Sizes by name: width, depth, num_heads, mlp_dim."""

SIZES = {
    "tiny": (128, 4, 4, 512),
    "small": (384, 12, 6, 1536),
    "base": (768, 12, 12, 3072),
    "large": (1024, 24, 16, 4096),
    "huge": (1280, 32, 16, 5120),
    "giant": (1408, 40, 16, 6144),
}
