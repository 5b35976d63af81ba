"""Log how much of its scans a run's network sees."""

from __future__ import annotations

import logging

from jaxla.cli.terminal import plural
from jaxla.data.dataset import PreparedData
from jaxla.data.inputs import structure_extent
from jaxla.distributed import is_first
from jaxla.tasks import Task

log = logging.getLogger("jaxla.train")


def log_network_input(data: PreparedData, task: Task) -> None:
    """Log what the network sees of the scans, and warn about scans or structures that it only sees in part."""
    method = task.experiment.method
    if method.preprocessing and method.preprocessing.pad_to == "foreground":
        log.info("the network sees the central %.0f mm of slices; the rest becomes background", task.extent)
        outside = [v.id for v in data.used_volumes if structure_extent(v.mask, v.spacing[1:]) > task.extent]
        problem = "with structures outside that centre (--preprocessing.pad_to=largest would show all of them)"
    else:
        outside = [v.id for v in data.used_volumes if task.is_cut(v.shape, v.spacing)]
        problem = (
            f"with slices larger than the largest training slice ({task.extent:.0f} mm): the network sees their "
            "centre, and the rest becomes background"
        )
    if outside and is_first():
        log.warning("%s %s: %s", plural(len(outside), "validation or test case"), problem, ", ".join(outside))
    if method.postprocessing.flips and not method.augmentation.flips and is_first():
        log.warning(
            "--postprocessing.flips=true: inference also reads flipped slices, but training does not. Add "
            "--augmentation.flips=true."
        )
    if description := task.describe([volume.shape[0] for volume in data.used_volumes]):
        log.info("%s: %s", method.name, description)
