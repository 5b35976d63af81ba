"""python -m jaxla.study as a user runs it: a run that fails, one that is stopped, and what is complete stays."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from jaxla.config import InputError
from jaxla.data.cases import find_cases
from jaxla.data.prepared import content_key
from jaxla.data.split import make_split, write_split
from jaxla.nnunet.plan import write_plan
from jaxla.runs.folder import run_folder
from jaxla.runs.machine import environment
from jaxla.runs.record import Record
from jaxla.studies.schedule import plan_runs, require_same_data, state_of
from jaxla.study import main
from tests.commands import run_module
from tests.tiny import TINY_PLAN


def options_of(phantoms, folder, *more):
    return [
        "--name=fewshot_patients", "--methods=unet,attention_unet", "--experiments=fewshot_1patient", "--seeds=3",
        f"--output={folder / 'study'}", f"--cache-dir={folder / 'cache'}", f"--data.root={phantoms}",
        "--preprocessing.image_size=32", "--training.epochs=2", "--training.batch_size=8", "--model.widths=[8,16]",
        *more,
    ]  # fmt: skip


def test_a_study_goes_on_after_a_failure_and_after_a_stop(phantoms, tmp_path, capsys):
    runs = tmp_path / "study" / "runs"
    unet, gated = (runs / f"fewshot_1patient_{method}_seed3" for method in ("unet", "attention_unet"))

    # a rate at which the first epoch ends in NaN
    failed = run_module(
        "jaxla.study", *options_of(phantoms, tmp_path, "--unet.training.learning_rate=1e30"), check=False
    )
    assert failed.returncode == 1
    assert "2 runs: 2 methods, 1 protocol, 1 seed (3); 0 complete, 0 to go on with, 2 new" in failed.stdout
    assert re.search(r"^time  at most about .* from 3 measured steps of each method", failed.stdout, re.MULTILINE)
    assert re.search(r"^disk  run folders \S+ at most \(\S+ free\)$", failed.stdout, re.MULTILINE)
    assert failed.stderr.startswith(f"stopped with 1 of 2 runs failed: {unet} (training loss nan")
    assert "lower --training.learning_rate" in failed.stderr
    assert (gated / "report.html").exists()
    assert not (tmp_path / "study" / "report.html").exists()
    split = json.loads((gated / "split.json").read_text())
    assert len(split["train"]) == 1
    assert json.loads((gated / "experiment.json").read_text())["experiment"]["data"]["subset_seed"] == 3

    other = re.escape(f"{unet}: was run with --training.learning_rate=1e+30, not 0.0001; move that folder away")
    with pytest.raises(InputError, match=other):
        main(options_of(phantoms, tmp_path))

    shutil.rmtree(unet)
    complete = {path: path.stat().st_mtime_ns for path in gated.rglob("*")}
    command = [sys.executable, "-m", "jaxla.study", *options_of(phantoms, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "epoch 1/2" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert re.match(rf"stopped in {unet.name}; go on with: python -m jaxla.study --name=fewshot_patients", stderr)
    assert (unet / "experiment.json").exists()

    done = run_module("jaxla.study", *options_of(phantoms, tmp_path))
    assert re.search(r"; 1 complete, 1 to go on with, 0 new|; 2 complete", done.stdout)
    assert done.stdout.splitlines()[-1] == f"2 runs are complete: {tmp_path / 'study' / 'report.html'}"
    assert json.loads((unet / "experiment.json").read_text())["resumed"]
    assert {path: path.stat().st_mtime_ns for path in gated.rglob("*")} == complete
    assert json.loads((unet / "split.json").read_text()) == split  # the same patient for both methods
    assert "fewshot_1patient_unet_seed3" in (tmp_path / "study" / "report.html").read_text()

    (tmp_path / "study" / "report.html").unlink()
    main(options_of(phantoms, tmp_path, "--dry-run"))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "2 runs: 2 methods, 1 protocol, 1 seed (3); 2 complete, 0 to go on with, 0 new"
    )
    assert not (tmp_path / "study" / "report.html").exists()
    main(options_of(phantoms, tmp_path))
    assert capsys.readouterr().out.splitlines()[-1] == done.stdout.splitlines()[-1]
    assert (tmp_path / "study" / "report.html").exists()
    assert {path: path.stat().st_mtime_ns for path in gated.rglob("*")} == complete


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seeds=1,2,1", "option --seeds: 1 is given twice"),
        ("--seeds=one", "option --seeds=one: expected numbers, such as 0,1,2"),
        ("--seeds=-1", "option --seeds=-1: seeds must be 0 or more"),
        ("--methods=unet,unet", "option --methods: unet is given twice"),
        ("--methods=unet,segmet", "--methods: 'segmet' is unknown; did you mean segnet?"),
        ("--experiments=fewshot_3patients", "--experiments: 'fewshot_3patients' is unknown; did you mean fewshot_"),
        ("--name=papers1", "study 'papers1' is unknown; did you mean paper1?"),
        ("--seed=3", "option --seed is not for a study, which says it to each run; give --seeds"),
        ("--run-dir=x", "option --run-dir is not for a study, which says it to each run; leave it out"),
        ("--fold=0", "option --fold is not for a study, which says it to each run; leave it out"),
        ("--data.train_patients=5", "option --data.train_patients is not for a study, which says it to each run; give"),
        ("--experiments=quickstart,paper1", "--experiments: paper1 has other data than quickstart"),
        ("--data.subset_seed=3", "option --data.subset_seed is not for a study, which says it to each run"),
        (
            "--segnet.training.epochs=3",
            "option --segnet.training.epochs: segnet is not among the methods of this study",
        ),
        ("--unet.data.labels=LA:1", "option --unet.data.labels: methods may differ in model, preprocessing"),
        (
            '--data={"train_patients":5}',
            "option --data: fewshot_1patient says by itself how many patients train; choose protocols by --experiments",
        ),
        (
            "--unet.preprocessing.image_size=0",
            "option --preprocessing.image_size must be at least 1, got 0 (method unet; --unet.<option> gives an option",
        ),
        ("--unet.training.epoch=3", "option --training.epoch is unknown; did you mean --training.epochs?"),
        ("--training.epochs=0", "option --training.epochs must be at least 1"),
        ("--data.rot=x", "option --data.rot is unknown; did you mean --data.root?"),
        ("stray", "'stray' is no option"),
    ],
)
def test_mistakes_in_options_are_found_before_anything_is_run(phantoms, tmp_path, option, message):
    with pytest.raises(InputError, match=re.escape(message)):
        main(options_of(phantoms, tmp_path, option))
    assert list(tmp_path.iterdir()) == []


def test_methods_that_options_make_the_same_are_refused(phantoms, tmp_path):
    options = [option for option in options_of(phantoms, tmp_path) if "widths" not in option]
    options += ["--methods=fusion_vitb14_last4,fusion_vitb14_no_image,fusion_vitb14", "--model.arch=vit_mini8"]
    line = re.escape(
        "--methods: fusion_vitb14_no_image and fusion_vitb14 are the same with these options; leave one out, or give "
        "an option to one alone, as --fusion_vitb14_no_image.<option>"
    )
    with pytest.raises(InputError, match=f"^{line}$"):
        main([*options, "--model.weights=random", "--model.image_stages=all"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("lacking", ["--name", "--output"])
def test_a_required_option_is_named(lacking):
    given = [option for option in ("--name=paper1", "--output=study") if not option.startswith(lacking)]
    with pytest.raises(InputError, match=f"option {lacking} is required"):
        main(given)


def test_fewer_patients_than_a_protocol_needs(phantoms, tmp_path):
    with pytest.raises(InputError, match=r"--data.train_patients=5: there are 4 training patients"):
        main(options_of(phantoms, tmp_path, "--experiments=fewshot_1patient,fewshot_5patients"))
    assert not (tmp_path / "study").exists()


def test_what_lies_where_a_run_should_is_named_and_kept(phantoms, tmp_path):
    folder = tmp_path / "study" / "runs" / "fewshot_1patient_unet_seed3"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"{folder}: not a run folder")):
        main(options_of(phantoms, tmp_path))
    assert (folder / "notes.txt").read_text() == "mine"


def test_complete_runs_of_another_split_or_of_other_data_are_not_reported(phantoms, tmp_path):
    """No run is made: a planned one is complete as soon as its folder says so."""
    data, study = shutil.copytree(phantoms, tmp_path / "data"), tmp_path / "study"
    folder = study / "runs" / "fewshot_1patient_unet_seed3"
    (run,) = plan_runs({"unet": [f"--data.root={data}"]}, ["fewshot_1patient"], [3], study, tmp_path)
    dataset = find_cases(data)
    cases = {case.id: content_key(case, dataset.labels) for case in dataset.cases}
    split = make_split(list(cases), run.experiment.data)
    hashes = {"weights_sha256": "", "split_sha256": split.sha256, "data_sha256": ""}
    record = Record(run.experiment, dataset.labels, "random", **hashes, command="", begun="", environment=environment())
    with run_folder(folder, record, split, cases, resume=False):
        (folder / "report.html").write_text("a finished run has one")

    require_same_data([run], ["complete"], tmp_path)
    assert state_of(run) == "complete"
    planned = replace(run.experiment, model=replace(run.experiment.model, plan=str(tmp_path / "plan.json")))
    with pytest.raises(InputError, match=r"was run with --model.plan=not given, not "):
        state_of(run._replace(experiment=planned))
    other = tmp_path / "split.json"
    write_split(replace(split, val=split.test, test=split.val), other)
    moved = run._replace(experiment=replace(run.experiment, data=replace(run.experiment.data, split=str(other))))
    with pytest.raises(InputError, match=re.escape(f"{folder}: was run on another split than the present one")):
        require_same_data([moved], ["complete"], tmp_path)
    shutil.rmtree(next(data.rglob("train_2")))
    with pytest.raises(
        InputError, match=re.escape(f"{folder}: was run on other data than those in {data}: case train_2")
    ):
        require_same_data([run], ["complete"], tmp_path)
    (folder / "cases.json").write_text("{")
    with pytest.raises(InputError, match=r"cases.json: missing or damaged"):
        require_same_data([run], ["complete"], tmp_path)


def test_a_run_of_another_plan_is_not_taken_for_complete(phantoms, tmp_path):
    """A plan is known by its contents: the file may lie elsewhere, but not say something else."""
    plan, study = tmp_path / "plan.json", tmp_path / "study"
    write_plan(plan, TINY_PLAN)
    (run,) = plan_runs(
        {"nnunet_2d": [f"--data.root={phantoms}", f"--model.plan={plan}"]}, ["paper1"], [0], study, tmp_path
    )
    dataset = find_cases(phantoms)
    cases = {case.id: content_key(case, dataset.labels) for case in dataset.cases}
    split = make_split(list(cases), run.experiment.data)
    hashes = {"weights_sha256": "", "split_sha256": split.sha256, "data_sha256": ""}
    record = Record(run.experiment, dataset.labels, "random", **hashes, command="", begun="", environment=environment())
    with run_folder(run.folder, record, split, cases, resume=False):
        shutil.copy(plan, run.folder / "plan.json")
    moved = shutil.copy(plan, tmp_path / "moved.json")
    model = replace(run.experiment.model, plan=str(moved))
    run = run._replace(experiment=replace(run.experiment, model=model))
    assert state_of(run) == "begun"
    write_plan(moved, TINY_PLAN._replace(median_spacing=(3.0, 1.0, 1.0)))
    with pytest.raises(InputError, match=r"was run with another plan than .*moved.json; move that folder away"):
        state_of(run)


def test_the_studies_are_listed(capsys):
    main(["--name=list"])
    listed = capsys.readouterr().out
    for text in ("paper1", "fewshot_patients", "fewshot_data", "fewshot_20patients", "data_25percent", "dinov2_vitg14"):
        assert text in listed
