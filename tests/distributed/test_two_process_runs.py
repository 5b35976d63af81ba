"""Commands run by two processes: they give the results of one, compute each case once, and resume after a kill."""

import json
import re
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest

from tests.commands import succeed
from tests.distributed.group import find_free_port, finish, group_commands, start, wait_for


def command(folder, phantoms, *options, run="run"):
    """Return a training command with a frozen backbone, whose features are computed once."""
    return [
        "jaxla.train", "--exp=quickstart", "--method=vit_mini8", f"--data.root={phantoms}", f"--run-dir={folder / run}",
        f"--cache-dir={folder / 'cache'}", "--preprocessing.image_size=32", "--training.epochs=4", "--seed=1",
        "--model.backbone=frozen", *options,
    ]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def fast_compilation_in_all_processes(fast_compilation):
    """Disable most compiler optimisations, because they take longer than these runs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
        yield


def history(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def read_case_names(run):
    return [line.split(",")[0] for line in (run / "test" / "cases.csv").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def split_file(phantoms, tmp_path_factory):
    """A split file with two training, one validation and three test patients."""
    names = sorted(path.parent.name for path in phantoms.rglob("enhanced.nii.gz"))
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps({"train": names[:2], "val": names[2:3], "test": names[3:]}))
    return path


@pytest.fixture(scope="module")
def single_run(phantoms, split_file, tmp_path_factory):
    """The folder that contains a run by one process, and its cache."""
    folder = tmp_path_factory.mktemp("one")
    succeed(folder, *command(folder, phantoms, f"--data.split={split_file}"))
    return folder


@pytest.fixture(scope="module")
def double_run(phantoms, split_file, tmp_path_factory):
    """A run by two processes: process 1 is killed; the resumed run gets SIGTERM; the second resume finishes the run.

    Returns the folder, and (exit codes, texts of stdout, texts of stderr) for each of the three launches. Each of these
    lists has one entry per process.
    """
    folder = tmp_path_factory.mktemp("two")
    train = command(folder, phantoms, f"--data.split={split_file}")
    metrics = folder / "run" / "metrics.jsonl"
    launches = []
    for epochs, signal_number, resume in ((1, signal.SIGKILL, []), (2, signal.SIGTERM, ["--resume"])):
        processes = start(group_commands([*train, *resume], find_free_port()), folder)
        wait_for(lambda: metrics.exists() and len(history(folder / "run")) >= epochs, processes)  # noqa: B023
        processes[1].send_signal(signal_number)
        launches.append(finish(processes, folder, seconds=60))
    launches.append(finish(start(group_commands([*train, "--resume"], find_free_port()), folder), folder, seconds=900))
    assert launches[-1][0] == [0, 0], launches[-1]
    return folder, *launches


def test_killing_one_process_stops_the_run_and_prints_the_resume_command(double_run):
    folder, (codes, _, err), _, _ = double_run
    assert codes == [1, -signal.SIGKILL]
    (line,) = [line for line in err[0].splitlines() if line.startswith("stopped")]
    assert f"--run-dir={folder / 'run'} --resume" in line
    assert line in (folder / "run" / "train.log").read_text()


def test_sigterm_to_one_process_makes_all_finish_the_step_and_save(double_run):
    _, _, (codes, _, err), (_, out, _) = double_run
    assert codes == [1, 1]
    (line,) = [line for line in (err[0] + err[1]).splitlines() if line.startswith("stopped")]
    where = re.match(r"stopped in epoch (\d+), after (\d+) of \d+ steps", line)
    assert line.endswith(" --resume")
    assert f"resuming after {int(where[1]) - 1} epochs and {where[2]} steps" in out[0]


def test_two_processes_give_the_results_of_one_process(single_run, double_run):
    folder, _, _, (_, out, _) = double_run
    actual, expected = history(folder / "run"), history(single_run / "run")
    assert len(actual) == len(expected) == 4
    for kind, tolerance in {"train_loss": 1e-4, "val_loss": 1e-4, "val_dice": 2e-3}.items():
        # measured: 3e-5 for losses, 5e-4 for Dice (some pixels at the threshold)
        np.testing.assert_allclose([m[kind] for m in actual], [m[kind] for m in expected], rtol=tolerance, err_msg=kind)
    assert read_case_names(folder / "run") == read_case_names(single_run / "run")
    summaries = [json.loads((f / "run" / "test" / "summary.json").read_text()) for f in (folder, single_run)]
    for metric in ("dice", "iou", "assd_mm"):
        assert summaries[0][metric]["n"] == 3
        assert summaries[0][metric]["mean"] == pytest.approx(summaries[1][metric]["mean"], rel=1e-4)
    assert out[1].count("\n") <= 1  # Gloo may print one line
    record = json.loads((folder / "run" / "experiment.json").read_text())
    assert (record["environment"]["processes"], record["environment"]["devices"]) == (2, 2)


def test_each_case_is_computed_and_segmented_once(single_run, double_run):
    folder, (_, first_out, _), _, (_, last_out, _) = double_run
    assert "features: 3 of 3 cases" in first_out[0]  # its share of the six cases
    assert "testing: 2 of 2 cases" in last_out[0]  # its share of the three cases
    features = [sorted(path.name for path in (f / "cache" / "features").rglob("*")) for f in (folder, single_run)]
    assert features[0] == features[1]
    for name in [name for name in features[0] if name.endswith(".npy")]:
        two, one = (next((f / "cache" / "features").rglob(name)).read_bytes() for f in (folder, single_run))
        assert two == one
    assert len(list((folder / "run" / "test" / "predictions").iterdir())) == 3


def test_each_scan_is_predicted_by_one_process(double_run, phantoms, tmp_path):
    folder, *_ = double_run
    scans = tmp_path / "scans"
    scans.mkdir()
    for path in sorted(phantoms.rglob("enhanced.nii.gz"))[:3]:
        shutil.copy(path, scans / f"{path.parent.name}.nii.gz")
    predict = ["jaxla.predict", f"--run={folder / 'run'}", f"--input={scans}"]
    succeed(tmp_path, *predict, f"--output={tmp_path / 'one'}")
    processes = start(group_commands([*predict, f"--output={tmp_path / 'two'}"], find_free_port()), tmp_path)
    codes, out, err = finish(processes, tmp_path, 900)
    assert codes == [0, 0], err
    masks = sorted(path.name for path in scans.iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["predictions.csv", *masks]
    tables = [(tmp_path / folder / "predictions.csv").read_text() for folder in ("one", "two")]
    assert tables[0] == tables[1]
    for name in masks:
        one, two = (np.asarray(nib.load(tmp_path / folder / name).dataobj) for folder in ("one", "two"))
        np.testing.assert_array_equal(one, two)
    for number in (1, 2, 3):
        assert (out[0] + out[1]).count(f"{number}/3 {tmp_path / 'two'}") == 1


def test_two_processes_make_one_forecast(single_run, phantoms, split_file, tmp_path):
    dry = command(single_run, phantoms, f"--data.split={split_file}", "--dry-run", run="dry")
    codes, out, err = finish(start(group_commands(dry, find_free_port()), tmp_path), tmp_path, 900)
    assert codes == [0, 0], err
    assert re.search(r"^patients +2 train, 1 val, 3 test$", out[0], re.MULTILINE)
    assert "patients" not in out[1]
    assert not (single_run / "dry").exists()


@pytest.mark.parametrize(
    ("option", "message"),
    [("--seed=2", r"--seed: 2 on process 1 \(.*\), but 1 on process 0 \("), ("--data.root=CHANGED", "case train_2: ")],
)
def test_differences_between_processes_are_refused(single_run, phantoms, split_file, tmp_path, option, message):
    changed = tmp_path / "changed"
    shutil.copytree(phantoms, changed)
    scan = next(path for path in changed.rglob("enhanced.nii.gz") if path.parent.name == "train_2")
    image = nib.load(scan)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj) + 1, image.affine, image.header), scan)
    commands = group_commands(
        command(single_run, phantoms, f"--data.split={split_file}", run="refused"), find_free_port()
    )
    commands[1].append(option.replace("CHANGED", str(changed)))
    codes, _, err = finish(start(commands, tmp_path), tmp_path, 900)
    assert codes == [2, 2]
    (line,) = [line for line in (err[0] + err[1]).splitlines() if line.startswith("error")]
    assert re.match(rf"error: (process 1: )?{message}", line)
    assert not (single_run / "refused").exists()


def test_two_processes_choose_the_same_number_of_steps_for_a_time_limit(phantoms, tmp_path):
    train = [
        "jaxla.train", "--exp=laptop", f"--data.root={phantoms}", f"--run-dir={tmp_path / 'run'}",
        f"--cache-dir={tmp_path / 'cache'}", "--data.split=all", "--preprocessing.image_size=32",
        "--model.widths=[4,8]", "--training.epochs=2", "--training.minutes=0.005", "--training.schedule=constant",
    ]  # fmt: skip
    codes, out, err = finish(start(group_commands(train, find_free_port()), tmp_path), tmp_path, seconds=300)
    assert codes == [0, 0], err
    record = json.loads((tmp_path / "run" / "experiment.json").read_text())
    epochs, steps = record["fitted_epochs"], record["fitted_steps"]  # fewer on a slow machine
    assert re.search(rf"0.005 minutes: {epochs} epochs? of {steps} step", out[0])
    assert len(history(tmp_path / "run")) == epochs
    assert "no test cases" in out[0]
