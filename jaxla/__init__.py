"""Left-atrium segmentation in LGE-MRI with DINOv2 and DINOv3 vision transformers, in JAX.

`jaxla --help` lists the commands.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxla.config import InputError
from jaxla.version import __version__

if TYPE_CHECKING:
    import jax.numpy as jnp
    import nibabel as nib
    import numpy as np
    from flax import nnx

    from jaxla.models.backbones import Backbone
    from jaxla.runs.trained import TrainedRun

# In a checkout, the folder `experiments` is next to the package; in an installation, it is inside the package.
if not (Path(__file__).parent / "experiments").is_dir():
    __path__.append(str(Path(__file__).parents[1]))

if getattr(sys, "argv", [])[:1] == ["-m"]:  # Python is about to run `python -m jaxla.COMMAND`, whose module imports JAX
    from jaxla.cli.start import start_command

    start_command()

__all__ = [
    "InputError",
    "__version__",
    "build_network",
    "load_backbone",
    "load_network",
    "load_run",
    "run_experiment",
    "segment",
]

# Imports are within functions, because JAX takes seconds to import and a command's --help must not wait for it.


def load_backbone(path: str | Path, dtype: jnp.dtype | None = None) -> Backbone:
    """Load a backbone from a file that `convert_weights` wrote, which states the architecture.

    The backbone takes images [B, H, W, 3] float32, ImageNet-normalised. A vision transformer, for which H and W are
    multiples of the patch size, returns `cls` [B, C], `registers` [B, R, C] and `patches` [B, h, w, C] after the final
    norm; `intermediate(images, blocks)` returns the patch tokens after each of the given blocks. A ResNet or VGG
    returns the features of the last stage [B, h, w, C]; `intermediate(images)` returns the features of all stages, and
    for a ResNet also those of the stem.

    Args:
        dtype: dtype of the computation. Default: float32 on CPU and on NVIDIA GPUs before Ampere, bfloat16 elsewhere.
            Parameters stay float32.

    Raises:
        InputError: the file is missing or truncated, or its parameters are not those of its architecture. Only
            `convert_weights --verify` detects changed values.
    """
    from jaxla.hardware import require_float32
    from jaxla.models import weights

    require_float32()
    return weights.load_backbone(path, dtype)


def build_network(
    name: str,
    classes: int = 1,
    seed: int = 0,
    weights: str | Path | None = None,
    plan: Mapping[str, Any] | str | Path | None = None,
) -> nnx.Module:
    """Return the untrained network of a method, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K].

    All networks take C = 1, grey values in 0..1, except `unet_small`, which takes C = 3: a slice between its two
    neighbours. Networks with a pretrained backbone also take C = 3, ImageNet-normalised.
    The `windows_` methods take whole volumes [B, D, H, W, C], with slices from head to foot, right to left or front to
    back. `nnunet_3d` takes [B, D, H, W, 1]. The input of nnU-Net is normalised to mean 0 and standard deviation 1.

    Args:
        name: a method; `python -m jaxla.train --exp=list` lists them.
        classes: number of logits K: 1 for one structure (sigmoid), otherwise background and structures (softmax).
        seed: seed of the randomly initialised parameters.
        weights: the backbone's weights: a converted file, or "random". Default: the method's own, which for released
            backbones is the file in the cache folder.
        plan: nnU-Net's plan: a file that `python -m jaxla.plan` or nnU-Net wrote, or its content.

    Raises:
        InputError: the method is unknown, weights are missing or do not fit, or a plan is missing or not needed.
    """
    from jaxla.config import lookup
    from jaxla.experiments import METHODS
    from jaxla.hardware import require_float32
    from jaxla.models.networks.base import build_network
    from jaxla.nnunet.plan import plan_from_json, read_plan

    require_float32()
    method = lookup("method", name, METHODS)
    model = method.model
    if weights is not None:
        model = model.with_weights(str(weights))
        if model.weights != str(weights):
            raise InputError(
                f"weights={weights}", f"has no effect, because {name} has no pretrained part", "Remove the argument."
            )
    if not model.needs_plan and plan is not None:
        raise InputError("plan", f"{name} needs no plan", "Remove the argument.")
    if model.needs_plan and plan is None:
        raise InputError("plan", f"{name} needs a plan", "Pass the file that python -m jaxla.plan writes.")
    if isinstance(plan, Mapping):
        plan = plan_from_json(plan, "plan")
    elif plan is not None:
        plan = read_plan(Path(plan))
    return build_network(model, classes, seed, plan=plan)


def load_network(path: str | Path) -> nnx.Module:
    """Return a trained network, in evaluation mode: images [B, H, W, C] -> logits [B, H, W, K]; see `build_network`.

    Args:
        path: the folder of a finished run, or a file that `convert_weights --arch=nnunet` wrote. The network in such a
            file returns nnU-Net's own logits: K = 2 for one structure, background first.

    Raises:
        InputError: the folder is not a run or has no checkpoint, the file of its frozen backbone is missing or has
            changed, or the file is damaged or holds no network.
    """
    from jaxla.hardware import require_float32
    from jaxla.nnunet.converted import load_converted
    from jaxla.runs.trained import load_run

    require_float32()
    if Path(path).is_file() or Path(path).suffix == ".safetensors":
        return load_converted(Path(path))
    return load_run(path).network


def run_experiment(name: str, options: Mapping[str, Any] | None = None) -> Path | None:
    """Train, test and report like `jaxla train --exp=NAME`; return the run's folder, or None after a dry run.

    An interrupt saves a checkpoint; the same call with the options `run-dir` and `resume` then continues.

    Args:
        name: an experiment; `jaxla train --exp=list` lists them.
        options: options of the command by their names without the dashes, such as
            {"data.root": "scans", "training.minutes": 5, "run-dir": "runs/mine", "resume": True}.

    Raises:
        InputError: bad options, data or weights; everything is checked before training starts.
        jaxla.cli.process.Stopped: an interrupt; the message holds the command that resumes the run.
    """
    import shlex

    from jaxla import train
    from jaxla.cli.command_line import parse_experiment
    from jaxla.cli.process import log_to_terminal
    from jaxla.experiments import EXPERIMENTS, METHODS

    arguments = [f"--exp={name}"]
    for key, value in (options or {}).items():
        if key in ("resume", "dry-run", "shard-params"):  # flags, which take no value
            arguments += [f"--{key}"] if value else []
        elif isinstance(value, list | tuple):
            arguments.append(f"--{key}=[{','.join(map(str, value))}]")
        else:
            arguments.append(f"--{key}={str(value).lower() if isinstance(value, bool) else value}")
    log_to_terminal()
    parsed = parse_experiment(arguments, EXPERIMENTS, METHODS)
    return train.run(parsed, shlex.join(["python", "-m", "jaxla.train", *arguments]))


def load_run(path: str | Path) -> TrainedRun:
    """Load a trained run for `segment`; a run with --fold=all has the networks of all folds.

    Raises:
        InputError: see `load_network`.
    """
    from jaxla.runs import trained

    return trained.load_run(path)


def segment(
    run: str | Path | TrainedRun, image: nib.Nifti1Image | np.ndarray, affine: np.ndarray | None = None
) -> nib.Nifti1Image | np.ndarray:
    """Return the mask of one scan on its own grid, with the label values of the run's training masks.

    Args:
        run: folder of a run; or the result of `load_run`, which compiles once for several scans.
        image: nibabel image, or array [X, Y, Z].
        affine: [4, 4], voxel indices to mm (RAS+); required for an array, not allowed for a nibabel image.

    Returns:
        A nibabel image for a nibabel image, an array [X, Y, Z] for an array.

    Raises:
        InputError: the scan, its affine or the run is invalid.
    """
    import nibabel as nib
    import numpy as np

    from jaxla.data.slices import slice_geometry
    from jaxla.data.volumes import image_from_array, image_from_nibabel
    from jaxla.inference.segment import segment_volume

    is_nibabel = isinstance(image, nib.Nifti1Image)
    if is_nibabel == (affine is not None):
        if is_nibabel:
            raise InputError("affine", "not allowed with a nibabel image, which has its own", "Remove the argument.")
        raise InputError("affine", "missing", "Pass the array's 4 × 4 matrix from voxel indices to mm (RAS+).")
    volume = image_from_nibabel(image) if is_nibabel else image_from_array(np.asarray(image), np.asarray(affine))
    run = load_run(run) if isinstance(run, str | Path) else run
    run.task.check_scan(volume.path, volume.array.shape[slice_geometry(volume.affine).order[0]])
    mask = run.record.labels.to_values(segment_volume(run.segment, volume)[0])
    if not is_nibabel:
        return mask
    header = image.header.copy()
    header.set_data_dtype(mask.dtype)
    return nib.Nifti1Image(mask, image.affine, header)
