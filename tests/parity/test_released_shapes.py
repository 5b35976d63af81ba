"""What the conversion takes for the authors' checkpoint of each architecture: names and shapes from their own code
(of ViT-l and ViT-g with registers, for which there is no golden file: those without, and the registers)."""

import pytest

from convert_weights.architectures import architecture_rows
from jaxla.models.backbones import TRANSFORMERS
from tests.golden.checkpoints import reference_shapes

ARCHITECTURES = [arch for arch, variant in TRANSFORMERS.items() if variant.licence]
SEVEN_BILLION = "dinov3_vit7b16"  # see test_dinov3_7b.py


@pytest.mark.parametrize("arch", [arch for arch in ARCHITECTURES if arch != SEVEN_BILLION])
def test_conversion_expects_the_tensors_of_the_authors(arch):
    # what pretraining alone uses, and only some checkpoints hold
    rows = {row.theirs: row.shape for row in architecture_rows(arch) if not row.theirs.startswith("local_cls_norm")}
    assert rows == {name: tuple(shape) for name, shape in reference_shapes(arch).items()}
