"""The features of our ResNet encoders, from the stem and the four stages, against torchvision's.

See tests/golden/README.md. The weights are converted by the conversion command.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from convert_weights.__main__ import main
from jaxla import load_backbone
from tests.golden.fake_weights import fake_image, fake_state_dict

GOLDEN = Path(__file__).parents[1] / "golden"
# Measured: at most 1.9e-6 and 4.3e-7, for values whose standard deviation is 0.2 to 0.6.
MAX_ABS, RELATIVE_L2 = 1e-5, 1.5e-6


@pytest.mark.parametrize(("arch", "height", "width"), [("resnet50", 64, 96), ("resnet152", 64, 64)])
def test_features_equal_torchvision(arch, height, width, tmp_path):
    source, output = tmp_path / f"{arch}_source.pth", tmp_path / f"{arch}.safetensors"
    state = fake_state_dict(json.loads((GOLDEN / f"{arch}.shapes.json").read_text()))
    torch.save({name: torch.as_tensor(array) for name, array in state.items()}, source)
    main([f"--arch={arch}", f"--source={source}", f"--output={output}"])

    golden = np.load(GOLDEN / f"{arch}_{height}x{width}.npz")
    resnet = load_backbone(output, np.float32)
    maps = resnet.intermediate(fake_image(height, width).transpose(0, 2, 3, 1))
    for name, features in zip(("stem", "layer1", "layer2", "layer3", "layer4"), maps, strict=True):
        step = int(golden[f"stride_{name}"])
        difference = np.asarray(features, np.float64)[0, ::step, ::step].transpose(2, 0, 1) - golden[name]
        assert np.abs(difference).max() <= MAX_ABS
        assert np.linalg.norm(difference) / np.linalg.norm(golden[name]) <= RELATIVE_L2
