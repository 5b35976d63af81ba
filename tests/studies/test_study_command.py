"""python -m jaxla.study as a user runs it: runs that fail, are stopped, are resumed, or are already complete."""

import json
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest

from jaxla.cli.process import Stopped
from jaxla.config import InputError
from jaxla.data.cases import find_cases
from jaxla.data.prepared import content_key
from jaxla.data.split import make_split, write_split
from jaxla.nnunet.plan import write_plan
from jaxla.runs.folder import run_folder
from jaxla.runs.machine import environment
from jaxla.runs.record import Record
from jaxla.studies.schedule import add_method_to_errors, read_state, require_same_data, schedule_runs
from jaxla.study import main
from tests.commands import succeed
from tests.tiny import TINY_PLAN


def study_options(phantoms, folder, *extra):
    return [
        "--name=fewshot_patients", "--methods=unet,attention_unet", "--experiments=fewshot_1patient", "--seeds=3",
        f"--output={folder / 'study'}", f"--cache-dir={folder / 'cache'}", f"--data.root={phantoms}",
        "--preprocessing.image_size=32", "--training.epochs=2", "--training.batch_size=8", "--model.widths=[8,16]",
        *extra,
    ]  # fmt: skip


@pytest.mark.usefixtures("fast_compilation")
def test_study_resumes_after_a_failure_and_after_a_stop(phantoms, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")  # compiling takes longer than the few steps
    runs = tmp_path / "study" / "runs"
    unet, gated = (runs / f"fewshot_1patient_{method}_seed3" for method in ("unet", "attention_unet"))

    # with this learning rate, the loss of the first epoch is NaN
    with pytest.raises(Stopped) as stopped:
        main(study_options(phantoms, tmp_path, "--unet.training.learning_rate=1e30"))
    printed = capsys.readouterr().out
    assert "2 runs: 2 methods, 1 protocol, 1 seed (3); 0 complete, 0 started, 2 new" in printed
    assert re.search(r"^time  about .* from 3 measured steps of each method", printed, re.MULTILINE)
    assert re.search(r"^disk  run folders at most \S+ \(\S+ free\)$", printed, re.MULTILINE)
    error = str(stopped.value)
    assert error.startswith(f"after 1 of 2 runs failed: {unet} (exit code 2: error: ")
    assert "training.learning_rate" in error
    assert "; resume with: python -m jaxla.study --name=fewshot_patients" in error
    assert (gated / "report.html").exists()
    assert not (tmp_path / "study" / "report.html").exists()
    split = json.loads((gated / "split.json").read_text())
    assert len(split["train"]) == 1
    assert json.loads((gated / "experiment.json").read_text())["experiment"]["data"]["subset_seed"] == 3

    problem = (
        f"{unet}: was run with --training.learning_rate=1e+30, but the study schedules 0.0001. Move this folder away"
    )
    with pytest.raises(InputError, match=re.escape(problem)):
        main(study_options(phantoms, tmp_path))

    shutil.rmtree(unet)
    complete = {path: path.stat().st_mtime_ns for path in gated.rglob("*")}
    command = [sys.executable, "-m", "jaxla.study", *study_options(phantoms, tmp_path)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if "epoch 1/2" in line:
            process.send_signal(signal.SIGTERM)
            break
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 1
    assert stderr.count("\n") == 1
    assert stderr.startswith(f"stopped in run {unet.name}; resume with: python -m jaxla.study --name=fewshot_patients")
    assert (unet / "experiment.json").exists()

    printed = succeed(tmp_path, "jaxla.study", *study_options(phantoms, tmp_path))
    assert re.search(r"; 1 complete, 1 started, 0 new|; 2 complete", printed)
    assert printed.splitlines()[-1] == f"2 runs are complete: {tmp_path / 'study' / 'report.html'}"
    assert json.loads((unet / "experiment.json").read_text())["resumed"]
    assert {path: path.stat().st_mtime_ns for path in gated.rglob("*")} == complete
    assert json.loads((unet / "split.json").read_text()) == split  # the same patient for both methods
    assert "fewshot_1patient_unet_seed3" in (tmp_path / "study" / "report.html").read_text()

    (tmp_path / "study" / "report.html").unlink()
    main(study_options(phantoms, tmp_path, "--dry-run"))
    assert capsys.readouterr().out.splitlines()[-1] == (
        "2 runs: 2 methods, 1 protocol, 1 seed (3); 2 complete, 0 started, 0 new"
    )
    assert not (tmp_path / "study" / "report.html").exists()
    main(study_options(phantoms, tmp_path))
    assert capsys.readouterr().out.splitlines()[-1] == printed.splitlines()[-1]
    assert (tmp_path / "study" / "report.html").exists()
    assert {path: path.stat().st_mtime_ns for path in gated.rglob("*")} == complete


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--seeds=1,2,1", "--seeds: 1 is repeated. Remove the repetition."),
        ("--seeds=one", "--seeds=one: expected integers. Pass a list such as 0,1,2."),
        ("--seeds=-1", "--seeds=-1: seeds must be 0 or more. "),
        ("--methods=unet,unet", "--methods: unet is repeated. "),
        ("--methods=unet,segmet", "--methods … segmet … did you mean segnet"),
        ("--experiments=fewshot_3patients", "--experiments … fewshot_3patients … did you mean fewshot_"),
        ("--name=papers1", "--name … papers1 … did you mean paper1"),
        ("--seed=3", "--seed: the study sets this option for each run. Use --seeds."),
        ("--run-dir=x", "--run-dir: the study sets this option for each run. Remove the option."),
        ("--fold=0", "--fold: the study sets this option for each run. Remove the option."),
        (
            "--data.train_patients=5",
            "--data.train_patients: the study sets this option for each run. Use --experiments.",
        ),
        ("--data.subset_seed=3", "--data.subset_seed: the study sets this option for each run. Use --seeds."),
        ("--dry-run=3", "--dry-run: ignored explicit argument '3'. See --help."),
        ("--experiments=quickstart,paper1", "--experiments: paper1 and quickstart use different data "),
        (
            "--segnet.training.epochs=3",
            "--segnet.training.epochs: method segnet is not in this study. Choose from unet, ",
        ),
        ("--unet.data.labels=LA:1", "--unet.data.labels: cannot be set for a single method. Only options of model, "),
        (
            '--data={"train_patients":5}',
            "--data: cannot change the number of training patients, "
            "which the protocol fewshot_1patient sets. Choose protocols with --exp",
        ),
        ("--unet.preprocessing.image_size=0", "--preprocessing.image_size=0: less than 1"),
        ("--unet.training.epoch=3", "--training.epoch … did you mean --training.epochs?"),
        ("--training.epochs=0", "--training.epochs=0: less than 1"),
        ("--data.rot=x", "--data.rot … did you mean --data.root?"),
        ("stray", "stray"),
    ],
)
def test_invalid_options_are_refused_before_anything_is_run(phantoms, tmp_path, option, message):
    with pytest.raises(InputError, match=".*".join(map(re.escape, message.split(" … ")))):
        main(study_options(phantoms, tmp_path, option))
    assert list(tmp_path.iterdir()) == []


def test_only_errors_about_options_of_a_method_name_the_method():
    error = InputError("--training.epochs=0", "must be at least 1", "Use a larger number.")
    with pytest.raises(InputError) as raised, add_method_to_errors("unet"):
        raise error
    assert str(raised.value) == (
        "--training.epochs=0: must be at least 1 (method unet). Use a larger number. To set it for this method only, "
        "use --unet.training.epochs."
    )
    error = InputError("--data.root=/gone", "no such folder", "Check --training.epochs.")
    with pytest.raises(InputError) as raised, add_method_to_errors("unet"):
        raise error
    assert raised.value is error


def test_methods_that_are_equal_with_the_options_are_refused(phantoms, tmp_path):
    options = [option for option in study_options(phantoms, tmp_path) if "widths" not in option]
    options += ["--methods=fusion_vitb14_last4,fusion_vitb14_no_image,fusion_vitb14", "--model.arch=vit_mini8"]
    line = re.escape(
        "--methods: fusion_vitb14_no_image and fusion_vitb14 are equal with these options. Remove one of them, or set "
        "an option for one method only: --fusion_vitb14_no_image.<option>."
    )
    with pytest.raises(InputError, match=f"^{line}$"):
        main([*options, "--model.weights=random", "--model.image_stages=all"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("missing", ["--name", "--output"])
def test_missing_required_option_is_named(missing):
    options = [option for option in ("--name=paper1", "--output=study") if not option.startswith(missing)]
    with pytest.raises(InputError, match=f"^{missing}: required. (Choose from paper1, |Pass the folder)"):
        main(options)


def test_protocol_that_needs_more_patients_than_there_are_is_refused(phantoms, tmp_path):
    with pytest.raises(InputError, match=r"--data.train_patients=5: there are only 4 training patients"):
        main(study_options(phantoms, tmp_path, "--experiments=fewshot_1patient,fewshot_5patients"))
    assert not (tmp_path / "study").exists()


def test_files_in_place_of_a_run_are_refused_and_kept(phantoms, tmp_path):
    folder = tmp_path / "study" / "runs" / "fewshot_1patient_unet_seed3"
    folder.mkdir(parents=True)
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=re.escape(f"{folder}: not a run folder")):
        main(study_options(phantoms, tmp_path))
    assert (folder / "notes.txt").read_text() == "mine"


def make_record(experiment, labels, split):
    """Return the record of a run that used random weights."""
    text = dict.fromkeys(("label", "network", "input", "unit", "weights_sha256", "data_sha256", "command", "begun"), "")
    return Record(
        experiment, labels=labels, weights="random", split_sha256=split.sha256, environment=environment(), **text
    )


def with_model(experiment, **options):
    """Return the experiment with changed options of its network."""
    return replace(experiment, method=replace(experiment.method, model=replace(experiment.method.model, **options)))


def test_complete_runs_on_a_different_split_or_different_data_are_refused(phantoms, tmp_path):
    """The folder of a complete run is written without training."""
    data, study = shutil.copytree(phantoms, tmp_path / "data"), tmp_path / "study"
    folder = study / "runs" / "fewshot_1patient_unet_seed3"
    (run,) = schedule_runs({"unet": [f"--data.root={data}"]}, ["fewshot_1patient"], [3], study, tmp_path)
    dataset = find_cases(data)
    cases = {case.id: content_key(case, dataset.labels) for case in dataset.cases}
    split = make_split(list(cases), run.experiment.data)
    record = make_record(run.experiment, dataset.labels, split)
    with run_folder(folder, record, split, cases, resume=False):
        (folder / "report.html").write_text("the run is complete")

    require_same_data([run], ["complete"], tmp_path)
    assert read_state(run) == "complete"
    with pytest.raises(InputError, match=r"was run with --model.widths=.*, but the study schedules "):
        read_state(run._replace(experiment=with_model(run.experiment, widths=(8, 16))))
    swapped = tmp_path / "split.json"
    write_split(replace(split, val=split.test, test=split.val), swapped)
    moved = run._replace(experiment=replace(run.experiment, data=replace(run.experiment.data, split=str(swapped))))
    with pytest.raises(InputError, match=re.escape(f"{folder}: was run on a different split than the current one")):
        require_same_data([moved], ["complete"], tmp_path)
    shutil.rmtree(next(data.rglob("train_2")))
    problem = f"{folder}: was run on different data than {data} has now (case train_2"
    with pytest.raises(InputError, match=re.escape(problem)):
        require_same_data([run], ["complete"], tmp_path)
    (folder / "cases.json").write_text("{")
    with pytest.raises(InputError, match=r"cases.json: damaged: "):
        require_same_data([run], ["complete"], tmp_path)


def test_methods_without_validation_share_the_split_of_methods_that_need_it(phantoms, tmp_path):
    def schedule(*methods):
        options = {method: [f"--data.root={phantoms}"] for method in methods}
        return schedule_runs(options, ["paper1"], [0], tmp_path, tmp_path)

    for run in schedule("unet_small", "unet"):
        assert run.experiment.data.validation == "always"
        assert "--data.validation=always" in run.arguments
    (alone,) = schedule("unet_small")
    assert alone.experiment.data.validation == "if_useful"


@pytest.mark.parametrize("split", ["all", "split.json"])
def test_a_split_without_test_cases_is_refused(phantoms, tmp_path, monkeypatch, split):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "split.json").write_text('{"train": ["train_1"], "val": ["train_2"]}')
    with pytest.raises(InputError, match=f"^--data.split={split}: leaves no test cases, which a study needs"):
        schedule_runs(
            {"unet": [f"--data.root={phantoms}", f"--data.split={split}"]}, ["paper1"], [0], tmp_path, tmp_path
        )


def test_run_with_a_different_plan_is_refused(phantoms, tmp_path):
    """Plans are compared by content: the file may have moved, but not changed."""
    plan, study = tmp_path / "plan.json", tmp_path / "study"
    write_plan(plan, TINY_PLAN)
    (run,) = schedule_runs(
        {"nnunet_2d": [f"--data.root={phantoms}", f"--model.plan={plan}"]}, ["paper1"], [0], study, tmp_path
    )
    dataset = find_cases(phantoms)
    cases = {case.id: content_key(case, dataset.labels) for case in dataset.cases}
    split = make_split(list(cases), run.experiment.data)
    record = make_record(run.experiment, dataset.labels, split)
    with run_folder(run.folder, record, split, cases, resume=False):
        shutil.copy(plan, run.folder / "plan.json")
    moved = shutil.copy(plan, tmp_path / "moved.json")
    run = run._replace(experiment=with_model(run.experiment, plan=str(moved)))
    assert read_state(run) == "started"
    write_plan(moved, TINY_PLAN._replace(median_spacing=(3.0, 1.0, 1.0)))
    with pytest.raises(InputError, match=r"was run with a different plan than .*moved.json. Move this folder away"):
        read_state(run)


def test_name_list_describes_all_studies(capsys):
    main(["--name=list"])
    listed = capsys.readouterr().out
    for text in ("paper1", "fewshot_patients", "fewshot_data", "fewshot_20patients", "data_25percent", "dinov2_vitg14"):
        assert text in listed
