"""The tokens of every released architecture against those of its authors' PyTorch code.

See tests/golden/README.md. The weights go through the conversion command; nothing here needs torch.
"""

import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax.numpy as jnp
import pytest

from jaxla import load_backbone
from jaxla.models.backbones import TRANSFORMERS
from tests.golden.checkpoints import converted, files_of, image_of
from tests.golden.errors import beyond_bounds, golden_errors, lowest_bfloat16_cosine

# All released architectures except DINOv2 ViT-L and ViT-g with registers, and DINOv3 ViT-7B.
ARCHITECTURES = sorted(
    filter(files_of, TRANSFORMERS), key=lambda arch: TRANSFORMERS[arch].depth * TRANSFORMERS[arch].width ** 2
)


@pytest.fixture(scope="module")
def conversion(request):
    """A function that converts an architecture, and meanwhile the next one, since a conversion uses one core."""
    archs = [test.callspec.params["arch"] for test in request.session.items if test.path == request.path]
    files = {}
    with tempfile.TemporaryDirectory(prefix="jaxla_") as folder, ThreadPoolExecutor(2) as pool:

        def convert(arch):
            for name in archs[archs.index(arch) :][:2]:
                if name not in files:
                    files[name] = pool.submit(converted, name, Path(folder))
            return files[arch].result()

        yield convert


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_equal_the_authors_code(conversion, arch):
    converted_file = conversion(arch)
    vit = load_backbone(converted_file, jnp.float32)
    converted_file.unlink()  # ViT-g takes 4.5 GB
    for file in files_of(arch):
        errors = golden_errors(vit, file)
        assert {"cls", "patches", "patches_mean", "patches_std"} < errors.keys()
        assert ("registers" in errors) == bool(vit.variant.registers)
        assert sum(name.startswith("block ") for name in errors) == 4
        assert not beyond_bounds(errors), file  # measured at most: 3.8e-6 and 6.3e-7
        if vit.variant.width <= 768:  # larger ones take minutes
            assert lowest_bfloat16_cosine(vit, image_of(file)) >= 0.9998, file  # measured at least: 0.99987
