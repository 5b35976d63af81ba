"""The tokens of every released architecture against those of its authors' PyTorch code.

See tests/golden/README.md. Small architectures are converted by the conversion command, large ones in memory with the
same table rows; nothing here needs torch.
"""

import pytest

from jaxla.models.backbones import TRANSFORMERS
from tests.golden.checkpoints import golden_backbone, golden_backbone_in_memory, golden_files, golden_image
from tests.golden.errors import beyond_bounds, golden_errors, lowest_bfloat16_cosine

# All released architectures except DINOv2 ViT-L and ViT-g with registers, and DINOv3 ViT-7B.
ARCHITECTURES = sorted(
    filter(golden_files, TRANSFORMERS), key=lambda arch: TRANSFORMERS[arch].depth * TRANSFORMERS[arch].width ** 2
)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_tokens_equal_the_authors_code(arch):
    is_small = TRANSFORMERS[arch].width <= 768
    vit = golden_backbone(arch) if is_small else golden_backbone_in_memory(arch)
    for file in golden_files(arch):
        errors = golden_errors(vit, file)
        assert {"cls", "patches", "patches_mean", "patches_std"} < errors.keys()
        assert ("registers" in errors) == bool(vit.variant.registers)
        assert sum(name.startswith("block ") for name in errors) == 4
        assert not beyond_bounds(errors), file  # measured: at most 3.8e-6 (max abs) and 6.3e-7 (relative L2)
        if is_small:  # larger ones take minutes
            assert lowest_bfloat16_cosine(vit, golden_image(file)) >= 0.9998, file  # measured: at least 0.99994
