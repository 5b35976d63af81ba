"""python -m jaxla.plan: plans made from scans or from their shapes and spacings, and refused options."""

import json
from pathlib import Path

import pytest

from tests.commands import refuse, run_in_this_process
from tests.data.nifti import save_raw_spacing, save_sheared, write_flat_pairs

GOLDEN = Path(__file__).parent / "golden" / "nnunet_plans"


def make_plan(folder, *options):
    done = run_in_this_process(folder, "jaxla.plan", *options, "--output=plan.json", f"--cache-dir={folder / 'cache'}")
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "plan.json").read_text()), done.stdout


@pytest.mark.parametrize("name", ["Hippocampus", "LAlike", "LAmixed", "Small"])
def test_fingerprint_gives_nnunets_plan(tmp_path, name):
    content, output = make_plan(tmp_path, f"--fingerprint={GOLDEN / f'{name}.json'}")
    assert content == json.loads((GOLDEN / f"{name}.json").read_text())
    assert output.splitlines()[0].startswith(f"{len(content['fingerprint']['spacings'])} cases, median ")
    for configuration in content["configurations"]:
        if configuration != "3d_cascade_fullres":  # inherits from 3d_fullres, so it is not printed
            assert f"\n{configuration} " in output


def test_real_scans_give_nnunets_plan(tmp_path, hippocampus):
    """The plan contains the shapes and spacings of all 60 scans."""
    content, _ = make_plan(tmp_path, f"--data.root={hippocampus}")
    assert content == json.loads((GOLDEN / "Hippocampus.json").read_text())


def test_plan_contains_shapes_and_spacings_of_the_scans(tmp_path):
    write_flat_pairs(tmp_path / "data", 4)
    content, output = make_plan(tmp_path, f"--data.root={tmp_path / 'data'}")
    assert content["fingerprint"] == {"spacings": [[2.5, 0.75, 0.75]] * 4, "shapes_after_crop": [[4, 14, 16]] * 4}
    assert "4 cases, median 4×14×16 voxels of 2.5×0.75×0.75 mm" in output


def test_less_memory_gives_smaller_patches(tmp_path):
    large, _ = make_plan(tmp_path, f"--fingerprint={GOLDEN / 'LAlike.json'}")
    (tmp_path / "plan.json").unlink()
    small, _ = make_plan(tmp_path, f"--fingerprint={GOLDEN / 'LAlike.json'}", "--memory-gb=2", "--classes=3")
    assert small["configurations"]["2d"]["patch_size"] < large["configurations"]["2d"]["patch_size"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "--data.root and --fingerprint: neither was given. Pass one of them."),
        (("--data.root=data", "--fingerprint=f.json"), "--data.root and --fingerprint: both were given"),
        (("--fingerprint=nothing.json",), "nothing.json: cannot be read"),
        (("--fingerprint=f.json", "--output=plan.txt"), "--output=plan.txt: the name does not end in .json"),
        (("--fingerprint=f.json", "--output=f.json"), "--output=f.json: already exists"),
        (("--fingerprint=f.json", "--memory-gb=-1"), "--memory-gb=-1.0: must be a positive number"),
        (("--fingerprint=f.json", "--classes=0"), "--classes=0: must be at least 1"),
        (("--fingerprint=f.json", "--data.labels=a:1"), "--data.labels: can only be used with --data.root"),
        (("--data.root=data", "--classes=2"), "--classes: can only be used with --fingerprint"),
        (("--data.root=nothing",), "no such folder"),
        (("--fingerprint=bad.json",), "case 1 has the spacing [0.0, 1.0, 1.0]"),
    ],
)
def test_bad_options_are_refused_in_one_line(tmp_path, options, message):
    (tmp_path / "f.json").write_text((GOLDEN / "Small.json").read_text())
    bad = {"spacings": [[1, 1, 1], [0, 1, 1]], "shapes_after_crop": [[8, 8, 8]] * 2}
    (tmp_path / "bad.json").write_text(json.dumps(bad))
    arguments = ("--output=plan.json", f"--cache-dir={tmp_path / 'cache'}", *options)
    assert message in refuse(tmp_path, "jaxla.plan", *arguments)


@pytest.mark.parametrize("make", [save_sheared, lambda path: save_raw_spacing(path, (0.75, 0, 2.5))])
def test_scans_without_usable_spacing_are_refused(tmp_path, make):
    first = sorted(path for path in write_flat_pairs(tmp_path / "data", 2).iterdir() if "mask" not in path.name)[0]
    first.unlink()
    scan = first.with_suffix("")  # uncompressed
    make(scan)
    arguments = (f"--data.root={tmp_path / 'data'}", "--output=p.json", f"--cache-dir={tmp_path / 'cache'}")
    assert str(scan) in refuse(tmp_path, "jaxla.plan", *arguments)
