"""python -m jaxla.verify: its report, JSON and exit codes, and that it writes nothing."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands import run_in_this_process
from tests.data.nifti import image_array, mask_array, save, truncate, write_decathlon, write_flat_pairs, write_lascarqs


def verify(*options):
    """Return exit code, stdout and stderr."""
    done = run_in_this_process(Path.cwd(), "jaxla.verify", *options)
    return done.returncode, done.stdout, done.stderr


def modification_times(folder):
    """Return file or folder -> modification time; that of a folder also changes if a file in it is made and removed."""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_report_of_a_folder_without_findings(tmp_path):
    write_flat_pairs(tmp_path, 5)
    code, stdout, stderr = verify(f"--data.root={tmp_path}", "--data.labels=LA:1")
    assert (code, stderr) == (0, "")
    assert stdout.splitlines() == [
        str(tmp_path),
        "  layout        flat pairs",
        "  cases         5; default split: 3 training, 1 validation, 1 test",
        "  classes       LA: 1",
        "  label values  1 LA in 5 cases",
        "  shapes        16×14×4 (5)",
        "  spacings mm   0.75×0.75×2.5 (5)",
        "  orientations  LPS (5)",
        "  slices along  head-foot (5); 4 per case, 20 in total",
        "  LA ml         median 0.0703, from 0.0703 (case_0) to 0.0703 (case_0)",
        "  outliers      none",
        "",
        "Training can start: 0 errors, 0 warnings.",
    ]


def test_the_report_names_outlying_volumes_or_states_that_they_were_not_checked(tmp_path):
    def report(folder):
        return verify(f"--data.root={tmp_path / folder}", "--data.labels=LA:1")[1]

    write_flat_pairs(tmp_path / "few", 4)
    assert "  outliers      not checked with fewer than 5 cases\n" in report("few")
    write_flat_pairs(tmp_path / "many", 7)
    mask = mask_array()
    mask[2:12, 2:12] = 1
    save(tmp_path / "many" / "case_3_mask.nii.gz", mask)
    assert "  outliers      case_3\n" in report("many")


def test_the_report_lists_mask_values_with_their_class_and_number_of_cases(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b", "c"], {"background": 0, "LA": 1, "wall": 2}, values=(1, 2, 3))
    _, stdout, _ = verify(f"--data.root={root}", "--data.labels=LA:1,7;background:3")
    assert (
        "  label values  1 LA in 3 cases, 2 no class in 3 cases, 3 ignored (background) in 3 cases, 7 LA in 0" in stdout
    )


def test_findings_are_listed_with_relative_paths_and_counted_on_stderr(tmp_path):
    root = write_lascarqs(tmp_path / "set", 6).parent.parent
    cases = root / "task2" / "train_data"
    (cases / "train_2" / "atriumSegImgMO.nii.gz").unlink()
    truncate(cases / "train_4" / "enhanced.nii.gz")
    save(cases / "train_5" / "atriumSegImgMO.nii.gz", mask_array(value=0))
    code, stdout, stderr = verify(f"--data.root={root}")
    assert code == 2
    errors, warnings, last = stdout.split("\n\n")[1:]
    assert errors.splitlines() == [
        "errors (2)",
        "  task2/train_data/train_2/enhanced.nii.gz: has no mask. Add the mask, or move this file out of the folder.",
        errors.splitlines()[2],
    ]
    assert errors.splitlines()[2].startswith("  task2/train_data/train_4/enhanced.nii.gz: truncated or damaged (")
    assert warnings.splitlines()[0] == "warnings (1)"
    assert warnings.splitlines()[1].startswith("  task2/train_data/train_5/atriumSegImgMO.nii.gz: the mask is empty. ")
    assert last == "Training cannot start: 2 errors, 1 warning.\n"
    assert stderr == (
        f"error: --data.root={root}: 2 errors in the scans, so training cannot start. First error: "
        f"{cases}/train_2/enhanced.nii.gz: has no mask. Add the mask, or move this file out of the folder.\n"
    )


def test_many_findings_of_one_kind_are_shortened(tmp_path):
    root = write_decathlon(tmp_path, [f"c{n:02}" for n in range(30)], {"background": 0, "LA": 1}, values=(1, 2))
    code, stdout, stderr = verify(f"--data.root={root}")
    assert code == 2
    errors = stdout.split("\n\n")[1].splitlines()
    assert errors[0] == "errors (30)"
    assert [line.split(":")[0] for line in errors[1:4]] == [f"  labelsTr/c0{n}.nii.gz" for n in range(3)]
    assert errors[4].startswith("  and 27 more of this kind (labels): c03, c04, ")
    assert errors[4].endswith("c12, … 17 more; --json lists all")
    assert len(errors) == 5
    assert ": 30 errors in the scans, so training cannot start. First error: " in stderr


def test_control_characters_of_names_are_escaped(tmp_path):
    root = write_decathlon(tmp_path, ["a", "b", "c\x1b[2J"], {"background": 0, "LA": 1})
    content = json.loads((root / "dataset.json").read_text())
    content["training"] = [{"image": f"imagesTr/{name}.nii.gz"} for name in ("a", "b", "c\x1b[2J", "d\nerrors")]
    (root / "dataset.json").write_text(json.dumps(content))
    _, stdout, _ = verify(f"--data.root={root}")
    assert r"d\nerrors" in stdout
    (root / "labelsTr" / "c\x1b[2J.nii.gz").unlink()
    _, stdout, stderr = verify(f"--data.root={root}")
    assert r"  imagesTr/c\x1b[2J.nii.gz: has no mask." in stdout
    assert "\x1b" not in stdout + stderr


def test_a_relative_root_is_read_as_in_training(tmp_path, monkeypatch):
    write_flat_pairs(tmp_path / "data", 5)
    (tmp_path / "data" / "case_1_mask.nii.gz").unlink()
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = verify("--data.root=data")
    assert code == 2
    assert "\n  case_1.nii.gz: has no mask. " in stdout
    assert stderr.startswith(
        "error: --data.root=data: 1 error in the scans, so training cannot start. First error: data/case_1.nii.gz: has "
        "no mask"
    )


# --- JSON ------------------------------------------------------------------------------------------------------------


def run_in_new_process(folder, *options):
    code = (  # writes at exit which slow modules were imported
        "import atexit, sys; from jaxla import verify; from jaxla.cli.process import run_command;"
        "atexit.register(lambda: open('modules.txt', 'w').write(' '.join({'jax', 'torch'} & set(sys.modules))));"
        "run_command(verify.main)"
    )
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache")}
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, options)],
        capture_output=True, text=True, cwd=folder, env=environment, timeout=100, check=False,
    )  # fmt: skip


def test_stdout_is_only_json_even_if_training_would_log_a_line(tmp_path):
    root = tmp_path / "set"
    write_lascarqs(root, 4)
    # training would log that this scan is not read
    save(root / "task2" / "val_data" / "val_1" / "enhanced.nii.gz", image_array(9))
    before = modification_times(root)
    done = run_in_new_process(tmp_path, f"--data.root={root}", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    assert report["training_could_start"] is True
    assert report["layout"] == "LAScarQS"
    assert report["label_values"] == [{"value": 255, "taken_for": "LA", "cases": 4}]
    assert [case["id"] for case in report["cases"]] == ["train_1", "train_2", "train_3", "train_4"]
    assert report["cases"][0]["volumes"] == {"LA": pytest.approx(0.0703125)}
    assert report["cases"][0]["spacing"] == [0.75, 0.75, 2.5]
    assert [os.path.relpath(path, root) for path in report["unread"]] == ["task2/val_data/val_1/enhanced.nii.gz"]
    assert {len(report["default_split"][part]) for part in ("val", "test")} == {1}
    assert modification_times(root) == before
    assert not (tmp_path / "cache").exists()
    assert (tmp_path / "modules.txt").read_text() == ""


def test_json_has_every_finding_and_stderr_the_first(tmp_path):
    root = write_flat_pairs(tmp_path, 30)
    for n in range(25):
        (root / f"case_{n}_mask.nii.gz").unlink()
    save(root / "case_27_mask.nii.gz", mask_array(value=0))
    code, stdout, stderr = verify(f"--data.root={root}", "--json")
    assert code == 2
    report = json.loads(stdout)
    assert report["training_could_start"] is False
    assert [finding["level"] for finding in report["findings"]] == ["error"] * 25 + ["warning"]
    assert report["findings"][0] == {
        "kind": "no mask",
        "file": str(root / "case_0.nii.gz"),
        "what": "has no mask",
        "mend": "Add the mask, or move this file out of the folder.",
        "case": "case_0",
        "level": "error",
    }
    assert len(stderr.splitlines()) == 1
    assert stderr.startswith(
        f"error: --data.root={root}: 25 errors in the scans, so training cannot start. First error: "
    )


def test_a_case_that_cannot_be_read_is_null_in_json(tmp_path):
    root = write_flat_pairs(tmp_path, 4)
    truncate(root / "case_2.nii.gz")
    report = json.loads(verify(f"--data.root={root}", "--json")[1])
    assert report["cases"][2]["shape"] is None
    assert report["cases"][2]["mask_values"] == [1]


# --- usage errors ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("json_option", [(), ("--json",)])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "command line: the following arguments are required: data.root"),
        (["--data.root=phantom"], "--data.root=phantom: "),
        (["--data.root=nowhere"], "--data.root=nowhere: no such folder"),
        (["--data.root=file.nii.gz"], "--data.root=file.nii.gz: is a file, not a folder. "),
        (["--data.root=empty"], "empty: no case found; the folder holds no scan; recognised layouts: LAScarQS"),
        (["--data.root=data", "--data.labels=LA"], "--data.labels='LA': expected name:value"),
        (["--data.root=data", "--data.label=LA:1"], "--data.label: unknown option (did you mean --data.labels?)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_usage_is_one_line_on_stderr(tmp_path, monkeypatch, options, message, json_option):
    (tmp_path / "empty").mkdir()
    save(tmp_path / "file.nii.gz", image_array())
    write_flat_pairs(tmp_path / "data", 3)
    monkeypatch.chdir(tmp_path)
    code, stdout, stderr = verify(*options, *json_option)
    assert (code, stdout) == (2, "")
    assert stderr.startswith(f"error: {message}")
    assert len(stderr.splitlines()) == 1
