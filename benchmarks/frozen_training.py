"""python -m benchmarks.frozen_training [--network=…] [--arch=…] [--size=…] [--batch=…]: epochs on a frozen backbone.

Seconds per epoch of training a decoder, paper 1's or paper 2's fusion, beside PyTorch, once with the backbone's
features computed beforehand and once with the backbone run at every step. An epoch takes every slice once, forward and
backward through the decoder, with a step of Adam per batch. Both sides run in this process, in turn, in float32 on CPU
with all its cores, on random weights; printed as JSON with the ratios of the medians. First calls, which compile, are
kept apart.

This package reads slices and features from disk through its own loader; PyTorch finds the same arrays ready in memory.
PyTorch runs the model of `transformers` with scaled-dot-product attention, and the decoder in the faster of two memory
formats. Before anything is timed the losses of both decoders, with the same parameters on the same batch, are compared.
"""

import logging
import shutil
import sys
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import numpy as np
import torch
from jaxla.models.build import build_network
from torch.nn import functional

from benchmarks.timing import about, compared, in_turn, print_result, timed
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, Model, Training
from jaxla.data.batches import SliceSource, training_batches
from jaxla.data.cases import find_cases
from jaxla.data.inputs import Canvas
from jaxla.data.phantoms import write_phantoms
from jaxla.data.prepared import prepare_cases
from jaxla.models.backbones import TRANSFORMERS, architecture
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.training.features import BATCH, FeatureCache
from jaxla.training.step import initial_state, make_gradient, make_optimiser, make_step, split_network, take_step
from tests.golden.live import live_model
from tests.parity.references import ReferenceFusionDecoder, reference_of

TOLERANCE = 1e-4  # of the two losses, relative
FEWEST_SLICES = 20  # of a small phantom
FORMATS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}


def main(arguments):
    logging.getLogger("jaxla").setLevel(logging.WARNING)  # stdout is the result's
    parser = command_parser("benchmarks.frozen_training", "Training on a frozen backbone beside PyTorch's, on CPU.")
    parser.add_argument("--network", type=Literal["transformer_segmenter", "fusion"], default="transformer_segmenter")
    parser.add_argument("--arch", type=str, default="dinov2_vits14")
    parser.add_argument("--size", type=int, default=224, help="side of the square image in pixels")
    parser.add_argument("--slices", type=int, default=16, help="in an epoch; a multiple of the batch")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="measured of each kind, after one that is not")
    options = parse_arguments(parser, arguments)
    arch = architecture("--arch", options.arch)
    variant = TRANSFORMERS[arch]
    if min(options.slices, options.batch, options.epochs) < 1 or options.slices % options.batch:
        raise InputError(f"option --slices={options.slices} must be a multiple of --batch={options.batch}, above 0")
    if options.size % variant.patch:
        raise InputError(f"option --size={options.size} must be a multiple of the patch size {variant.patch}")

    with tempfile.TemporaryDirectory() as folder:
        volumes = small_phantoms(Path(folder), options.slices)
        network = build_network(Model(arch, weights="random", backbone="frozen", network=options.network), 1, seed=0)
        cache = FeatureCache(Path(folder, "cache"), network, arch, Canvas(options.size))
        backbone = TorchBackbone(network.backbone, getattr(network, "blocks", None))
        decoder = reference_of(network.decoder, (options.size, options.size))
        images, masks = arrays_of(SliceSource(volumes, Canvas(options.size)))
        images = torch.from_numpy(images)

        def our_features():
            shutil.rmtree(cache.folder, ignore_errors=True)
            return cache.features(volumes)

        def their_features():
            return torch.cat([backbone(some) for some in images.split(BATCH)])

        blank = np.zeros((BATCH, options.size, options.size, 1), np.float32)
        first_call = {
            "jaxla": {"features": timed(lambda: jax.block_until_ready(cache.extract(blank)))},
            "torch": {"features": timed(lambda: backbone(images[:BATCH]))},
        }
        once = compared(in_turn({"jaxla": our_features, "torch": their_features}, options.epochs))
        cached = SliceSource(volumes, Canvas(options.size), cache.features(volumes), network.READS_IMAGES)
        features, _ = arrays_of(cached)

        decoder_network = network.on_features((options.size, options.size))
        some = slice(options.batch)
        difference = loss_difference(decoder_network, decoder, features[some], images[some], masks[some])
        if not difference <= TOLERANCE:
            sys.exit(f"the two decoders differ: their losses by {difference:.1e}, relative; at most {TOLERANCE:g}")

        features = torch.from_numpy(features)
        masks = torch.from_numpy(masks > 0).float().unsqueeze(1)
        of_format = {}
        for name, memory_format in FORMATS.items():
            trial = TorchTraining(None, decoder, features, images, masks, options.batch, memory_format)
            trial.steps(1)
            of_format[name] = timed(partial(trial.steps, 2)) / 2
        memory_format = min(of_format, key=of_format.get)

        epochs = {}
        for way, ours, source, first in (
            ("cached", decoder_network, cached, None),
            ("uncached", network, SliceSource(volumes, Canvas(options.size)), backbone),
        ):
            our_training = OurTraining(ours, source, options.batch)
            taken = FORMATS[memory_format]
            their_training = TorchTraining(first, decoder, features, images, masks, options.batch, taken)
            first_call["jaxla"][way] = timed(partial(our_training.steps, 1))
            first_call["torch"][way] = timed(partial(their_training.steps, 1))
            sides = {"jaxla": our_training, "torch": their_training}
            runs = {side: partial(training.steps, options.slices // options.batch) for side, training in sides.items()}
            epochs[way] = compared(in_turn(runs, options.epochs))
            our_training.close()

    result = {
        **about("jax", "torch", "transformers"),
        "network": options.network,
        "arch": arch,
        "size": options.size,
        "slices": options.slices,
        "batch": options.batch,
        "decoder_widths": Model().decoder_widths,
        "torch_threads": torch.get_num_threads(),
        "torch_memory_format": memory_format,
        "torch_step_seconds_by_format": of_format,
        "relative_loss_difference": difference,
        "first_call_seconds": first_call,
        "features_once": once,
        "epoch": epochs,
    }
    print_result(result)


def small_phantoms(folder, count):
    """Prepared volumes that hold `count` slices together."""
    write_phantoms(folder / "data", -(-count // FEWEST_SLICES), "small", seed=0)
    volumes = []
    for volume in prepare_cases(find_cases(folder / "data", ""), folder / "cache"):
        taken = min(volume.shape[0], count - sum(v.shape[0] for v in volumes))
        volumes += [replace(volume, shape=(taken, *volume.shape[1:]))] if taken else []
    return volumes


def arrays_of(source):
    """Inputs [S, H, W, 1] or [S, …, h, w, C], and masks [S, H, W], of every slice in order."""
    slices = [source[i] for i in range(len(source))]
    return np.stack([s["input"] for s in slices]), np.stack([s["mask"] for s in slices])


class OurTraining:
    """Steps of this package on a source of slices, as its training loop takes them."""

    def __init__(self, network, source, batch):
        parts = split_network(network, train_backbone=False)
        # copied, for a step gives its arguments' memory away, and the next training starts from the same
        parts = parts._replace(trainable=jax.tree.map(jax.numpy.copy, parts.trainable))
        optimiser = make_optimiser(Training(), 1, pretrained_backbone=False)
        self.step = make_step(make_gradient(parts.training), optimiser)
        self.state = initial_state(parts, optimiser)
        self.batches = training_batches(source, batch, seed=0)

    def steps(self, count):
        jax.block_until_ready(
            [take_step(self.step, self.state, next(self.batches), jax.random.key(0)) for _ in range(count)]
        )

    def close(self):
        self.batches.close()


class TorchTraining:
    """The same steps in PyTorch, on arrays in memory; on these features where there is no backbone."""

    def __init__(self, backbone, decoder, features, images, masks, batch, memory_format):
        self.backbone, self.features, self.images, self.masks, self.batch = backbone, features, images, masks, batch
        self.memory_format = memory_format
        self.decoder = decoder.to(memory_format=memory_format).train()
        self.optimiser = torch.optim.Adam(decoder.parameters(), lr=Training().learning_rate)
        self.loss = torch.nn.BCEWithLogitsLoss()
        self.order = []

    def steps(self, count):
        for _ in range(count):
            self.order = self.order or list(torch.randperm(len(self.masks)).split(self.batch))
            chosen = self.order.pop()
            images = self.images[chosen]
            features = self.backbone(images) if self.backbone else self.features[chosen]
            self.optimiser.zero_grad()
            logits = their_logits(self.decoder, features, images, self.memory_format)
            self.loss(logits, self.masks[chosen]).backward()
            self.optimiser.step()


class TorchBackbone:
    """Grey images [B, H, W, 1] -> patch tokens [B, h, w, C], or of several blocks [B, blocks, h, w, C]."""

    def __init__(self, vit, blocks=None):
        self.model, self.variant, self.blocks = live_model(vit), vit.variant, blocks
        self.model.set_attn_implementation("sdpa")

    def __call__(self, images):
        side = images.shape[1] // self.variant.patch
        with torch.no_grad():
            if self.blocks is None:
                return self.to_map(self.model(colour(images).contiguous()).last_hidden_state, side)
            states = self.model(colour(images).contiguous(), output_hidden_states=True).hidden_states[1:]
            norm = getattr(self.model, "layernorm", None) or self.model.norm
            return torch.stack([self.to_map(norm(states[block]), side) for block in self.blocks], dim=1)

    def to_map(self, tokens, side):
        return tokens[:, 1 + self.variant.registers :].unflatten(1, (side, side))


def colour(images):
    """Grey images [B, H, W, 1] -> ImageNet-normalised [B, 3, H, W]."""
    return ((images - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_DEVIATION)).permute(0, 3, 1, 2)


def their_logits(decoder, features, images, memory_format):
    if isinstance(decoder, ReferenceFusionDecoder):
        return decoder(features.movedim(-1, -3), colour(images).contiguous(memory_format=memory_format))
    return decoder(features.movedim(-1, -3).contiguous(memory_format=memory_format))


def loss_difference(ours, theirs, features, images, masks):
    """Relative difference of the training losses of the two decoders on one batch."""
    split = split_network(ours, train_backbone=False)
    batch = {"input": features, "mask": masks, "weight": np.ones(len(masks), np.float32)}
    if isinstance(theirs, ReferenceFusionDecoder):
        batch["image"] = images.numpy()
    gradient = jax.jit(make_gradient(split.training))
    our_loss = float(gradient(split.trainable, split.frozen, batch, jax.random.key(0))[0])
    with torch.no_grad():
        logits = their_logits(theirs.train(), torch.from_numpy(features), images, torch.contiguous_format)
        targets = torch.from_numpy(masks > 0).float().unsqueeze(1)
        their_loss = float(functional.binary_cross_entropy_with_logits(logits, targets))
    return abs(our_loss - their_loss) / abs(their_loss)


if __name__ == "__main__":
    run_command(main)
