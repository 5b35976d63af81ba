"""The plan of a run: made from its own training and validation cases, or given, and kept in its folder."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

from jaxla.cli.files import report_os_errors
from jaxla.cli.terminal import track
from jaxla.config import Experiment, InputError
from jaxla.data.cases import channel_name
from jaxla.data.dataset import PreparedData
from jaxla.distributed import barrier, is_first
from jaxla.models.build import configuration_of, is_planned
from jaxla.nnunet.fingerprint import fingerprint
from jaxla.nnunet.plan import Z_SCORE, Plan, read_plan, write_plan
from jaxla.nnunet.planner import make_plan
from jaxla.nnunet.preprocessing import require_fitting
from jaxla.pipeline.checks import require_share
from jaxla.runs.folder import PLAN

log = logging.getLogger(__name__)

OTHER_CHANNELS = ("ct", "nonorm", "rescale_0_1", "rescale_to_0_1", "rgb_to_0_1")  # nnU-Net normalises these otherwise


def plan_run(experiment: Experiment, data: PreparedData) -> Plan | None:
    """What the network of a run is planned by; None where it is not planned from the data.

    The test cases are not looked at, so a plan differs from that of the whole folder.

    Raises:
        InputError: the plan that is given does not fit the data, it lacks the configuration, or there are more devices
            than patches in a batch.
    """
    model = experiment.model
    if not is_planned(model):
        return None
    warn_of_channel(data.dataset.root)
    planned_from = data.volumes_of(sorted(data.split.train + data.split.val))
    if not model.plan:
        found = fingerprint(planned_from, lambda volumes: track(volumes, "planning"))
        plan = make_plan(found, 1 + len(data.dataset.labels.names), model.memory_gb)
        _require_share(experiment, plan)  # what cannot be built is refused here, before the run has a folder
        return plan
    where = f"--model.plan={model.plan}"
    plan = read_plan(Path(model.plan))
    if plan.normalisation != Z_SCORE:
        raise InputError(f"{where}: normalises by {plan.normalisation}; this package has {Z_SCORE}, nnU-Net's for MRI")
    require_fitting(plan, configuration_of(model, plan), planned_from, where)
    _require_share(experiment, plan)
    return plan


def warn_of_channel(root: Path) -> None:
    """Say it where nnU-Net would not take the scans for MRI, for their name in `dataset.json`."""
    name = channel_name(root)
    if name.casefold() in OTHER_CHANNELS:
        log.warning(
            "%s: its channel is %s, which nnU-Net does not normalise by mean and standard deviation; this package does",
            root / "dataset.json", name,
        )  # fmt: skip


def _require_share(experiment: Experiment, plan: Plan) -> None:
    batch_size = configuration_of(experiment.model, plan, experiment.training.batch_size).batch_size
    require_share(replace(experiment, training=replace(experiment.training, batch_size=batch_size)))


def keep_plan(run_dir: Path, plan: Plan) -> None:
    """Write the plan into the run's folder, where it is not yet.

    Raises:
        InputError: the run was begun with another one.
    """
    path = run_dir / PLAN
    if is_first() and not path.exists():
        with report_os_errors("written", path, "mend that and go on with --resume"):
            write_plan(path, plan)
    barrier()
    kept = read_plan(path)
    if kept._replace(fingerprint=None) != plan._replace(fingerprint=None):
        raise InputError(
            f"--resume: {path} is not the plan that is asked for now; put the one back that the run was begun with, or "
            "start a new run"
        )
