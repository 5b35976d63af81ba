"""python -m benchmarks.frozen_training [--network=…] [--arch=…] [--size=…] [--batch=…]: epochs on a frozen backbone.

Times epochs of training paper 1's decoder, or paper 2's fusion, in this package and in PyTorch: with the backbone's
features computed beforehand ("cached"), and with the backbone run in every step ("uncached"). An epoch takes each slice
once, forward and backward through the decoder, with a step of Adam per batch. Both run in turn in this process, in
float32 on all CPU cores, with random weights. Prints JSON with the ratios of the medians; first calls, which compile,
are listed separately.

This package reads slices and features from disk through its own loader; PyTorch has the same arrays in memory. PyTorch
runs the model of `transformers` with scaled-dot-product attention, and the decoder in the faster of two memory formats.
The losses of both decoders, with the same parameters on the same batch, are compared first.
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

from benchmarks.timing import compare, environment, print_result, time_in_turn, timed
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import InputError, Model, Training
from jaxla.data.batches import SliceSource, training_batches
from jaxla.data.cases import find_cases
from jaxla.data.inputs import Canvas
from jaxla.data.phantoms import write_phantoms
from jaxla.data.prepared import prepare_cases
from jaxla.models.backbones import TRANSFORMERS, transformer_name
from jaxla.models.build import build_network
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.training.features import BATCH, FeatureCache
from jaxla.training.step import initial_state, make_gradient, make_optimiser, make_step, split_network, take_step
from tests.golden.live import live_model
from tests.parity.references import ReferenceFusionDecoder, reference_of

MAX_LOSS_DIFFERENCE = 1e-4  # relative
MIN_SLICES = 20  # of a small phantom
FORMATS = {"channels last": torch.channels_last, "channels first": torch.contiguous_format}


def main(arguments):
    logging.getLogger("jaxla").setLevel(logging.WARNING)  # stdout contains the result only
    parser = command_parser("benchmarks.frozen_training", "Time training on a frozen backbone, and PyTorch's, on CPU.")
    parser.add_argument("--network", type=Literal["transformer_segmenter", "fusion"], default="transformer_segmenter")
    parser.add_argument("--arch", type=str, default="dinov2_vits14")
    parser.add_argument("--size", type=int, default=224, help="side of the square image in pixels")
    parser.add_argument("--slices", type=int, default=16, help="slices of an epoch, a multiple of the batch size")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of each kind, after one that is not timed")
    options = parse_arguments(parser, arguments)
    arch = transformer_name("--arch", options.arch)
    variant = TRANSFORMERS[arch]
    if min(options.slices, options.batch, options.epochs) < 1 or options.slices % options.batch:
        raise InputError(
            f"--slices={options.slices}", f"not a multiple of --batch={options.batch} above 0", "Choose another number."
        )
    if options.size % variant.patch:
        problem = f"not a multiple of the patch size {variant.patch}"
        raise InputError(f"--size={options.size}", problem, "Choose another size.")

    with tempfile.TemporaryDirectory() as folder:
        volumes = small_phantoms(Path(folder), options.slices)
        network = build_network(Model(arch, weights="random", backbone="frozen", network=options.network), 1, seed=0)
        cache = FeatureCache(Path(folder, "cache"), network, arch, Canvas(options.size))
        backbone = TorchBackbone(network.backbone, getattr(network, "blocks", None))
        decoder = reference_of(network.decoder, (options.size, options.size))
        images, masks = load_arrays(SliceSource(volumes, Canvas(options.size)))
        images = torch.from_numpy(images)

        def our_features():
            shutil.rmtree(cache.folder, ignore_errors=True)
            return cache.features(volumes)

        def their_features():
            return torch.cat([backbone(part) for part in images.split(BATCH)])

        blank = np.zeros((BATCH, options.size, options.size, 1), np.float32)
        first_call = {
            "jaxla": {"features": timed(lambda: jax.block_until_ready(cache.extract(blank)))},
            "torch": {"features": timed(lambda: backbone(images[:BATCH]))},
        }
        once = compare(time_in_turn({"jaxla": our_features, "torch": their_features}, options.epochs))
        cached = SliceSource(volumes, Canvas(options.size), cache.features(volumes), network.READS_IMAGES)
        features, _ = load_arrays(cached)

        decoder_network = network.on_features((options.size, options.size))
        batch = slice(options.batch)
        difference = loss_difference(decoder_network, decoder, features[batch], images[batch], masks[batch])
        if not difference <= MAX_LOSS_DIFFERENCE:
            sys.exit(f"the losses of the two decoders differ by {difference:.1e}, relative; nothing was timed")

        features = torch.from_numpy(features)
        masks = torch.from_numpy(masks > 0).float().unsqueeze(1)
        format_seconds = {}
        for name, memory_format in FORMATS.items():
            trial = TorchTraining(None, decoder, features, images, masks, options.batch, memory_format)
            trial.steps(1)
            format_seconds[name] = timed(partial(trial.steps, 2)) / 2
        memory_format = min(format_seconds, key=format_seconds.get)

        epochs = {}
        for way, ours, source, first in (
            ("cached", decoder_network, cached, None),
            ("uncached", network, SliceSource(volumes, Canvas(options.size)), backbone),
        ):
            our_training = OurTraining(ours, source, options.batch)
            torch_format = FORMATS[memory_format]
            their_training = TorchTraining(first, decoder, features, images, masks, options.batch, torch_format)
            first_call["jaxla"][way] = timed(partial(our_training.steps, 1))
            first_call["torch"][way] = timed(partial(their_training.steps, 1))
            sides = {"jaxla": our_training, "torch": their_training}
            runs = {side: partial(training.steps, options.slices // options.batch) for side, training in sides.items()}
            epochs[way] = compare(time_in_turn(runs, options.epochs))
            our_training.close()

    result = {
        **environment("jax", "torch", "transformers"),
        "network": options.network,
        "arch": arch,
        "size": options.size,
        "slices": options.slices,
        "batch": options.batch,
        "decoder_widths": Model().decoder_widths,
        "torch_threads": torch.get_num_threads(),
        "torch_memory_format": memory_format,
        "torch_step_seconds_by_format": format_seconds,
        "relative_loss_difference": difference,
        "first_call_seconds": first_call,
        "features_once": once,
        "epoch": epochs,
    }
    print_result(result)


def small_phantoms(folder, count):
    """Return prepared volumes with `count` slices in total."""
    write_phantoms(folder / "data", -(-count // MIN_SLICES), "small", seed=0)
    volumes = []
    for volume in prepare_cases(find_cases(folder / "data", ""), folder / "cache"):
        depth = min(volume.shape[0], count - sum(v.shape[0] for v in volumes))
        volumes += [replace(volume, shape=(depth, *volume.shape[1:]))] if depth else []
    return volumes


def load_arrays(source):
    """Return the inputs [S, H, W, 1] or [S, …, h, w, C] and the masks [S, H, W] of all slices in order."""
    slices = [source[i] for i in range(len(source))]
    return np.stack([s["input"] for s in slices]), np.stack([s["mask"] for s in slices])


class OurTraining:
    """Training steps of this package on a source of slices."""

    def __init__(self, network, source, batch):
        parts = split_network(network, train_backbone=False)
        # a step reuses the memory of its arguments, but the next training starts from the same parameters
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
    """The same steps in PyTorch on arrays in memory: on images with a backbone, else on features."""

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
            indices = self.order.pop()
            images = self.images[indices]
            features = self.backbone(images) if self.backbone else self.features[indices]
            self.optimiser.zero_grad()
            logits = their_logits(self.decoder, features, images, self.memory_format)
            self.loss(logits, self.masks[indices]).backward()
            self.optimiser.step()


class TorchBackbone:
    """Grey images [B, H, W, 1] -> patch tokens [B, h, w, C], or those of several blocks [B, blocks, h, w, C]."""

    def __init__(self, vit, blocks=None):
        self.model, self.variant, self.blocks = live_model(vit), vit.variant, blocks
        self.model.set_attn_implementation("sdpa")

    def __call__(self, images):
        side = images.shape[1] // self.variant.patch
        with torch.no_grad():
            if self.blocks is None:
                return self.to_map(self.model(to_colour(images).contiguous()).last_hidden_state, side)
            states = self.model(to_colour(images).contiguous(), output_hidden_states=True).hidden_states[1:]
            norm = getattr(self.model, "layernorm", None) or self.model.norm
            return torch.stack([self.to_map(norm(states[block]), side) for block in self.blocks], dim=1)

    def to_map(self, tokens, side):
        return tokens[:, 1 + self.variant.registers :].unflatten(1, (side, side))


def to_colour(images):
    """Grey images [B, H, W, 1] -> ImageNet-normalised [B, 3, H, W]."""
    return ((images - torch.tensor(IMAGENET_MEAN)) / torch.tensor(IMAGENET_DEVIATION)).permute(0, 3, 1, 2)


def their_logits(decoder, features, images, memory_format):
    if isinstance(decoder, ReferenceFusionDecoder):
        return decoder(features.movedim(-1, -3), to_colour(images).contiguous(memory_format=memory_format))
    return decoder(features.movedim(-1, -3).contiguous(memory_format=memory_format))


def loss_difference(ours, theirs, features, images, masks):
    """Return the relative difference between the training losses of the two decoders on one batch."""
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
