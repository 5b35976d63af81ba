"""The names and shapes that the conversion expects of each checkpoint, against those of the authors' code.

DINOv2 ViT-L and ViT-g with registers have no golden file; the expected shapes are those of the models without
registers, plus the registers.
"""

import pytest

from convert_weights.architectures import architecture_rows
from jaxla.models.backbones import TRANSFORMERS
from tests.golden.checkpoints import reference_shapes

ARCHITECTURES = [arch for arch, variant in TRANSFORMERS.items() if variant.licence]
SEVEN_BILLION = "dinov3_vit7b16"  # see test_dinov3_7b.py


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != SEVEN_BILLION])
def test_conversion_expects_the_authors_tensors(arch):
    # only pretraining uses `local_cls_norm`, and only some checkpoints contain it
    rows = {row.theirs: row.shape for row in architecture_rows(arch) if not row.theirs.startswith("local_cls_norm")}
    assert rows == {name: tuple(shape) for name, shape in reference_shapes(arch).items()}
