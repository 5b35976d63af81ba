"""Training without commands, as in a notebook."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxla
from jaxla.config import Training
from jaxla.data.batches import ArraySource
from jaxla.training.checkpoints import checkpoint_steps
from jaxla.training.loop import fit
from jaxla.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("fast_compilation")


class OwnNetwork(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Conv(1, 8, (3, 3), rngs=rngs)
        self.logits = nnx.Conv(8, 1, (1, 1), rngs=rngs)

    def __call__(self, images):
        return self.logits(nnx.relu(self.hidden(images)))


@pytest.mark.quick
def test_a_users_module_trains_on_arrays(tmp_path):
    rng = np.random.default_rng(0)
    masks = rng.random((24, 16, 16)) > 0.7
    images = (masks + 0.3 * rng.standard_normal(masks.shape))[..., None].astype(np.float32)
    train, val = ArraySource(images[:16], masks[:16]), ArraySource(images[16:], masks[16:])

    recipe = Training(epochs=12, batch_size=4, learning_rate=0.02)
    trainer = Trainer(OwnNetwork(nnx.Rngs(0)), recipe, steps_per_epoch=4)
    progress = fit(trainer, train, val, tmp_path)

    losses = [metrics["train_loss"] for metrics in progress.history]
    assert losses[-1] < losses[0] / 2
    assert checkpoint_steps(tmp_path / "best") == [progress.best_epoch]
    assert progress.best_dice > 0.8
    logits = trainer.network()(jnp.asarray(images[16:]))[..., 0]
    assert ((logits > 0) == masks[16:]).mean() > 0.9


@pytest.mark.quick
def test_training_and_networks_in_float64_are_refused(tmp_path):
    with jax.enable_x64():
        for make in (
            lambda: Trainer(OwnNetwork(nnx.Rngs(0)), Training(), steps_per_epoch=4),
            lambda: jaxla.load_network(tmp_path),
            lambda: jaxla.load_backbone(tmp_path),
            lambda: jaxla.build_network("unet"),
        ):
            with pytest.raises(jaxla.InputError, match=r"^jax_enable_x64: is on, but the networks compute in float32"):
                make()


@pytest.mark.quick
def test_a_module_that_draws_random_numbers_is_refused():
    class WithDropout(OwnNetwork):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.dropout = nnx.Dropout(0.5, rngs=rngs)

    with pytest.raises(ValueError, match="draws random numbers during training"):
        Trainer(WithDropout(nnx.Rngs(0)), Training(), steps_per_epoch=4)
