"""Train on one device and on several, and save the results as an .npz file.

python -m tests.distributed.mesh_driver FOLDER: one process with eight devices.
python -m tests.distributed.mesh_driver FOLDER COORDINATOR INDEX: one of two processes with two devices each.
"""

import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"  # the programs take longer to compile than to run
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={2 if len(sys.argv) > 2 else 8}"

import jax
import numpy as np
from flax import nnx

from jaxla.config import BackboneTraining
from jaxla.data.batches import SliceSource, steps_per_epoch
from jaxla.data.inputs import Canvas
from jaxla.distributed import is_first, join_processes
from jaxla.mesh import local_rows, replicate, use_devices
from jaxla.models.networks.fusion import FusionDecoder, FusionSegmenter
from jaxla.models.networks.transformer_segmenter import ConvolutionalDecoder, TransformerSegmenter
from jaxla.models.networks.unet import UNet
from jaxla.models.networks.windows import WindowDecoder, WindowSegmenter
from jaxla.training.loop import fit
from jaxla.training.losses import cross_entropy, dice_cross_entropy, per_volume
from jaxla.training.step import make_gradient
from jaxla.training.trainer import Trainer
from jaxla.training.two_pass import make_two_pass_gradient
from tests.distributed.mesh_cases import BATCH, CASES, RESUMED_ON, STEPS, TWO_PROCESS_CASES
from tests.tiny import ROTARY, randomise, tiny_backbone
from tests.training.scans import disc_scans

RECIPE = BackboneTraining(learning_rate=1e-3, backbone_learning_rate=1e-4)


def tiny_network(name):
    if name == "convolutional":
        return randomise(nnx.eval_shape(lambda: UNet((4, 8), 1, rngs=nnx.Rngs(0))))
    if name == "fusion":
        decoder = nnx.eval_shape(lambda: FusionDecoder(32, 3, (8, 4), 1, rngs=nnx.Rngs(0)))
        return FusionSegmenter(tiny_backbone(), (0, 1, 2), randomise(decoder, 1))
    if name == "windows":
        decoder = nnx.eval_shape(lambda: WindowDecoder(32, (8, 8, 4, 4), 1, depth_places=4, rngs=nnx.Rngs(0)))
        return WindowSegmenter(tiny_backbone(), randomise(decoder, 1), (2, 1, 2))
    decoder = nnx.eval_shape(lambda: ConvolutionalDecoder(32, (8, 4), 1, rngs=nnx.Rngs(0)))
    return TransformerSegmenter(tiny_backbone(variant=ROTARY), randomise(decoder, 1))


def batches(slices=None):
    """Yield the rows of each batch that the devices of this process compute.

    Args:
        slices: slices per volume if rows are volumes; every other volume has one slice fewer.
    """
    rng, rows = np.random.default_rng(0), local_rows(BATCH)
    for _ in range(STEPS):
        shape = (BATCH,) if slices is None else (BATCH, slices)
        images, weight = rng.random((*shape, 24, 40, 1), dtype=np.float32), np.ones(shape, np.float32)
        if slices is not None:
            weight[::2, -1] = 0
        batch = {"input": images, "mask": (images[..., 0] > 0.7).astype(np.uint8), "weight": weight}
        yield {
            key: np.pad(array, [(0, max(0, rows.stop - BATCH)), *[(0, 0)] * (array.ndim - 1)])[rows.start : rows.stop]
            for key, array in batch.items()
        }


def train(name):
    """Return losses, first gradients, and final parameters and statistics: name -> array."""
    is_windows = name == "windows"
    trainer = Trainer(
        tiny_network(name),
        RECIPE,
        STEPS,
        loss=per_volume(partial(dice_cross_entropy, batch_dice=True)) if is_windows else cross_entropy,
        make_gradient=make_two_pass_gradient if is_windows else make_gradient,
        train_backbone=not is_windows,
        has_pretrained_backbone=True,
    )
    arrays, losses = {}, []
    for i, batch in enumerate(batches(3 if is_windows else None)):
        losses.append(trainer.step(batch, i))
        if i == 0:  # Adam's first moment is now 0.1 times the gradient
            moments = flatten_by_name("gradients", trainer.optimiser_state)
            arrays |= {key: array for key, array in moments.items() if ".mu." in key}
    leaves = jax.tree.leaves((trainer.trainable, trainer.optimiser_state))
    device_bytes = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    return (
        arrays
        | flatten_by_name("parameters", trainer.trainable)
        | flatten_by_name("statistics", trainer.frozen.statistics)
        | {
            "losses": np.array(losses),
            "bytes on a device": np.array(device_bytes),
        }
    )


def flatten_by_name(kind, tree):
    tree = jax.jit(replicate)(tree)
    name = partial(jax.tree_util.keystr, simple=True, separator=".")
    return {f"{kind}/{name(path)}": np.asarray(leaf) for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}


def train_in_parts(folder, devices_by_epoch):
    """Train up to each epoch of `devices_by_epoch` on that many devices, resuming; return the metrics of each epoch."""
    volumes = disc_scans(folder / "scans")
    for epoch, count in devices_by_epoch.items():
        with use_devices(count, shard_params=count == 4):
            train, val = SliceSource(volumes[:2], Canvas(32)), SliceSource(volumes[1:], Canvas(32))
            recipe = replace(RECIPE, epochs=epoch, batch_size=BATCH, patience=9)
            trainer = Trainer(
                tiny_network("finetuned"), recipe, steps_per_epoch(train, BATCH), has_pretrained_backbone=True
            )
            progress = fit(trainer, train, val, folder / "checkpoints")
    kinds = ("train_loss", "val_loss", "val_dice", "val_iou")
    return np.array([[metrics[kind] for kind in kinds] for metrics in progress.history])


def block_weights():
    """Within a mesh of eight devices, return the block weights of a network on one device, as after loading."""
    state = jax.device_put(nnx.state(tiny_network("fusion")), jax.devices()[0])
    with use_devices(8):
        return np.array(nnx.merge(nnx.graphdef(tiny_network("fusion")), state).block_weights()["levels"])


def train_cases(cases):
    arrays = {}
    for case, (devices, shard_params, networks) in cases.items():
        for name in networks:
            with use_devices(devices, shard_params):
                arrays |= {f"{case}/{name}/{key}": array for key, array in train(name).items()}
    return arrays


def main(folder):
    arrays = train_cases(CASES)
    arrays["block weights"] = block_weights()
    arrays["resumed"] = train_in_parts(folder / "resumed", RESUMED_ON)
    arrays["uninterrupted"] = train_in_parts(folder / "uninterrupted", {max(RESUMED_ON): 1})
    np.savez(folder / "one_process.npz", **arrays)


def run_in_two_processes(folder, coordinator, index):
    with join_processes(coordinator, 2, int(index), timeout=60):
        arrays = train_cases(TWO_PROCESS_CASES)
        if is_first():
            np.savez(folder / "two_processes.npz", **arrays)


if __name__ == "__main__":
    (run_in_two_processes if len(sys.argv) > 2 else main)(Path(sys.argv[1]), *sys.argv[2:])
