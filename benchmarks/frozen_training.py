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
from torch.nn import functional

from benchmarks.timing import compare, environment, print_result, time_in_turn, timed
from jaxla.cli.command_line import command_parser, parse_arguments
from jaxla.cli.process import run_command
from jaxla.config import BackboneTraining, Data, Experiment, InputError, Method, Preprocessing
from jaxla.data.batches import SliceSource, training_batches
from jaxla.data.cases import find_cases
from jaxla.data.phantoms import write_phantoms
from jaxla.data.prepared import prepare_cases
from jaxla.models.networks.fusion import FusionOptions
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.tasks import Features
from jaxla.tasks.slices import SliceTask
from jaxla.training.features import BATCH
from tests.golden.live import live_model
from tests.parity.references import ReferenceFusionDecoder, reference_of

NETWORKS = {"transformer_segmenter": TransformerSegmenterOptions, "fusion": FusionOptions}
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
    model = NETWORKS[options.network](options.arch, weights="random", backbone="frozen").resolve()
    model.check_size("--size", options.size)
    if min(options.slices, options.batch, options.epochs) < 1 or options.slices % options.batch:
        problem = f"not a multiple of --batch={options.batch} above 0"
        raise InputError(f"--slices={options.slices}", problem, "Choose another number.")
    recipe = BackboneTraining(batch_size=options.batch)
    method = Method("frozen_training", "", model, Preprocessing(options.size), recipe)
    task = SliceTask(Experiment(method.name, "", Data(), method), outputs=1)
    with tempfile.TemporaryDirectory() as folder:
        measured = measure(task, Path(folder), options)
    shown = {"network": options.network, "arch": model.arch} | {
        name: options[name] for name in ("size", "slices", "batch")
    }
    shown |= {"decoder_widths": model.decoder_widths, "torch_threads": torch.get_num_threads()}
    print_result(environment("jax", "torch", "transformers") | shown | measured)


def measure(task, folder, options):
    """Return the measured part of the result."""
    volumes, network = small_phantoms(folder, options.slices), task.build_network()
    cache = task.make_feature_cache(network, folder / "cache")
    backbone = TorchBackbone(network.backbone, getattr(network, "blocks", None))
    decoder = reference_of(network.decoder, (options.size, options.size))
    uncached = SliceSource(volumes, task.canvas)
    images, masks = load_arrays(uncached)
    images = torch.from_numpy(images)

    def our_features():
        shutil.rmtree(cache.folder, ignore_errors=True)
        return cache.features(volumes)

    def torch_features():
        return torch.cat([backbone(part) for part in images.split(BATCH)])

    blank = np.zeros((BATCH, options.size, options.size, 1), np.float32)
    first_call = {
        "jaxla": {"features": timed(lambda: jax.block_until_ready(cache.extract(blank)))},
        "torch": {"features": timed(lambda: backbone(images[:BATCH]))},
    }
    once = compare(time_in_turn({"jaxla": our_features, "torch": torch_features}, options.epochs))
    arrays = cache.features(volumes)
    features = Features({volume.id: array for volume, array in zip(volumes, arrays, strict=True)}, network.READS_IMAGES)
    cached = SliceSource(volumes, task.canvas, arrays, features.with_images)
    decoder_inputs, _ = load_arrays(cached)

    our_cached = OurTraining(task, network, cached, features)
    rows = slice(options.batch)
    difference = loss_difference(our_cached.trainer, decoder, decoder_inputs[rows], images[rows], masks[rows])
    if not difference <= MAX_LOSS_DIFFERENCE:
        sys.exit(f"the losses of the two decoders differ by {difference:.1e}, relative; nothing was timed")

    torch_arrays = torch.from_numpy(decoder_inputs), images, torch.from_numpy(masks > 0).float().unsqueeze(1)
    format_seconds = time_formats(decoder, torch_arrays, options.batch)
    memory_format = min(format_seconds, key=format_seconds.get)
    epochs = {}
    our_uncached = OurTraining(task, network, uncached)
    for way, ours, torch_backbone in (("cached", our_cached, None), ("uncached", our_uncached, backbone)):
        theirs = TorchTraining(torch_backbone, decoder, *torch_arrays, options.batch, FORMATS[memory_format])
        sides = {"jaxla": ours, "torch": theirs}
        for name, training in sides.items():
            first_call[name][way] = timed(partial(training.steps, 1))
        runs = {name: partial(training.steps, options.slices // options.batch) for name, training in sides.items()}
        epochs[way] = compare(time_in_turn(runs, options.epochs))
        ours.batches.close()
    return {
        "torch_memory_format": memory_format,
        "torch_step_seconds_by_format": format_seconds,
        "relative_loss_difference": difference,
        "first_call_seconds": first_call,
        "features_once": once,
        "epoch": epochs,
    }


def time_formats(decoder, arrays, batch):
    """Return the seconds of PyTorch's step on cached features in each memory format."""
    format_seconds = {}
    for name, memory_format in FORMATS.items():
        trial = TorchTraining(None, decoder, *arrays, batch, memory_format)
        trial.steps(1)
        format_seconds[name] = timed(partial(trial.steps, 2)) / 2
    return format_seconds


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
    """Training steps of this package on a source of slices, or of their features."""

    def __init__(self, task, network, source, features=None):
        self.trainer = task.make_trainer(network, source, features)
        # A step reuses the memory of the parameters, but the next training starts from the same ones.
        self.trainer.trainable = jax.tree.map(jax.numpy.copy, self.trainer.trainable)
        self.batches = training_batches(source, task.batch_size, seed=0)

    def steps(self, count):
        jax.block_until_ready([self.trainer.step(next(self.batches), 0) for _ in range(count)])


class TorchTraining:
    """The same steps in PyTorch on arrays in memory: on images with a backbone, else on features."""

    def __init__(self, backbone, decoder, features, images, masks, batch, memory_format):
        self.backbone, self.features, self.images, self.masks, self.batch = backbone, features, images, masks, batch
        self.memory_format = memory_format
        self.decoder = decoder.to(memory_format=memory_format).train()
        self.optimiser = torch.optim.Adam(decoder.parameters(), lr=BackboneTraining().learning_rate)
        self.loss = torch.nn.BCEWithLogitsLoss()
        self.order = []

    def steps(self, count):
        for _ in range(count):
            self.order = self.order or list(torch.randperm(len(self.masks)).split(self.batch))
            indices = self.order.pop()
            images = self.images[indices]
            features = self.backbone(images) if self.backbone else self.features[indices]
            self.optimiser.zero_grad()
            logits = torch_logits(self.decoder, features, images, self.memory_format)
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


def torch_logits(decoder, features, images, memory_format):
    if isinstance(decoder, ReferenceFusionDecoder):
        return decoder(features.movedim(-1, -3), to_colour(images).contiguous(memory_format=memory_format))
    return decoder(features.movedim(-1, -3).contiguous(memory_format=memory_format))


def loss_difference(trainer, decoder, features, images, masks):
    """Return the relative difference between the training losses of the two decoders on one batch."""
    batch = {"input": features, "mask": masks, "weight": np.ones(len(masks), np.float32)}
    if isinstance(decoder, ReferenceFusionDecoder):
        batch["image"] = images.numpy()
    our_loss = float(trainer.gradients(batch)[0])
    with torch.no_grad():
        logits = torch_logits(decoder.train(), torch.from_numpy(features), images, torch.contiguous_format)
        targets = torch.from_numpy(masks > 0).float().unsqueeze(1)
        torch_loss = float(functional.binary_cross_entropy_with_logits(logits, targets))
    return abs(our_loss - torch_loss) / abs(torch_loss)


if __name__ == "__main__":
    run_command(main)
