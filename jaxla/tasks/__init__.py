"""Tasks: everything that depends on the kind of training sample. No other module distinguishes slices from volumes.

To add a kind of sample, write a class in a file here, add an entry to `TASKS`, and set `sample` to its key in the
options of the networks that read it.
"""

from __future__ import annotations

from pathlib import Path

from jaxla.config import Experiment
from jaxla.data.dataset import PreparedData
from jaxla.tasks.base import Features, Task, TooFewSteps
from jaxla.tasks.patches import PatchTask, is_same_plan
from jaxla.tasks.slices import SliceTask
from jaxla.tasks.volumes import VolumeTask

__all__ = ["TASKS", "Features", "Task", "TooFewSteps", "is_same_plan", "make_checked_task", "make_task", "restore_task"]

TASKS: dict[str, type[Task]] = {"slices": SliceTask, "volumes": VolumeTask, "patches": PatchTask}


def make_task(experiment: Experiment, data: PreparedData) -> Task:
    """Return the task of a new run; raise an InputError if the method does not fit the data."""
    return TASKS[experiment.method.model.sample].from_data(experiment, data)


def make_checked_task(experiment: Experiment, data: PreparedData) -> Task:
    """Return the task of a new run, after all checks of data and devices that need no network.

    Raises:
        InputError: the method does not fit the data or the devices, or a scan has too few slices.
    """
    task = make_task(experiment, data)
    task.check_batch_size()
    for volume in data.used_volumes:
        task.check_scan(volume.case.image, volume.shape[0])
    return task


def restore_task(experiment: Experiment, outputs: int, extent: float, folder: Path) -> Task:
    """Return the task of a run that was trained in `folder`, with K = `outputs`, and the recorded `extent`."""
    return TASKS[experiment.method.model.sample].from_run(experiment, outputs, extent, folder)
