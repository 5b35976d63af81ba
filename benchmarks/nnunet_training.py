"""python -m benchmarks.nnunet_training --exp=paper1 --method=nnunet_3d_short --data.root=DIR: train in both packages.

Trains nnU-Net on a data set by this package and by the PyTorch module of the parity suite, from the same parameters on
the same augmented patches, each with its own loss, gradients, SGD and poly decay. Takes the options of `jaxla.train`,
except the run folder. Both trained networks then segment the test cases with this package's inference (`tests/parity`
checks that their logits are equal), and are scored per volume.

The two differ by rounding only. Gradients differ in their last digits and training amplifies that, so losses are equal
to the digit at first, and in the end losses and Dice differ as much as between two seeds, or less.

Prints JSON: the mean foreground Dice of both per test volume and the difference, the loss of both in each epoch, how
much the losses of single steps differ in the first 50 steps and at most, and the seconds of a step.
"""

import logging
import time
from contextlib import closing
from dataclasses import replace

import jax
import numpy as np
import torch
from flax import nnx
from jaxla.experiments import EXPERIMENTS, METHODS
from jaxla.inference.trained import TrainedNetwork
from jaxla.models.build import build_network, configuration_of, is_planned
from jaxla.pipeline.checks import checked
from jaxla.pipeline.planning import plan_run
from jaxla.pipeline.sources import patch_sources

from benchmarks.timing import environment, print_result
from jaxla.cli.command_line import parse_experiment
from jaxla.cli.process import run_command
from jaxla.config import InputError
from jaxla.data.batches import training_batches
from jaxla.data.dataset import prepare_data
from jaxla.data.volumes import read_image, slice_geometry, to_slices
from jaxla.evaluation.summary import case_means, score_case
from jaxla.inference.segment import make_segment
from jaxla.runs.record import Record
from jaxla.training.step import (
    LARGEST_NORM,
    MOMENTUM,
    POWER,
    WEIGHT_DECAY,
    compile_step,
    initial_state,
    make_gradient,
    make_optimiser,
    make_step,
    split_network,
    take_step,
)
from tests.parity.references import nnunet_reference_of
from tests.parity.test_nnunet import fill, their_loss

log = logging.getLogger("jaxla.benchmarks")


def main(arguments):
    options = parse_experiment(arguments, EXPERIMENTS, METHODS)
    experiment = checked(options.experiment)
    if not is_planned(experiment.model):
        raise InputError(f"--method={experiment.method}", "not an nnU-Net", "Use --method=nnunet_2d or nnunet_3d.")
    data = prepare_data(experiment, options.cache_dir)
    data = replace(data, plan=plan_run(experiment, data))
    names = data.dataset.labels.names
    if len(names) < 2:
        problem = f"{names[0]} only, for which this package's network has one output and PyTorch's has two"
        raise InputError("--data.labels", problem, "Use a data set with several structures.")
    configuration = configuration_of(experiment.model, data.plan)
    sources = patch_sources(experiment, data, data.plan, options.cache_dir)

    def build():
        return build_network(experiment.model, len(names) + 1, experiment.seed, plan=data.plan)

    network = build()
    theirs = Theirs(network, build, configuration, sources.recipe)
    ours = Ours(network, sources)
    augment, key = jax.jit(sources.augment), jax.random.key(experiment.seed)
    losses, seconds = {"jaxla": [], "torch": []}, {"jaxla": [], "torch": []}
    with closing(training_batches(sources.train, sources.recipe.batch_size, experiment.seed)) as batches:
        for epoch in range(sources.recipe.epochs):
            for i in range(sources.recipe.steps):
                batch = next(batches)
                step_key = jax.random.fold_in(key, epoch * sources.recipe.steps + i)
                images, mask = (np.asarray(array) for array in augment(step_key, batch["input"], batch["mask"]))
                for name, side in {"jaxla": ours, "torch": theirs}.items():
                    began = time.perf_counter()
                    losses[name].append(side.step(images, mask, epoch))
                    seconds[name].append(time.perf_counter() - began)
            epoch_losses = [f"{np.mean(values[-sources.recipe.steps :]):.4f} {name}" for name, values in losses.items()]
            log.info("epoch %d/%d: loss %s", epoch + 1, sources.recipe.epochs, ", ".join(epoch_losses))

    record = Record(experiment, data.dataset.labels, "random", "", data.split.sha256, data.sha256, "", "", {})
    dice = {
        name: test_dice(TrainedNetwork((side.network(),), record, sources.recipe.epochs, data.plan), data)
        for name, side in {"jaxla": ours, "torch": theirs}.items()
    }
    our_losses, their_losses = (np.array(losses[name]) for name in ("jaxla", "torch"))
    by_epoch = {name: np.reshape(values, (-1, sources.recipe.steps)).mean(1) for name, values in losses.items()}
    difference = np.abs(our_losses - their_losses)
    mean = {name: float(np.mean(list(cases.values()))) for name, cases in dice.items()}
    result = {
        **environment("jax", "flax", "torch"),
        "data": data.dataset.root.name,
        "method": experiment.method,
        "seed": experiment.seed,
        "steps": len(our_losses),
        "n": len(data.split.test),
        "unit": "volume",
        "dice": mean,
        "dice_difference": mean["jaxla"] - mean["torch"],
        "dice_by_case": dice,
        "losses_apart": {
            "most_in_the_first_50_steps": float(difference[:50].max()),
            "most": float(difference.max()),
            "most_of_an_epoch's_mean": float(np.abs(by_epoch["jaxla"] - by_epoch["torch"]).max()),
        },
        "loss_by_epoch": {name: values.tolist() for name, values in by_epoch.items()},
        "median_seconds_of_a_step": {name: float(np.median(values)) for name, values in seconds.items()},
    }
    print_result(result)


class Ours:
    """This package's training on augmented patches."""

    def __init__(self, network, sources):
        recipe = sources.recipe
        self.parts = split_network(network, train_backbone=True)
        optimiser = make_optimiser(recipe, recipe.epochs * recipe.steps, pretrained_backbone=False)
        self.make = make_step(make_gradient(self.parts.training, loss_of=sources.loss_of), optimiser)
        self.state = initial_state(self.parts, optimiser)
        self.key, self.compiled = jax.random.key(0), None

    def step(self, images, mask, epoch):
        batch = {"input": images, "mask": mask, "weight": np.ones(len(images), np.float32)}
        self.compiled = self.compiled or compile_step(self.make, self.state, batch, self.key)
        return float(take_step(self.compiled, self.state, batch, self.key))

    def network(self):
        trained = nnx.merge(self.parts.evaluation, self.state.trainable, *self.state.frozen)
        trained.eval()
        return trained


class Theirs:
    """PyTorch's training with nnU-Net's recipe."""

    def __init__(self, network, build, configuration, recipe):
        self.module = nnunet_reference_of(configuration, network).train()
        self.build, self.configuration, self.recipe = build, configuration, recipe
        self.optimiser = torch.optim.SGD(
            self.module.parameters(), recipe.learning_rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True
        )

    def step(self, images, mask, epoch):
        for group in self.optimiser.param_groups:
            group["lr"] = self.recipe.learning_rate * (1 - epoch / self.recipe.epochs) ** POWER
        self.optimiser.zero_grad()
        logits = self.module(torch.from_numpy(np.moveaxis(images, -1, 1).copy()))
        loss = their_loss(logits, torch.from_numpy(mask.copy()), self.configuration.batch_dice)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), LARGEST_NORM)
        self.optimiser.step()
        return loss.item()

    def network(self):
        """Return this package's network with PyTorch's parameters."""
        trained = nnx.eval_shape(self.build)
        fill(trained, self.configuration, {name: array.numpy() for name, array in self.module.state_dict().items()})
        trained.eval()
        return trained


def test_dice(trained, data):
    """Return test case -> mean Dice of its structures."""
    segment, names, rows = make_segment(trained), trained.record.labels.names, []
    for case in data.split.test:
        prepared = data.volumes[case]
        volume = read_image(prepared.case.image)
        predicted = to_slices(segment(volume)[0], slice_geometry(volume.affine))
        rows += score_case(case, predicted, prepared.mask, prepared.spacing, names)
    return case_means(rows, "dice")


if __name__ == "__main__":
    run_command(main)
