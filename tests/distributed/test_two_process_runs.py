"""Commands run by two processes on this machine: the numbers of one, each case once; killed, and gone on with."""

import json
import os
import re
import shutil
import signal

import nibabel as nib
import numpy as np
import pytest

from tests.commands import run_module
from tests.distributed.group import finish, free_port, start, together, wait_for


def command(folder, phantoms, *options, run="run"):
    """A frozen backbone, whose features are computed once."""
    return [
        "jaxla.train", "--exp=quickstart", f"--data.root={phantoms}", f"--run-dir={folder / run}",
        f"--cache-dir={folder / 'cache'}", "--preprocessing.image_size=48", "--training.epochs=4", "--seed=1",
        "--model.backbone=frozen", *options,
    ]  # fmt: skip


def history(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def cases_of(run):
    return [line.split(",")[0] for line in (run / "test" / "cases.csv").read_text().splitlines()[1:]]


@pytest.fixture(scope="module")
def split_file(phantoms, tmp_path_factory):
    """Two patients train, one validates and three are tested."""
    names = sorted(path.parent.name for path in phantoms.rglob("enhanced.nii.gz"))
    path = tmp_path_factory.mktemp("split") / "split.json"
    path.write_text(json.dumps({"train": names[:2], "val": names[2:3], "test": names[3:]}))
    return path


@pytest.fixture(scope="module")
def of_one(phantoms, split_file, tmp_path_factory):
    """The run of one process, and its cache."""
    folder = tmp_path_factory.mktemp("one")
    run_module(*command(folder, phantoms, f"--data.split={split_file}"))
    return folder


@pytest.fixture(scope="module")
def of_two(phantoms, split_file, tmp_path_factory):
    """The run of two, which was ended twice, by SIGKILL and by SIGTERM to one of them; and what all said each time."""
    folder = tmp_path_factory.mktemp("two")
    ours = command(folder, phantoms, f"--data.split={split_file}")
    ended = []
    for epoch, number, resume in ((1, signal.SIGKILL, []), (2, signal.SIGTERM, ["--resume"])):
        processes = start(together([*ours, *resume], free_port()), folder)
        metrics = folder / "run" / "metrics.jsonl"
        wait_for(lambda: metrics.exists() and len(history(folder / "run")) >= epoch, 120, processes)  # noqa: B023
        os.kill(processes[1].pid, number)
        ended.append(finish(processes, folder, seconds=60))
    done = finish(start(together([*ours, "--resume"], free_port()), folder), folder, seconds=300)
    assert done[0] == [0, 0], done
    return folder, *ended, done


def test_a_killed_process_ends_the_run_which_says_how_to_go_on(of_two):
    folder, (codes, _, err), _, _ = of_two
    assert codes == [1, -signal.SIGKILL]
    (line,) = [line for line in err[0].splitlines() if line.startswith("stopped")]
    assert line.startswith("stopped: process 1 of 2 (")
    assert f"--run-dir={folder / 'run'} --resume" in line
    assert line in (folder / "run" / "train.log").read_text()


def test_one_that_is_asked_to_end_has_all_finish_the_step_and_save(of_two):
    _, _, (codes, _, err), (_, out, _) = of_two
    assert codes == [1, 1]
    (line,) = [line for line in (err[0] + err[1]).splitlines() if line.startswith("stopped")]
    where = re.match(r"stopped in epoch (\d+), after (\d+) of \d+ steps; go on with: ", line)
    assert f"goes on after {int(where[1]) - 1} epochs and {where[2]} steps" in out[0]


def test_two_processes_give_the_run_of_one(of_one, of_two):
    folder, _, _, (_, out, _) = of_two
    ours, theirs = history(folder / "run"), history(of_one / "run")
    assert len(ours) == len(theirs) == 4
    for kind, tolerance in {"train_loss": 1e-4, "val_loss": 1e-4, "val_dice": 2e-3}.items():
        # measured: 3e-5 of a loss, 5e-4 of Dice (some pixels at the threshold)
        np.testing.assert_allclose([m[kind] for m in ours], [m[kind] for m in theirs], rtol=tolerance, err_msg=kind)
    assert cases_of(folder / "run") == cases_of(of_one / "run")
    summaries = [json.loads((f / "run" / "test" / "summary.json").read_text()) for f in (folder, of_one)]
    for metric in ("dice", "iou", "assd_mm"):
        assert summaries[0][metric]["n"] == 3
        assert summaries[0][metric]["mean"] == pytest.approx(summaries[1][metric]["mean"], rel=1e-4)
    assert out[1].count("\n") <= 1  # Gloo's own line
    record = json.loads((folder / "run" / "experiment.json").read_text())
    assert (record["environment"]["processes"], record["environment"]["devices"]) == (2, 2)


def test_each_case_is_computed_and_segmented_once(of_one, of_two):
    folder, (_, began, _), _, (_, ended, _) = of_two
    assert "features: 3 of 3 cases" in began[0]  # of six
    assert "testing: 2 of 2 cases" in ended[0]  # of three
    features = [sorted(path.name for path in (f / "cache" / "features").rglob("*")) for f in (folder, of_one)]
    assert features[0] == features[1]
    for name in [name for name in features[0] if name.endswith(".npy")]:
        ours, theirs = (next((f / "cache" / "features").rglob(name)).read_bytes() for f in (folder, of_one))
        assert ours == theirs
    assert len(list((folder / "run" / "test" / "predictions").iterdir())) == 3


def test_predictions_are_shared_out(of_two, phantoms, tmp_path):
    folder, *_ = of_two
    scans = tmp_path / "scans"
    scans.mkdir()
    for path in sorted(phantoms.rglob("enhanced.nii.gz"))[:3]:
        shutil.copy(path, scans / f"{path.parent.name}.nii.gz")
    predict = ["jaxla.predict", f"--run={folder / 'run'}", f"--input={scans}"]
    run_module(*predict, f"--output={tmp_path / 'one'}")
    codes, out, err = finish(
        start(together([*predict, f"--output={tmp_path / 'two'}"], free_port()), tmp_path), tmp_path, 120
    )
    assert codes == [0, 0], err
    masks = sorted(path.name for path in scans.iterdir())
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == masks
    for name in masks:
        one, two = (np.asarray(nib.load(tmp_path / folder / name).dataobj) for folder in ("one", "two"))
        np.testing.assert_array_equal(one, two)
    for number in (1, 2, 3):
        assert f"\n{number}/3 {tmp_path / 'two'}" in f"\n{out[0]}"


def test_a_forecast_is_made_together(phantoms, split_file, tmp_path):
    dry = command(tmp_path, phantoms, f"--data.split={split_file}", "--dry-run")
    codes, out, err = finish(start(together(dry, free_port()), tmp_path), tmp_path, 120)
    assert codes == [0, 0], err
    assert re.search(r"^patients +2 train, 1 val, 3 test$", out[0], re.MULTILINE)
    assert "patients" not in out[1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("of_second", "says"),
    [
        (["--seed=2"], "option --seed is 2 on process 1 of 2 ({host}), but 1 on process 0 of 2 ({host}); give all"),
        (["--data.root=OTHER"], "case train_2 is "),
        (["--data.split=OTHER"], "process 1 of 2 ({host}): --data.split=OTHER: cannot be read"),
    ],
)
def test_differences_are_found_before_training(phantoms, split_file, tmp_path, of_second, says):
    other = tmp_path / "other"
    shutil.copytree(phantoms, other)
    scan = next(path for path in other.rglob("enhanced.nii.gz") if path.parent.name == "train_2")
    image = nib.load(scan)
    changed = np.asarray(image.dataobj) + 1
    nib.save(nib.Nifti1Image(changed, image.affine, image.header), scan)
    commands = together(command(tmp_path, phantoms, f"--data.split={split_file}"), free_port())
    commands[1] += [option.replace("root=OTHER", f"root={other}") for option in of_second]
    codes, _, err = finish(start(commands, tmp_path), tmp_path, 120)
    assert codes == [2, 2]
    (line,) = [line for line in err[0].splitlines() if line.startswith("error")]
    assert says.format(host=os.uname().nodename) in line
    assert "error" not in err[1]
    assert not (tmp_path / "run").exists()
