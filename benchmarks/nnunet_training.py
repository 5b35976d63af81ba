"""python -m benchmarks.nnunet_training --exp=paper1 --method=nnunet_3d_short --data.root=DIR: compare with PyTorch.

Trains nnU-Net on a data set with this package and with the PyTorch module of the parity suite, from the same parameters
on the same augmented patches, each with its own implementation of the loss, gradients, SGD and poly schedule. Takes the
options of `jaxla.train`, except the run folder. Both trained networks then segment the test cases with this package's
inference (`tests/parity` checks that their logits are equal), and are scored per volume.

The two training runs differ only by rounding, which training amplifies: the losses of the first steps agree in all
printed digits, and at the end losses and Dice differ by at most as much as between two seeds.

Prints JSON: for both networks, the Dice of each test volume, averaged over the structures, the mean over these volumes,
the mean loss of each epoch and the median seconds per step; the difference between the two mean Dice; and the largest
difference between the losses in the first 50 steps, in all steps, and between their epoch means.
"""

import logging
import time
from contextlib import closing

import jax
import numpy as np
import torch
from flax import nnx
from jaxla.experiments import EXPERIMENTS, METHODS

from benchmarks.timing import environment, print_result
from jaxla.cli.command_line import parse_experiment
from jaxla.cli.process import run_command
from jaxla.config import InputError
from jaxla.data.batches import training_batches
from jaxla.data.dataset import prepare_data
from jaxla.data.slices import slice_geometry
from jaxla.data.volumes import read_grid
from jaxla.evaluation.summary import case_means, score_case
from jaxla.inference.postprocessing import postprocess
from jaxla.nnunet.network import NNUNetOptions
from jaxla.runs.checks import check_experiment
from jaxla.tasks import make_task
from jaxla.training.optimisers import MAX_GRADIENT_NORM, MOMENTUM, POLY_POWER, WEIGHT_DECAY
from jaxla.training.trainer import Trainer
from tests.parity.nnunet_reference import fill_nnunet, make_nnunet_reference
from tests.parity.test_nnunet import their_loss

log = logging.getLogger("jaxla.benchmarks")


def main(arguments):
    options = parse_experiment(arguments, EXPERIMENTS, METHODS)
    experiment = check_experiment(options.experiment)
    method = experiment.method
    if not isinstance(method.model, NNUNetOptions):
        raise InputError(f"--method={method.name}", "not an nnU-Net method", "Use --method=nnunet_2d or nnunet_3d.")
    data = prepare_data(experiment, options.cache_dir)
    names = data.dataset.labels.names
    if len(names) < 2:
        problem = f"the only class is {names[0]}, for which jaxla's network has one output and PyTorch's has two"
        raise InputError("--data.labels", problem, "Use a data set with several structures.")
    task = make_task(experiment, data)
    network = task.build_network()
    torch_training = TorchTraining(task, network)
    our_training = OurTraining(task, network)  # built second: its steps donate the parameters' buffers
    trainings = {"jaxla": our_training, "torch": torch_training}
    losses, seconds = train(trainings, task, task.make_sources(data, options.cache_dir).train)

    dice = {name: score_test_cases(task, training.network(), data) for name, training in trainings.items()}
    mean = {name: float(np.mean(list(cases.values()))) for name, cases in dice.items()}
    by_epoch = {name: np.reshape(values, (-1, task.recipe.steps)).mean(1) for name, values in losses.items()}
    difference = np.abs(np.subtract(losses["jaxla"], losses["torch"]))
    result = {
        **environment("jax", "flax", "torch"),
        "data": data.dataset.root.name,
        "method": method.name,
        "seed": experiment.seed,
        "steps": len(difference),
        "n": len(data.split.test),
        "unit": "volume",
        "dice": mean,
        "dice_difference": mean["jaxla"] - mean["torch"],
        "dice_by_case": dice,
        "max_loss_difference": {
            "first_50_steps": float(difference[:50].max()),
            "all_steps": float(difference.max()),
            "epoch_means": float(np.abs(by_epoch["jaxla"] - by_epoch["torch"]).max()),
        },
        "loss_by_epoch": {name: values.tolist() for name, values in by_epoch.items()},
        "median_step_seconds": {name: float(np.median(values)) for name, values in seconds.items()},
    }
    print_result(result)


def train(trainings, task, source):
    """Train both networks on the same augmented patches; return the loss and the seconds of each step, by name."""
    recipe, seed = task.recipe, task.experiment.seed
    augment = jax.jit(task.augment)
    key = jax.random.key(seed)
    losses = {name: [] for name in trainings}
    seconds = {name: [] for name in trainings}
    with closing(training_batches(source, task.batch_size, seed)) as batches:
        for epoch in range(recipe.epochs):
            for step in range(epoch * recipe.steps, (epoch + 1) * recipe.steps):
                batch, step_key = next(batches), jax.random.fold_in(key, step)
                images, mask = (np.asarray(array) for array in augment(step_key, batch["input"], batch["mask"]))
                for name, training in trainings.items():
                    began = time.perf_counter()
                    losses[name].append(training.step(images, mask, step))
                    seconds[name].append(time.perf_counter() - began)
            epoch_losses = [f"{np.mean(values[-recipe.steps :]):.4f} {name}" for name, values in losses.items()]
            log.info("epoch %d/%d: loss %s", epoch + 1, recipe.epochs, ", ".join(epoch_losses))
    return losses, seconds


class OurTraining:
    """This package's training on augmented patches."""

    def __init__(self, task, network):
        self.trainer = Trainer(network, task.resolved_recipe, task.recipe.steps, loss=task.loss)
        self.network = self.trainer.network

    def step(self, images, mask, step):
        batch = {"input": images, "mask": mask, "weight": np.ones(len(images), np.float32)}
        return float(self.trainer.step(batch, step))


class TorchTraining:
    """PyTorch's training with nnU-Net's recipe."""

    def __init__(self, task, network):
        self.task, self.configuration, self.recipe = task, task.configuration, task.recipe
        self.module = make_nnunet_reference(self.configuration, network).train()
        options = {"lr": self.recipe.learning_rate, "momentum": MOMENTUM, "weight_decay": WEIGHT_DECAY}
        self.optimiser = torch.optim.SGD(self.module.parameters(), nesterov=True, **options)

    def step(self, images, mask, step):
        decay = (1 - step // self.recipe.steps / self.recipe.epochs) ** POLY_POWER
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate * decay
        self.optimiser.zero_grad()
        logits = self.module(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
        loss = their_loss(logits, torch.from_numpy(mask.copy()), self.configuration.batch_dice)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), MAX_GRADIENT_NORM)
        self.optimiser.step()
        return loss.item()

    def network(self):
        """Return this package's network with PyTorch's parameters."""
        trained = nnx.eval_shape(self.task.build_network)
        tensors = {name: array.numpy() for name, array in self.module.state_dict().items()}
        fill_nnunet(trained, self.configuration, tensors)
        trained.eval()
        return trained


def score_test_cases(task, network, data):
    """Return the mean Dice over the structures of each test case, by case id."""
    segment = task.make_segment([network])
    rows = []
    for case in data.split.test:
        volume = data.volumes[case]
        geometry = slice_geometry(read_grid(volume.case.image).affine)
        classes = postprocess(segment(volume.image, geometry)[0], task.experiment.method.postprocessing)
        rows += score_case(case, classes, volume.mask, volume.spacing, data.dataset.labels.names)
    return case_means(rows, "dice")


if __name__ == "__main__":
    run_command(main)
