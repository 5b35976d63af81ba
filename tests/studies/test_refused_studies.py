"""Folders of studies that the report refuses, and leaves as they were."""

import csv
import json
import re
import shutil

import numpy as np
import pytest

from jaxla.config import InputError
from jaxla.report import main
from jaxla.studies.page import report_study
from jaxla.studies.results import REPORTED_METRICS, read_study
from tests.studies.runs import edit_json, read_csv, run_dir


def test_schedule_without_a_run_for_each_protocol_method_and_seed_is_refused(study):
    edit_json(study / "study.json", lambda content: content["runs"].pop())
    with pytest.raises(InputError, match=r"study.json: damaged: expected a run for each protocol, method and seed"):
        read_study(study)


def test_unwritable_report_is_an_input_error(study, tmp_path):
    shutil.rmtree(study / "figures")
    (study / "figures").write_text("a file")
    with pytest.raises(InputError, match=rf"^{re.escape(str(study / 'figures'))}: cannot be written"):
        report_study(study, tmp_path / "cache")


def remove_case(run):
    edit_json(run / "split.json", lambda content: content["test"].remove("c3"))
    summary = json.loads((run / "test" / "summary.json").read_text())
    summary["slice"]["dice"]["n"] = 18
    for name, statistics in (("cases.csv", summary), ("slices.csv", summary["slice"])):
        lines = (run / "test" / name).read_text().splitlines(keepends=True)
        (run / "test" / name).write_text("".join(line for line in lines if not line.startswith("c3,")))
        rows = read_csv(run / "test" / name)
        for metric in REPORTED_METRICS:
            statistics["classes"]["LA"][metric]["mean"] = np.mean([float(row[metric]) for row in rows])
    (run / "test" / "summary.json").write_text(json.dumps(summary))


def change_value(run, table, case, column, value):
    """Change a cell in the first row of a case."""
    rows = read_csv(run / "test" / table)
    next(row for row in rows if row["case"] == case)[column] = value
    with (run / "test" / table).open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)


FAULTS = {
    "missing": (
        shutil.rmtree,
        "{run}: this run of the study has not started. Resume the study with `python -m jaxla.study --name=tiny`.",
    ),
    "incomplete": (
        lambda run: (run / "report.html").unlink(),
        "{run}: this run of the study is incomplete. Resume the study with `python -m jaxla.study --name=tiny`.",
    ),
    "not a run": (lambda run: (run / "experiment.json").unlink(), "{run}: not a run folder (no experiment.json)"),
    "damaged": (lambda run: (run / "experiment.json").write_text("{"), "experiment.json: damaged"),
    "another format": (
        lambda run: edit_json(run / "experiment.json", lambda c: c.update(version=99)),
        "{run}: written by a newer version of jaxla",
    ),
    "another version": (
        lambda run: edit_json(run / "experiment.json", lambda c: c["environment"]["versions"].update(jaxla="0.0.1")),
        "{run}: cannot be compared with {any}: different versions of jaxla (0.0.1 and ",
    ),
    "different scans": (
        lambda run: edit_json(run / "cases.json", lambda c: c.update(c0="another")),
        "{run}: cannot be compared with {any}: different scans or masks. Move one of the two folders",
    ),
    "different validation patients": (
        lambda run: edit_json(run / "split.json", lambda c: c.update(val=["t0"])),
        "{run}: cannot be compared with {any}: different validation patients. Move one of the two folders",
    ),
    "different test cases": (
        remove_case,
        "{any} and {run}: not tested on the same cases (c3 is a test case of {any}, but not of {run})",
    ),
    "another seed": (
        lambda run: edit_json(run / "experiment.json", lambda c: c["experiment"].update(seed=7)),
        "{run}: holds a run with --seed=7, but the study schedules 1 here. Move the folder away",
    ),
    "another protocol": (
        lambda run: edit_json(run / "experiment.json", lambda c: c["experiment"].update(name="data_25percent")),
        "{run}: holds a run with --exp=data_25percent, but the study schedules paper1 here",
    ),
    "another method": (
        lambda run: shutil.copy(run_dir(run.parents[1], seed=1) / "experiment.json", run / "experiment.json"),
        "{run}: holds a run with --method=unet, but the study schedules segnet here",
    ),
    "different options": (
        lambda run: edit_json(run / "experiment.json", lambda c: c["experiment"]["training"].update(epochs=3)),
        "{run}: cannot be compared with {first}: different --training.epochs (3 and 75). Move",
    ),
    "more patients than its protocol": (
        lambda run: edit_json(run / "experiment.json", lambda c: c["experiment"]["data"].update(train_patients=3)),
        "{run}: cannot be compared with {same}: different --data.train_patients (3 and 0). Move",
    ),
    "different training patients": (
        lambda run: edit_json(run / "split.json", lambda c: c.update(train=c["train"][::-1])),
        "{run}: cannot be compared with {same}: different training patients. Move",
    ),
    "different weights": (
        lambda run: edit_json(run / "experiment.json", lambda c: c.update(weights="vgg.safetensors")),
        "{run}: cannot be compared with {first}: different weights (000",
    ),
    "a case twice": (
        lambda run: (run / "test" / "cases.csv").write_text(
            re.sub(r"\nc3,", "\nc2,", (run / "test" / "cases.csv").read_text())
        ),
        "{run}: damaged: cases.csv: expected 4 rows, one per volume and class of the test cases. Move",
    ),
    "fewer slices": (
        lambda run: (run / "test" / "slices.csv").write_text(
            re.sub(r"\nc3,5,.*", "", (run / "test" / "slices.csv").read_text())
        ),
        "{run}: damaged: slices.csv: expected 24 rows, one per slice and class of the test cases. Move",
    ),
    "no hash": (
        lambda run: edit_json(run / "cases.json", lambda c: c.pop("c2")),
        "{run}: damaged: cases.json lacks c2. Move",
    ),
    "no epoch": (
        lambda run: (run / "metrics.jsonl").write_text(""),
        "{run}: damaged: metrics.jsonl: expected at least one epoch",
    ),
    "no versions": (
        lambda run: edit_json(run / "experiment.json", lambda c: c["environment"].pop("versions")),
        "experiment.json: damaged: Object missing required field `versions` - at `$.environment`. Restore",
    ),
    "damaged hashes": (
        lambda run: (run / "cases.json").write_text("[3]"),
        "{run}/cases.json: damaged: Expected `object`, got `array`. Move",
    ),
    "no time": (
        lambda run: (run / "metrics.jsonl").write_text('{"epoch": 1}\n'),
        "{run}/metrics.jsonl, line 1: damaged: Object missing required field",
    ),
    "an incomplete cost": (
        lambda run: edit_json(run / "cost.json", lambda c: c.pop("step_bytes")),
        "{run}/cost.json: damaged: Object missing required field `step_bytes`. Move",
    ),
    "a negative cost": (
        lambda run: edit_json(run / "cost.json", lambda c: c.update(parameters=-3)),
        "{run}/cost.json: damaged: Expected `int` >= 1 - at `$.parameters`. Move",
    ),
    "a long field": (
        lambda run: (run / "test" / "cases.csv").write_text(f"case,class,dice\nc0,LA,{'1' * 200_000}\n"),
        "{run}: damaged: cases.csv: field larger than field limit (131072). Move",
    ),
    "not finite": (
        lambda run: (run / "test" / "slices.csv").write_text(
            re.sub(r"(c0,0,LA,)[^,]*", r"\1nan", (run / "test" / "slices.csv").read_text())
        ),
        "{run}: damaged: slices.csv: dice of c0 is not finite. Move",
    ),
    "a Dice above 1": (
        lambda run: change_value(run, "cases.csv", "c1", "dice", "7"),
        "{run}: damaged: cases.csv: case c1: 7 is not a possible dice",
    ),
    "a negative distance": (
        lambda run: change_value(run, "slices.csv", "c1", "assd_mm", "-2"),
        "{run}: damaged: slices.csv: case c1: -2 is not a possible assd_mm",
    ),
    "a value that the summary does not have": (
        lambda run: change_value(run, "cases.csv", "c1", "dice", "0.0"),
        "{run}: damaged: test/cases.csv: the mean dice of LA is 0.4, but 0.6 in test/summary.json",
    ),
    "a very long cell": (
        lambda run: change_value(run, "cases.csv", "c1", "case", "c" * 131_073),
        "{run}: damaged: cases.csv: field larger than field limit (131072)",
    ),
    "no cost": (
        lambda run: (run / "cost.json").unlink(),
        "cost.json: cannot be read (No such file or directory), and the report needs it. Move",
    ),
    "no table": (
        lambda run: (run / "test" / "cases.csv").unlink(),
        "cases.csv: cannot be read (No such file or directory), and the report needs it. Move",
    ),
    "an incomplete table": (
        lambda run: (run / "test" / "cases.csv").write_text("case,class,dice\nc0,LA,x\n"),
        "{run}: damaged",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faulty_runs_are_refused_and_the_old_report_is_kept(fault, study, tmp_path):
    before = {path: path.read_bytes() for path in (study / "report.html", *(study / "tables").iterdir())}
    run, method = run_dir(study, method="segnet", seed=1), "segnet"
    runs = {"any": run_dir(study, "fewshot_1patient"), "first": run_dir(study, "fewshot_1patient", method)}
    # training patients are compared with the run of the same seed, options with the first run of the protocol
    same = run_dir(study) if "patients than" in fault else run_dir(study, seed=1)
    damage, message = FAULTS[fault]
    damage(run)
    with pytest.raises(InputError, match=re.escape(message.format(run=run, same=same, **runs))):
        report_study(study, tmp_path / "cache")
    assert all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "not a study folder (no study.json)"),
        ("{", "study.json: damaged"),
        ('{"runs": 3}', "study.json: damaged"),
        ('{"name": "a", "summary": "", "command": "", "runs": []}', "study.json: damaged"),
    ],
)
def test_folder_that_is_not_a_study_is_refused(tmp_path, content, message):
    if content is not None:
        (tmp_path / "study.json").write_text(content)
    with pytest.raises(InputError, match=re.escape(message)):
        main([f"--study={tmp_path}"])
