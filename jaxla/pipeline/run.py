"""One run once its data are prepared: the network, its backbone's features, training, then the test."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

from flax import nnx

from jaxla.cli.terminal import track
from jaxla.config import Augmentation, Experiment, InputError
from jaxla.data.dataset import PreparedData, say_what_is_cut
from jaxla.distributed import barrier, is_first, on_host, use_local_devices
from jaxla.memory import catch_out_of_memory
from jaxla.models.build import about_depth, build_network, configuration_of
from jaxla.models.weights import parameters_sha256, save_random
from jaxla.nnunet.plan import Plan, describe_configuration
from jaxla.pipeline.planning import keep_plan
from jaxla.pipeline.sources import image_sources, patch_sources
from jaxla.pipeline.testing import Features, run_test
from jaxla.reporting.curves import draw_curves
from jaxla.runs.folder import BACKBONE, CURVES
from jaxla.runs.record import FEATURES_KEPT, method_label, read_record, write_record
from jaxla.training.features import FeatureCache
from jaxla.training.loop import fit
from jaxla.training.step import count_parameters, split_network

log = logging.getLogger(__name__)


def train_and_test(experiment: Experiment, data: PreparedData, run_dir: Path, cache_dir: Path) -> dict[str, Any]:
    """All of a run once its folder is there; begins where the folder says it ended. Returns the summary of the test."""
    if data.plan:
        keep_plan(run_dir, data.plan)
        configuration = configuration_of(experiment.model, data.plan, experiment.training.batch_size)
        log.info("%s: %s", experiment.model.arch, describe_configuration(configuration))
    else:
        say_what_is_cut(data, data.canvas(experiment.preprocessing))
        if of_depth := about_depth(experiment.model, [volume.shape[0] for volume in data.used]):
            log.info("%s: %s", experiment.method, of_depth)
    with on_host():
        network = build(experiment, data.dataset.labels.outputs, run_dir, data.plan)
    features, origin = cached_features(experiment, network, data, cache_dir)
    if is_first():
        write_record(run_dir, replace(read_record(run_dir), features=origin))
    step_bytes = train(experiment, network, data, features, run_dir, cache_dir)
    del network  # the trained one is loaded with its own backbone
    with use_local_devices():
        return run_test(data, features, run_dir, step_bytes)


def build(experiment: Experiment, outputs: int, run_dir: Path, plan: Plan | None = None) -> nnx.Module:
    """The untrained network of a run; a random backbone that stays frozen is kept in the run's folder.

    Raises:
        InputError: the backbone that was kept is damaged, and its seed gives another one now.
    """
    model, seed = experiment.model, experiment.seed
    if model.backbone == "finetuned" or model.weights != "random":
        return build_network(model, outputs, seed, plan=plan)
    kept, record = run_dir / BACKBONE, read_record(run_dir)
    barrier()  # the first one writes it anew
    if record.weights_sha256:  # a resumed run
        try:
            network = build_network(replace(model, weights=str(kept)), outputs, seed)
            if parameters_sha256(network.backbone) == record.weights_sha256:
                return network
        except InputError:  # missing or truncated
            pass
        if is_first():
            log.warning("%s: missing or damaged; drawn again from seed %d", kept, seed)
    network = build_network(model, outputs, seed)
    sha256 = parameters_sha256(network.backbone)
    if record.weights_sha256 not in ("", sha256):
        raise InputError(
            f"{kept}: missing or damaged, and seed {seed} gives another backbone with the present versions; put it back"
        )
    if is_first():
        save_random(kept, network.backbone, model.arch, seed)
        write_record(run_dir, replace(record, weights_sha256=sha256))
    return network


def cached_features(
    experiment: Experiment, network: nnx.Module, data: PreparedData, cache_dir: Path
) -> tuple[Features | None, str]:
    """The features of every slice that the run uses, where they are computed once and the disk holds them.

    Returns:
        The features by case id, or None where the whole network runs in every epoch; and a sentence that says which.
    """
    if reason := why_not_cached(experiment, network):
        if experiment.model.backbone == "frozen" and experiment.training.cache_features:
            log.info(reason)
        return None, reason
    with use_local_devices():
        cache = FeatureCache(cache_dir, network, experiment.model.arch, data.canvas(experiment.preprocessing))
        features = cache.features(data.used, track)
    if features is None:
        return None, "The frozen backbone ran in every epoch: its features did not fit on the disk of the cache folder."
    by_id = {volume.id: of_volume for volume, of_volume in zip(data.used, features, strict=True)}
    return by_id, f"{FEATURES_KEPT}, in {cache.dtype.name}, and cached."


def why_not_cached(experiment: Experiment, network: nnx.Module) -> str:
    """A sentence that says why the whole network runs at every step; empty where a frozen backbone need not."""
    if experiment.model.backbone != "frozen":
        return f"All of {method_label(experiment)} is trained, so all of it runs at every step."
    if not experiment.training.cache_features:
        return "The frozen backbone runs in every epoch, for --training.cache_features is false."
    if not hasattr(network, "on_features"):
        return f"The frozen {experiment.model.arch} runs in every epoch: its features of all scales are not cached."
    if experiment.augmentation != Augmentation():
        return "The frozen backbone runs in every epoch and its features are not cached, for slices are augmented."
    return ""


def train(
    experiment: Experiment,
    network: nnx.Module,
    data: PreparedData,
    features: Features | None,
    run_dir: Path,
    cache_dir: Path,
) -> int:
    """Train, from the run's latest checkpoint on; leaves checkpoints, metrics.jsonl and progress.png in its folder.

    Returns:
        Device memory of a training step, in bytes.
    """
    if data.plan:
        sources = patch_sources(experiment, data, data.plan, cache_dir)
    else:
        sources = image_sources(experiment, data, features, with_images=bool(features) and network.READS_IMAGES)
    if (rows := sources.recipe.batch_size) > (there := len(sources.train)):
        log.warning(
            "option --training.batch_size=%d: a step takes %d %s and only %d train, so each comes several times in one "
            "step; lower it", rows, rows, sources.train.rows[1], there,
        )  # fmt: skip
    size = experiment.preprocessing.image_size
    trained = network.on_features((size, size)) if features else network
    parts = split_network(trained, train_backbone=experiment.model.backbone == "finetuned")
    of_all, of_trained = (count_parameters(state) for state in (nnx.state(network, nnx.Param), parts.trainable))
    log.info("%s: %d parameters are trained, %d are frozen", method_label(experiment), of_trained, of_all - of_trained)
    with catch_out_of_memory(sources.recipe.batch_size):
        best = fit(
            parts,
            sources.train,
            sources.val,
            sources.recipe,
            augment=sources.augment,
            loss_of=sources.loss_of,
            gradient_of=sources.gradient_of,
            seed=experiment.seed,
            pretrained_backbone=experiment.model.weights != "random",
            folder=run_dir,
            on_epoch=lambda history: draw_curves(
                history,
                f"{experiment.name}, {method_label(experiment)}",
                run_dir / CURVES,
                sources.val.counted,
                experiment.training.checkpoint,
            ),
        )
    log.info(
        "%s epoch %d: validation Dice %.3f %s", experiment.training.checkpoint, best.best_epoch, best.best_dice,
        sources.val.counted,
    )  # fmt: skip
    return best.step_bytes
