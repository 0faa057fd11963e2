"""bivl: masked pre-training for vision, language and speech in JAX, TPU first."""

__version__ = "0.1.0"

_PUBLIC = {"load": "bivl.model", "Model": "bivl.model"}


def __getattr__(name):
    """Imports the public names on first use, so that data workers never import jax."""
    if name in _PUBLIC:
        import importlib

        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module 'bivl' has no attribute {name!r}")
