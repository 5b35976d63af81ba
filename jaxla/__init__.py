"""Left-atrium segmentation in LGE-MRI with DINOv2 and DINOv3 vision transformers, in JAX.

The commands are `python -m jaxla.train`, `predict`, `evaluate` and `phantom`.
"""

from jaxla.config import InputError

__all__ = ["InputError", "build_network", "load_backbone", "load_network"]


def __getattr__(name: str) -> object:
    # JAX takes seconds to import; a command that shows its help must not wait for it
    if name == "load_backbone":
        from jaxla.models.weights import load_backbone

        return load_backbone
    raise AttributeError(f"module 'jaxla' has no attribute {name!r}")
