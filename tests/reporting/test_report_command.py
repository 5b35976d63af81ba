"""`jaxla.report --run`: the page of a finished run, written again from its folder."""

import shutil

import pytest

from tests.commands import refuse, succeed


@pytest.fixture
def run(small_run, tmp_path):
    return shutil.copytree(small_run, tmp_path / "small run")


def test_rewritten_page_and_overlays_are_identical(run, small_run, tmp_path):
    for name in ("report.html", "test/overlays.png"):
        (run / name).unlink()
    printed = succeed(tmp_path, "jaxla.report", f"--run={run}", f"--cache-dir={small_run.parent / 'cache'}")
    assert printed.splitlines()[-1] == f"wrote '{run}/report.html'"  # quoted, to be pasted
    for name in ("report.html", "test/overlays.png"):
        assert (run / name).read_bytes() == (small_run / name).read_bytes()


def test_the_page_can_be_written_without_the_cache_from_scans_that_moved(run, small_run, phantoms, tmp_path):
    scans = shutil.copytree(phantoms, tmp_path / "moved")
    succeed(tmp_path, "jaxla.report", f"--run={run}", f"--data.root={scans}", f"--cache-dir={tmp_path / 'cache'}")
    assert (run / "report.html").read_bytes() == (small_run / "report.html").read_bytes()
    masks = sorted(scans.rglob("atriumSegImgMO.nii.gz"))
    contents = [mask.read_bytes() for mask in masks]
    for mask, content in zip(masks, contents[1:] + contents[:1], strict=True):
        mask.write_bytes(content)
    line = refuse(tmp_path, "jaxla.report", f"--run={run}", f"--data.root={scans}", f"--cache-dir={tmp_path / 'cache'}")
    assert line.endswith("has changed since training. Pass the folder of the original files as --data.root.")


def test_a_run_that_was_not_tested_is_refused(run, tmp_path):
    (run / "report.html").unlink()
    (run / "cost.json").unlink()
    line = refuse(tmp_path, "jaxla.report", f"--run={run}")
    assert line.startswith(f"error: {run}: this run has not been tested. Finish it: python -m jaxla.train --exp=")
    assert line.endswith(f"'--run-dir={run}' --resume")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--study: missing. Pass --study=DIR or --run=DIR."),
        (["--study=a", "--run=b"], "--study: cannot be combined with --run. Pass --study=DIR or --run=DIR."),
        (["--run=b", "--cases=c"], "--cases: applies only to --study. Remove the option."),
        (["--run=nowhere"], "nowhere: not a run folder (no experiment.json). Pass the folder that training wrote."),
    ],
)
def test_options_that_name_no_folder_are_refused(options, message, tmp_path):
    assert refuse(tmp_path, "jaxla.report", *options) == f"error: {message}"
