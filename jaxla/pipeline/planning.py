"""The plan of a run: made from its own training and validation cases, or given, and kept in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from jaxla.cli.files import report_os_errors
from jaxla.config import Experiment, InputError, option
from jaxla.data.dataset import PreparedData
from jaxla.distributed import barrier, is_first
from jaxla.models.build import configuration_of, family_of, is_planned
from jaxla.nnunet.plan import Plan, read_plan, write_plan
from jaxla.nnunet.planner import check_plan, plan_from_data, warn_unless_mri
from jaxla.pipeline.checks import require_share
from jaxla.runs.folder import PLAN


def plan_run(experiment: Experiment, data: PreparedData) -> Plan | None:
    """Return the plan of a run; None if its network does not need one.

    The test cases are not used, so the plan differs from that of the whole folder.

    Raises:
        InputError: the given plan does not fit the data or lacks the configuration, or there are more devices than
            patches in a batch.
    """
    model = experiment.model
    if not is_planned(model):
        return None
    warn_unless_mri(data.dataset.root)
    volumes = data.of(sorted(data.split.train + data.split.val))
    if model.plan:
        plan = read_plan(Path(model.plan))
        check_plan(plan, family_of(model).configuration(model), volumes, option("model.plan", model.plan))
    else:
        plan = plan_from_data(volumes, 1 + len(data.dataset.labels.names), model.memory_gb)
    batch_size = configuration_of(model, plan, experiment.training.batch_size).batch_size
    require_share(replace(experiment, training=replace(experiment.training, batch_size=batch_size)))
    return plan


def keep_plan(run_dir: Path, plan: Plan) -> None:
    """Write the plan into the run's folder, unless it is there.

    Raises:
        InputError: the run began with another plan.
    """
    path = run_dir / PLAN
    if is_first() and not path.exists():
        with report_os_errors("written", path, "Fix this and rerun with --resume."):
            write_plan(path, plan)
    barrier()
    if read_plan(path)._replace(fingerprint=None) != plan._replace(fingerprint=None):
        raise InputError(path, "differs from the plan of this command", "Restore it, or start a new run.")
