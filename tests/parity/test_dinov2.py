"""Our DINOv2 against outputs of the authors' PyTorch code, on all tokens (see tests/golden/README.md)."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxla import load_backbone
from tests.golden.fake_weights import fake_image, fake_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
# The reference in float64 differs from its own float32 outputs by 3e-6 and 5e-7; measured here: 2.9e-6 and 5.0e-7.
MAX_ABS, RELATIVE_L2 = 1e-5, 1.5e-6


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """Converts an architecture's golden weights through the command; -> path of the result."""
    folder = tmp_path_factory.mktemp("converted")

    def convert(arch):
        import torch

        output = folder / f"{arch}.safetensors"
        if not output.exists():
            shapes = json.loads((GOLDEN / f"{arch}.shapes.json").read_text())
            state = {name: torch.from_numpy(value) for name, value in fake_state_dict(shapes).items()}
            torch.save(state, folder / f"{arch}_pretrain.pth")
            command = [sys.executable, "-m", "convert_weights", f"--arch={arch}", f"--output={output}"]
            subprocess.run([*command, f"--source={folder / arch}_pretrain.pth"], check=True)
        return output

    return convert


def assert_close(ours, golden):
    difference = np.asarray(ours, np.float64) - golden
    relative = np.linalg.norm(difference) / np.linalg.norm(golden)
    print(np.abs(difference).max(), relative)
    assert np.abs(difference).max() <= MAX_ABS
    assert relative <= RELATIVE_L2


@pytest.mark.parametrize(
    ("arch", "height", "width"), [("dinov2_vits14", 98, 98), ("dinov2_vitb14", 98, 98), ("dinov2_vitb14", 448, 448)]
)
def test_tokens_equal_the_authors(converted, arch, height, width):
    golden = np.load(GOLDEN / f"{arch}_{height}x{width}.npz")
    vit = load_backbone(converted(arch))
    images = fake_image(height, width).transpose(0, 2, 3, 1)
    step = int(golden["patch_step"])

    out = vit(images)
    patches = np.asarray(out.patches).reshape(-1, vit.variant.width)
    assert_close(out.cls[0], golden["cls"])
    assert_close(patches[::step], golden["patches"])
    assert_close(patches.mean(0), golden["patches_mean"])
    assert_close(patches.std(0), golden["patches_std"])

    blocks = tuple(int(i) for i in golden["layers"])
    for ours, theirs in zip(vit.intermediate(images, blocks=blocks), golden["intermediate"], strict=True):
        assert_close(np.asarray(ours).reshape(-1, vit.variant.width)[::step], theirs)
