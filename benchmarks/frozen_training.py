"""python -m benchmarks.frozen_training [--network=…] [--arch=…] [--size=…] [--batch=…]: epochs on a frozen backbone.

Times epochs of training paper 1's decoder, or paper 2's fusion, in this package and in PyTorch: with the backbone's
features computed beforehand ("cached"), and with the backbone run in every step ("uncached"). An epoch visits each
slice once, with a forward and backward pass of the decoder and an Adam step per batch. Both implementations run in turn
in this process from random weights: in float32 with all cores on CPU, in bfloat16 on a GPU. Prints JSON with the ratios
of the medians; first calls, which compile, are listed separately.

This package reads slices and features from disk with its own loader; PyTorch holds the same arrays in memory (on a GPU,
in GPU memory). `loader_seconds` is the time to read the cached epoch without training, `extraction_compute_seconds` the
time of the backbone alone on slices in memory. The loader is not the bottleneck if `loader_seconds` is much shorter
than the cached epoch, and `extraction_compute_seconds` almost as long as `features_once`.

PyTorch runs the `transformers` model with scaled-dot-product attention, and the fastest variant of the decoder:
channels last, channels first or, on a GPU, compiled with `torch.compile`. The losses of both decoders, with the same
parameters on the same batch, are compared before timing.
"""

import copy
import logging
import os
import shutil
import sys
import tempfile
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # leaves GPU memory to PyTorch

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
from jaxla.hardware import compute_dtype, on_gpu, peak_device_bytes
from jaxla.models.networks.fusion import FusionOptions
from jaxla.models.networks.transformer_segmenter import TransformerSegmenterOptions
from jaxla.models.ops.images import IMAGENET_DEVIATION, IMAGENET_MEAN
from jaxla.tasks import Features
from jaxla.tasks.slices import SliceTask
from jaxla.training.features import BATCH
from tests.golden.live import live_model
from tests.parity.decoder_references import ReferenceFusionDecoder
from tests.parity.references import make_reference

DEVICE = "cuda" if on_gpu() else "cpu"
NETWORKS = {"transformer_segmenter": TransformerSegmenterOptions, "fusion": FusionOptions}
MAX_LOSS_DIFFERENCE = {"float32": 1e-4, "bfloat16": 2e-2}  # relative
MIN_SLICES = 20  # lowest number of slices in a small phantom
TORCH_VARIANTS = ("channels last", "channels first")  # on a GPU also "compiled", with channels last


def main(arguments):
    logging.getLogger("jaxla").setLevel(logging.WARNING)  # stdout contains the result only
    parser = command_parser(
        "benchmarks.frozen_training", "Time training on a frozen backbone, with jaxla and with PyTorch."
    )
    networks = "`transformer_segmenter` of paper 1, or `fusion` of paper 2"
    choices = Literal["transformer_segmenter", "fusion"]
    parser.add_argument("--network", type=choices, default="transformer_segmenter", help=networks)
    parser.add_argument("--arch", type=str, default="dinov2_vits14", help="backbone, a vision transformer")
    parser.add_argument("--size", type=int, default=224, help="side of the square image in pixels")
    parser.add_argument("--slices", type=int, default=16, help="slices per epoch, a multiple of the batch size")
    parser.add_argument("--batch", type=int, default=4, help="slices per step")
    parser.add_argument("--data", type=str, default="phantom", help="folder of scans (default: small phantoms)")
    parser.add_argument("--output", type=str, help="also write the JSON to this file")
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs, both cached and uncached")
    options = parse_arguments(parser, arguments)
    model = NETWORKS[options.network](options.arch, weights="random", backbone="frozen").resolve()
    model.check_size("--size", options.size)
    if min(options.batch, options.epochs) < 1:
        raise InputError("--batch and --epochs", "must be at least 1", "Choose larger numbers.")
    if options.slices < 1 or options.slices % options.batch:
        problem = f"must be a positive multiple of --batch={options.batch}"
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
    if on_gpu():
        shown |= {"jaxla_peak_bytes": peak_device_bytes(), "torch_peak_bytes": torch.cuda.max_memory_allocated()}
    print_result(environment("jax", "torch", "transformers") | shown | measured, options.output)


def measure(task, folder, options):
    """Return the measured part of the result."""
    volumes, network = take_slices(folder, options.slices, options.data), task.build_network()
    cache = task.make_feature_cache(network, folder / "cache")
    backbone = TorchBackbone(network.backbone, getattr(network, "blocks", None))
    decoder = make_reference(network.decoder, (options.size, options.size))
    uncached = SliceSource(volumes, task.canvas)
    images, masks = load_arrays(uncached)
    images = torch.from_numpy(images).to(DEVICE)

    def our_features():
        shutil.rmtree(cache.folder, ignore_errors=True)
        return cache.features(volumes)

    def torch_features():
        return synchronize(torch.cat([backbone(part) for part in images.split(BATCH)]))

    blank = jax.numpy.zeros((BATCH, options.size, options.size, 1))

    def extract_only(count):
        jax.block_until_ready([cache.extract(blank) for _ in range(count)])

    first_call = {
        "jaxla": {"features": timed(partial(extract_only, 1))},
        "torch": {"features": timed(lambda: synchronize(backbone(images[:BATCH])))},
    }
    feature_timing = compare(time_in_turn({"jaxla": our_features, "torch": torch_features}, options.epochs))
    arrays = cache.features(volumes)
    features = Features({volume.id: array for volume, array in zip(volumes, arrays, strict=True)}, network.reads_images)
    cached = SliceSource(volumes, task.canvas, arrays, features.with_images)
    decoder_inputs = load_arrays(cached)[0].astype(np.float32)
    torch_arrays = (
        torch.from_numpy(decoder_inputs).to(backbone.model.dtype),
        images,
        torch.from_numpy(masks > 0).float(),
    )
    torch_arrays = [array.to(DEVICE) for array in torch_arrays]

    our_cached = OurTraining(task, network, cached, features)
    rows = slice(options.batch)
    difference = loss_difference(our_cached.trainer, decoder, load_arrays(cached)[0][rows], masks[rows], torch_arrays)
    if not difference <= MAX_LOSS_DIFFERENCE[jax.numpy.dtype(compute_dtype()).name]:
        sys.exit(f"the losses of the two decoders have a relative difference of {difference:.1e}; nothing was timed")

    variant_seconds = time_variants(decoder, torch_arrays, options.batch)
    torch_variant = min(variant_seconds, key=variant_seconds.get)
    epochs = {}
    our_uncached = OurTraining(task, network, uncached)
    for mode, ours, torch_backbone in (("cached", our_cached, None), ("uncached", our_uncached, backbone)):
        theirs = TorchTraining(torch_backbone, decoder, *torch_arrays, options.batch, torch_variant)
        trainings = {"jaxla": ours, "torch": theirs}
        for name, training in trainings.items():
            first_call[name][mode] = timed(partial(training.steps, 1))
        runs = {name: partial(training.steps, options.slices // options.batch) for name, training in trainings.items()}
        epochs[mode] = compare(time_in_turn(runs, options.epochs))
        ours.batches.close()
    return {
        "torch_variant": torch_variant,
        "torch_step_seconds_by_variant": variant_seconds,
        "relative_loss_difference": difference,
        "first_call_seconds": first_call,
        "features_once": feature_timing,
        "extraction_compute_seconds": timed(partial(extract_only, -(-options.slices // BATCH))),
        "loader_seconds": timed(partial(read_epoch, cached, options)),
        "epoch": epochs,
    }


def time_variants(decoder, arrays, batch):
    """Return the seconds per PyTorch step on cached features with each variant of the decoder."""
    variant_seconds = {}
    for variant in (*TORCH_VARIANTS, *(["compiled"] if on_gpu() else [])):
        trial = TorchTraining(None, decoder, *arrays, batch, variant)
        trial.steps(1)
        variant_seconds[variant] = timed(partial(trial.steps, 2)) / 2
    return variant_seconds


def read_epoch(source, options):
    """Read the batches of an epoch as training does, without training."""
    with closing(training_batches(source, options.batch, seed=0)) as batches:
        for _ in range(options.slices // options.batch):
            next(batches)


def take_slices(folder, count, root):
    """Return prepared volumes with `count` slices in total, from the scans in `root` or from small phantoms."""
    if root == "phantom":
        root = folder / "data"
        write_phantoms(root, -(-count // MIN_SLICES), "small", seed=0)
    volumes = []
    for volume in prepare_cases(find_cases(root, ""), folder / "cache"):
        depth = min(volume.shape[0], count - sum(v.shape[0] for v in volumes))
        volumes += [replace(volume, shape=(depth, *volume.shape[1:]))] if depth else []
    if (found := sum(volume.shape[0] for volume in volumes)) < count:
        raise InputError(f"--slices={count}", f"the scans have only {found} slices", "Use fewer slices.")
    return volumes


def synchronize(result):
    """Wait for the GPU and return the result."""
    if on_gpu():
        torch.cuda.synchronize()
    return result


def load_arrays(source):
    """Return the inputs [S, H, W, 1] or [S, …, h, w, C] and the masks [S, H, W] of all slices in order."""
    slices = [source[i] for i in range(len(source))]
    return np.stack([s["input"] for s in slices]), np.stack([s["mask"] for s in slices])


class OurTraining:
    """Training steps of this package on a source of slices, or of their features."""

    def __init__(self, task, network, source, features=None):
        self.trainer = task.make_trainer(network, source, features)
        # A step donates the buffers of the parameters, but the next training run starts from the same parameters.
        self.trainer.trainable = jax.tree.map(jax.numpy.copy, self.trainer.trainable)
        self.batches = training_batches(source, task.batch_size, seed=0)

    def steps(self, count):
        jax.block_until_ready([self.trainer.step(next(self.batches), 0) for _ in range(count)])


class TorchTraining:
    """The same steps in PyTorch on arrays in memory: images if there is a backbone, otherwise features."""

    def __init__(self, backbone, decoder, features, images, masks, batch, variant):
        self.backbone, self.features, self.images, self.masks, self.batch = backbone, features, images, masks, batch
        self.memory_format = torch.contiguous_format if variant == "channels first" else torch.channels_last
        decoder = decoder.to(DEVICE, memory_format=self.memory_format).train()
        self.decoder = torch.compile(decoder) if variant == "compiled" else decoder
        self.is_fusion = isinstance(decoder, ReferenceFusionDecoder)
        self.optimiser = torch.optim.Adam(decoder.parameters(), lr=BackboneTraining().learning_rate)
        self.order = []

    def steps(self, count):
        for _ in range(count):
            self.order = self.order or list(torch.randperm(len(self.masks)).split(self.batch))
            indices = self.order.pop()
            images = self.images[indices]
            features = self.backbone(images) if self.backbone else self.features[indices]
            self.optimiser.zero_grad()
            self.loss(features, images, self.masks[indices]).backward()
            self.optimiser.step()
        synchronize(None)

    def loss(self, features, images, masks):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=compute_dtype() == jax.numpy.bfloat16):
            features = features.movedim(-1, -3)
            if self.is_fusion:
                logits = self.decoder(features, to_colour(images).contiguous(memory_format=self.memory_format))
            else:
                logits = self.decoder(features.contiguous(memory_format=self.memory_format))
        return functional.binary_cross_entropy_with_logits(logits[:, 0].float(), masks)


class TorchBackbone:
    """Map grey images [B, H, W, 1] to patch tokens [B, h, w, C], or [B, blocks, h, w, C] for several blocks."""

    def __init__(self, vit, blocks=None):
        self.model, self.variant, self.blocks = live_model(vit), vit.variant, blocks
        self.model.set_attn_implementation("sdpa")
        self.model.to(DEVICE, getattr(torch, jax.numpy.dtype(compute_dtype()).name))

    def __call__(self, images):
        side = images.shape[1] // self.variant.patch
        colour = to_colour(images).contiguous().to(self.model.dtype)
        with torch.no_grad():
            if self.blocks is None:
                return self.to_map(self.model(colour).last_hidden_state, side)
            states = self.model(colour, output_hidden_states=True).hidden_states[1:]
            norm = getattr(self.model, "layernorm", None) or self.model.norm
            return torch.stack([self.to_map(norm(states[block]), side) for block in self.blocks], dim=1)

    def to_map(self, tokens, side):
        return tokens[:, 1 + self.variant.registers :].unflatten(1, (side, side))


def to_colour(images):
    """Convert grey images [B, H, W, 1] to ImageNet-normalised RGB [B, 3, H, W]."""
    mean, deviation = (torch.tensor(values, device=images.device) for values in (IMAGENET_MEAN, IMAGENET_DEVIATION))
    return ((images - mean) / deviation).permute(0, 3, 1, 2)


def loss_difference(trainer, decoder, features, masks, torch_arrays):
    """Return the relative difference between the training losses of the two decoders on a batch of these features."""
    rows = len(features)
    batch = {"input": features, "mask": masks, "weight": np.ones(rows, np.float32)}
    theirs = TorchTraining(None, copy.deepcopy(decoder), *torch_arrays, rows, "channels first")
    if theirs.is_fusion:
        batch["image"] = theirs.images[:rows].cpu().numpy()
    our_loss = float(trainer.gradients(batch)[0])
    with torch.no_grad():
        torch_loss = float(theirs.loss(theirs.features[:rows], theirs.images[:rows], theirs.masks[:rows]))
    return abs(our_loss - torch_loss) / abs(torch_loss)


if __name__ == "__main__":
    run_command(main)
