"""nnU-Net's commands on phantoms, in 2D and 3D: plan, train, resume, test, predict."""

import csv
import json
import shutil

import jax
import nibabel as nib
import numpy as np
import pytest

import jaxla
from jaxla.runs.trained import load_run
from tests.commands import refuse, run_in_this_process, succeed
from tests.training.faults import limit_memory

pytestmark = pytest.mark.usefixtures("fast_compilation")


@pytest.fixture(scope="module")
def plan(phantoms, tmp_path_factory):
    """A plan for the phantoms with pixels four times as large and few features, so that steps are fast."""
    folder = tmp_path_factory.mktemp("plan")
    succeed(
        folder, "jaxla.plan", f"--data.root={phantoms}", f"--output={folder / 'full.json'}", f"--cache-dir={folder}"
    )
    content = json.loads((folder / "full.json").read_text())
    strides, kernels = [[1, 1, 1], [1, 2, 2], [2, 2, 2]], [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    for configuration in content["configurations"].values():
        if "spacing" not in configuration:
            continue
        axes = len(configuration["spacing"])
        sizes = configuration["median_image_size_in_voxels"]
        sizes[-2:] = [n / 4 for n in sizes[-2:]]
        configuration["spacing"][-2:] = [4 * mm for mm in configuration["spacing"][-2:]]
        configuration |= {
            "batch_size": 3,
            "patch_size": [8, 32, 32][3 - axes :],
            "n_stages": 3,
            "features_per_stage": [4, 8, 8],
            "strides": [sides[3 - axes :] for sides in strides],
            "kernel_sizes": [sides[3 - axes :] for sides in kernels],
            "n_conv_per_stage": [2, 2, 2],
            "n_conv_per_stage_decoder": [2, 2],
        }
    (folder / "small.json").write_text(json.dumps(content))
    return folder / "small.json"


def options(phantoms, plan, folder, *extra, method="nnunet_2d_short"):
    return (
        "--exp=quickstart", f"--method={method}", f"--data.root={phantoms}", f"--model.plan={plan}",
        f"--run-dir={folder}", f"--cache-dir={folder.parent / 'cache'}", "--training.epochs=3", "--training.steps=5",
        *extra,
    )  # fmt: skip


@pytest.fixture(scope="module", params=["nnunet_2d_short", "nnunet_3d_short"])
def run(request, phantoms, plan, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    output = succeed(folder.parent, "jaxla.train", *options(phantoms, plan, folder, method=request.param))
    (folder.parent / "output").write_text(output)
    return folder


ONLY_2D = pytest.mark.parametrize("run", ["nnunet_2d_short"], indirect=True)


def test_run_folder_contains_the_usual_files_and_the_plan(run, plan):
    record = json.loads((run / "experiment.json").read_text())
    assert json.loads((run / "plan.json").read_text()) == json.loads(plan.read_text())
    summary = json.loads((run / "test" / "summary.json").read_text())
    assert summary["dice"]["unit"] == "volume"
    assert summary["best_epoch"] == 3  # the last epoch is kept
    with (run / "test" / "cases.csv").open() as file:
        assert len(list(csv.DictReader(file))) == summary["dice"]["n"] == 1
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in metrics] == [1, 2, 3]
    assert set(metrics[0]) == {
        "epoch", "train_loss", "val_loss", "val_dice", "val_iou", "seconds", "slices_per_second",
    }  # fmt: skip
    largest = json.loads((run / "validation" / "largest.json").read_text())
    assert largest["n"] == 1
    assert len(next(iter(largest["dice"].values()))["none"]) == 1
    page = (run / "report.html").read_text()
    assert "The last epoch, 3, was tested" in page
    assert "over all patches together" in page
    assert "All connected components are kept" in page or "Only the largest connected component" in page
    assert "pad_to" not in page  # options that do not apply are not listed
    assert record["experiment"]["training"]["optimiser"] == "sgd"
    output = (run.parent / "output").read_text()
    assert "3 per batch; 3 stages, 4 to 8 features" in output
    assert "val Dice" in output


def test_predict_and_load_network_read_the_run_folder(run, phantoms, tmp_path):
    scan = next(phantoms.rglob("train_2/enhanced.nii.gz"))
    mask = tmp_path / "mask.nii.gz"
    arguments = (f"--run={run}", f"--input={scan}", f"--output={mask}", "--probabilities")
    assert "LA " in succeed(tmp_path, "jaxla.predict", *arguments)
    image, mask = nib.load(scan), nib.load(tmp_path / "mask.nii.gz")
    assert mask.shape == image.shape
    np.testing.assert_array_equal(mask.affine, image.affine)
    probabilities = np.asarray(nib.load(tmp_path / "mask_probabilities.nii.gz").dataobj)
    assert probabilities.shape == image.shape
    assert 0 <= probabilities.min() <= probabilities.max() <= 1
    shape = (1, *((8, 32, 32) if "3d" in str(run) else (32, 32)), 1)
    images = jax.ShapeDtypeStruct(shape, np.float32)
    assert jax.eval_shape(jaxla.load_network(run), images).shape == shape
    if not load_run(run).largest:
        np.testing.assert_array_equal(np.asarray(mask.dataobj) > 0, probabilities > 0.5)


@ONLY_2D
def test_resume_before_the_test_gives_identical_results(run, phantoms, plan, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    shutil.copytree(run, folder)
    for name in ("report.html", "cost.json"):
        (folder / name).unlink()
    for name in ("test", "validation"):
        shutil.rmtree(folder / name)
    succeed(tmp_path, "jaxla.train", *options(phantoms, plan, folder, "--resume"))
    for name in ("test/cases.csv", "validation/largest.json", "plan.json"):
        assert (folder / name).read_text() == (run / name).read_text()


@ONLY_2D
def test_resume_with_another_plan_is_refused(run, phantoms, plan, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    shutil.copytree(run, folder)
    (folder / "report.html").unlink()
    content = json.loads((folder / "plan.json").read_text())
    for configuration in content["configurations"].values():
        if "spacing" in configuration:
            configuration["batch_size"] = 4
    (folder / "plan.json").write_text(json.dumps(content))
    done = run_in_this_process(tmp_path, "jaxla.train", *options(phantoms, plan, folder, "--resume"))
    assert done.returncode == 2
    assert "plan.json: differs from the plan that this command would use" in done.stderr


@ONLY_2D
def test_same_seed_gives_identical_results(run, phantoms, plan, tmp_path):
    shutil.copytree(run.parent / "cache", tmp_path / "cache")
    succeed(tmp_path, "jaxla.train", *options(phantoms, plan, tmp_path / "run"))
    assert (tmp_path / "run" / "test" / "cases.csv").read_bytes() == (run / "test" / "cases.csv").read_bytes()
    again, first = (
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in lines]
        for lines in ((folder / "metrics.jsonl").read_text().splitlines() for folder in (tmp_path / "run", run))
    )
    assert again == first


def test_dry_run_describes_the_run_and_writes_nothing(phantoms, plan, tmp_path):
    printed = succeed(tmp_path, "jaxla.train", *options(phantoms, plan, tmp_path / "run", "--dry-run"))
    assert "5 per epoch, 3 patches each, at most 3 epochs" in printed
    assert not (tmp_path / "run").exists()


@ONLY_2D
def test_five_equal_folds_predict_the_mask_of_a_single_run(run, phantoms, tmp_path):
    """The folds are copies of one run; tests/runs/test_cross_validation.py trains different ones."""
    folder, record = tmp_path / "run", json.loads((run / "experiment.json").read_text())
    for k in range(5):
        shutil.copytree(run, folder / f"fold_{k}")
    shutil.copytree(run / "validation", folder / "validation")
    shutil.copy(run / "plan.json", folder)
    record["experiment"]["fold"] = "all"
    (folder / "experiment.json").write_text(json.dumps(record))
    assert len(load_run(folder).networks) == 5
    scan = next(phantoms.rglob("train_2/enhanced.nii.gz"))
    for name in (folder, run):
        succeed(
            tmp_path,
            "jaxla.predict",
            f"--run={name}",
            f"--input={scan}",
            f"--output={tmp_path / name.parent.name}.nii.gz",
        )
    masks = [nib.load(tmp_path / f"{name.parent.name}.nii.gz").get_fdata() for name in (folder, run)]
    np.testing.assert_array_equal(*masks)
    assert masks[0].any()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("--preprocessing.image_size=64", "--preprocessing.image_size: method nnunet_2d_short has no such option"),
        ("--augmentation.flips=true", "--augmentation.flips: method nnunet_2d_short has no such option"),
        ("--training.steps=0", "--training.steps=0: less than 1"),
        ("--model.memory_gb=0", "--model.memory_gb=0.0: not a positive number"),
        ("--model.memory_gb=4", "--model.memory_gb: has no effect, because --model.plan is set"),
        ("--model.widths=[8,16]", "--model.widths: method nnunet_2d_short has no such option"),
        ("--model.plan=nothing.json", "nothing.json: cannot be read"),
        ("--fold=5", '"fold": Expected a typing.Literal'),
        ("--devices=0 --training.batch_size=-1", "--training.batch_size=-1: less than 0"),
    ],
)
def test_bad_options_are_refused_before_anything_is_written(phantoms, plan, tmp_path, extra, message):
    arguments = options(phantoms, plan, tmp_path / "run", *extra.split())
    assert message in refuse(tmp_path, "jaxla.train", *arguments)


def test_plans_that_do_not_fit_the_scans_or_the_method_are_refused(phantoms, plan, tmp_path):
    content = json.loads(plan.read_text())
    for configuration in content["configurations"].values():
        if "spacing" in configuration:
            sizes = configuration["median_image_size_in_voxels"]
            configuration["median_image_size_in_voxels"] = [3 * n for n in sizes]
    (tmp_path / "other.json").write_text(json.dumps(content))
    arguments = options(phantoms, tmp_path / "other.json", tmp_path / "run")
    assert "but the plan was made for" in refuse(tmp_path, "jaxla.train", *arguments)
    for method in ("unet", "vit_mini8"):
        line = refuse(
            tmp_path, "jaxla.train", "--exp=quickstart", f"--method={method}", f"--data.root={phantoms}",
            f"--cache-dir={tmp_path / 'cache'}", f"--model.plan={plan}",
        )  # fmt: skip
        assert f"--model.plan: method {method} has no such option" in line
    line = refuse(
        tmp_path,
        "jaxla.train",
        "--exp=quickstart",
        "--method=vit_mini8",
        f"--data.root={phantoms}",
        "--augmentation.nnunet=true",
    )
    assert "--augmentation.nnunet: method vit_mini8 has no such option" in line


def test_dry_run_refuses_patches_too_large_for_memory(phantoms, plan, tmp_path, monkeypatch):
    limit_memory(monkeypatch, 100_000)
    line = refuse(tmp_path, "jaxla.train", *options(phantoms, plan, tmp_path / "run", "--dry-run"))
    assert line.startswith("error: --training.batch_size=3: a training step needs ")
    assert line.endswith("Lower --model.memory_gb, or use a plan made for less memory.")


def test_all_patients_can_be_used_for_training(phantoms, plan, tmp_path):
    extra = ("--training.epochs=1", "--data.split=all", "--postprocessing.largest=always")
    printed = succeed(tmp_path, "jaxla.train", *options(phantoms, plan, tmp_path / "run", *extra))
    assert "patients: 6 training, 0 validation, 0 test" in printed
    (line,) = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    assert "val_dice" not in line
