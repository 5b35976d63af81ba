"""Random damage to JSON files: commands read a damaged file as if it were intact, or refuse it in one line."""

import copy
import json
import shutil

import numpy as np
import pytest

from jaxla import info
from jaxla.config import InputError
from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases
from jaxla.data.split import read_split
from jaxla.nnunet.plan import read_fingerprint, read_plan, write_plan
from jaxla.nnunet.postprocessing import read_groups, read_trials, write_choice
from jaxla.runs.folder import summarise_fold
from jaxla.runs.record import read_record
from jaxla.studies.results import read_study
from tests.data.nifti import write_flat_pairs
from tests.studies.runs import BoxRun, write_study
from tests.tiny import TINY_PLAN

SEEDS = range(12)  # each file is damaged once per seed; its index in READERS is part of the seed
VALUES = [None, True, 1.5, -3, "x", "", [], [[1]], {}, {"a": 1}, 10**30, 1e300, float("inf"), float("nan")]


def read_plan_to_train(path):
    plan = read_plan(path)
    for name in plan.configurations:
        plan.configuration(name, str(path))


def read_cached_volume(path):
    root = path.parents[3] / "scans"
    prepare_cases(find_cases(root, ""), path.parents[2])


RUN = "study/runs/paper1_unet_seed0"
READERS = {  # file -> functions that read it
    f"{RUN}/experiment.json": [lambda path: read_record(path.parent), lambda path: info.describe_run(path.parent)],
    f"{RUN}/metrics.jsonl": [lambda path: info.describe_run(path.parent), lambda path: summarise_fold(path.parent)],
    f"{RUN}/split.json": [lambda path: read_split(path, "data.split"), lambda path: info.describe_run(path.parent)],
    f"{RUN}/test/summary.json": [
        lambda path: info.describe_run(path.parents[1]),
        lambda path: summarise_fold(path.parents[1]),
        lambda path: read_study(path.parents[3]),
    ],
    f"{RUN}/cost.json": [lambda path: read_study(path.parents[2])],
    f"{RUN}/cases.json": [lambda path: read_study(path.parents[2])],
    "study/study.json": [lambda path: read_study(path.parent)],
    "plan.json": [read_plan_to_train, read_fingerprint],
    "largest.json": [read_groups, read_trials],
    "cache/volumes/*/volume.json": [read_cached_volume],
}


@pytest.fixture(scope="module")
def intact_folder(tmp_path_factory):
    """A folder with an intact example of every file."""
    folder = tmp_path_factory.mktemp("intact")
    references = {f"c{n}": (4, 14) for n in range(3)}
    write_study(folder / "study", [BoxRun("paper1", "unet", 0, references)], references, folder / "study scans")
    summary = folder / RUN / "test" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"best_epoch": 2}))
    write_plan(folder / "plan.json", TINY_PLAN)
    write_choice(
        {"c0": {rule: [0.5] for rule in ("none", "all", "each", "all, each")}}, ["LA"], folder / "largest.json"
    )
    prepare_cases(find_cases(write_flat_pairs(folder / "scans", 1), ""), folder / "cache")
    return folder


def find_nodes(content, path=()):
    """Yield the path of every value in parsed JSON."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from find_nodes(value, (*path, key))


def damage_content(content, rng):
    """Return parsed JSON in which one value is gone or has been replaced by one of a different kind."""
    content = copy.deepcopy(content)
    nodes = list(find_nodes(content))
    *parents, key = nodes[rng.integers(len(nodes))]
    parent = content
    for name in parents:
        parent = parent[name]
    choice = rng.integers(len(VALUES) + 4)
    if choice < len(VALUES):
        parent[key] = VALUES[choice]
    else:
        del parent[key]
    return content


def damage_text(text, rng):
    """Return a JSON or JSON Lines text with one damage, encoded."""
    encoded = text.encode()
    match rng.integers(8):
        case 0:
            return encoded[: rng.integers(len(encoded))]
        case 1:
            return b"\xef\xbb\xbf" + encoded
        case 2:
            return text.encode("utf-16")
        case 3:
            return b"[" * 100_000
        case _:
            lines = [json.loads(line) for line in text.splitlines()] if "\n{" in text else [json.loads(text)]
            damaged = damage_content(lines, rng)
            return "\n".join(json.dumps(line) for line in damaged).encode()


@pytest.mark.parametrize("name", READERS)
def test_damaged_json_is_read_as_intact_or_refused_in_one_line(intact_folder, tmp_path, name):
    shutil.copytree(intact_folder, tmp_path, dirs_exist_ok=True)
    (path,) = tmp_path.glob(name)
    text, errors = path.read_text(), []
    for reader in READERS[name]:
        reader(path)
    for seed in SEEDS:
        path.write_bytes(damage_text(text, np.random.default_rng([seed, list(READERS).index(name)])))
        for reader in READERS[name]:
            try:
                reader(path)
            except InputError as error:
                errors.append(error)
    path.write_text(text[: len(text) // 2])
    for reader in READERS[name]:
        with pytest.raises(InputError):
            reader(path)
    assert errors
    for error in errors:
        assert "\n" not in str(error)
        assert str(tmp_path) in error.where
