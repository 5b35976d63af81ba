"""postprocessing.flips: probabilities are averaged over a slice and its flips."""

import numpy as np
import pytest
from flax import nnx
from scipy import special

from jaxla.inference.segment import mean_probabilities
from tests.commands import refuse_to_train


class Ramp(nnx.Module):
    """A network whose logits are the image times a ramp, which differs in every pixel and class."""

    def __init__(self, ramp):
        self.ramp = nnx.Param(ramp)

    def __call__(self, images):
        return images * self.ramp


@pytest.mark.parametrize(("classes", "activation"), [(1, special.expit), (3, lambda x: special.softmax(x, axis=-1))])
@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 5, 3, 4)], ids=["slices", "volumes"])
def test_probabilities_are_averaged_over_four_flips(classes, activation, shape):
    rng = np.random.default_rng(0)
    ramps = rng.standard_normal((2, 3, 4, classes)).astype(np.float32)
    images = rng.standard_normal((*shape, 1)).astype(np.float32)
    found = mean_probabilities([Ramp(ramp) for ramp in ramps], flips=True)(images)

    ramp = ramps.mean(0, dtype=np.float64)  # the logits of the networks are averaged first
    flipped_rows, flipped_columns = ramp[::-1], ramp[:, ::-1]
    # A flipped image under the ramp, flipped back, is the image under the flipped ramp.
    views = [activation(images * view) for view in (ramp, flipped_rows, flipped_columns, flipped_rows[:, ::-1])]
    np.testing.assert_allclose(found, np.mean(views, axis=0), rtol=0, atol=1e-6)
    assert np.abs(found - views[0]).max() > 0.1


def test_flips_are_refused_for_nnunet_which_mirrors_by_its_plan(tmp_path):
    line = refuse_to_train(tmp_path, "--method=nnunet_2d", "--postprocessing.flips=true")
    assert line.startswith(
        "error: --postprocessing.flips=true: has no effect, because the plan of nnunet_2d sets the mirroring"
    )
