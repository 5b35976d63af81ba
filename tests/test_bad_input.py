"""The commands on bad input: exit code 2, one line that names the file or option, and nothing left behind."""

import pickle
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jaxla.experiments import EXPERIMENTS

from jaxla.config import Data
from jaxla.data.cases import find_cases
from jaxla.data.prepared import prepare_cases
from jaxla.data.split import make_split
from tests.commands import in_a_new_process, refuse, refuse_to_train
from tests.data.nifti import (
    broken_voxel,
    decathlon,
    flat,
    image_array,
    lascarqs,
    mask_array,
    save,
    save_raw_spacing,
    truncate,
)


def with_its_own_cache(folder, module, *options):
    """As a user runs it, but for the place of the cache."""
    return in_a_new_process(folder, module, *options, XDG_CACHE_HOME=str(folder / "cache"))


BAD_SCANS = {  # of every kind in tests/data/test_volumes.py a few, as the commands say them
    "4d.nii.gz": (lambda p: save(p, np.stack([image_array()] * 2, -1)), "4D"),
    "nan.nii.gz": (lambda p: save(p, broken_voxel(np.nan)), "NaN"),
    "constant.nii.gz": (lambda p: save(p, np.full_like(image_array(), 7)), "every voxel is 7"),
    "cut.nii.gz": (lambda p: truncate(save(p, image_array())), "truncated"),
    "text.nii": (lambda p: p.write_text("no scan " * 99), "not a NIfTI"),
    "zero_spacing.nii": (lambda p: save_raw_spacing(p, (0, 0.75, 2.5)), r"spacing \[0.0, 0.75, 2.5\]"),
}

# --- scans and masks that cannot be used -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", BAD_SCANS)
def test_training_refuses_a_scan_that_cannot_be_used(tmp_path, name):
    root = flat(tmp_path / "data")
    (root / "case_2.nii.gz").unlink()
    path = root / f"case_2.{name.split('.', 1)[1]}"
    make, message = BAD_SCANS[name]
    make(path)
    assert re.search(f"^error: {path}: .*{message}", refuse_to_train(tmp_path))


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (
            ["--model.windows=40"],
            r"data/\w+.nii.gz: has [45] slices, fewer than the 40 windows along them that --model.w",
        ),
        (
            ["--model.windows=1x1x9"],
            r"option --preprocessing.image_size=64: has 8 × 8 patches, fewer than the 1 × 9 win",
        ),
        (
            ["--model.windows=two"],
            r"option --model.windows=two: give how many windows there are along the slices, such",
        ),
        (
            ["--preprocessing.image_size=4"],
            r"option --preprocessing.image_size=4 must be a multiple of the patch size 8",
        ),
        (
            ["--data.other_labels=background"],
            r"option --data.other_labels=background: say by --data.labels which values",
        ),
        (
            ["--method=vit_mini8", "--training.gradient=two_pass"],
            r"option --training.gradient=two_pass is of networks in",
        ),
        (
            ["--method=vit_mini8", "--model.windows=2"],
            r"option --model.windows is not one of method vit_mini8; leave it",
        ),
    ],
)
def test_training_refuses_windows_that_do_not_fit(tmp_path, options, line):
    flat(tmp_path / "data")
    assert re.search(f"^error: .*{line}", refuse_to_train(tmp_path, "--method=windows_vit_mini8", *options))


def test_labels_that_are_no_class_are_refused_unless_the_experiment_says_that_they_are_background(tmp_path):
    """As of neonatal brains, whose masks hold many labels of which one is the structure."""
    root, many = flat(tmp_path / "data", 5), mask_array()
    many[-1, -1, -1] = 7
    save(root / "case_1_mask.nii.gz", many)
    named = ("--method=windows_vit_mini8", "--data.labels=hippocampus:1")
    assert re.search(r"label values 7 are not among the classes \(hippocampus: 1\)", refuse_to_train(tmp_path, *named))
    protocol = replace(EXPERIMENTS["paper3_albert"].data, labels="hippocampus:1")
    volumes = prepare_cases(find_cases(root, protocol.all_labels), tmp_path / "of albert")
    assert {v.class_voxels[1] for v in volumes} == {int((mask_array() == 1).sum())}


@pytest.mark.parametrize("name", BAD_SCANS)
def test_prediction_refuses_a_scan_that_cannot_be_used(tmp_path, run_folder, name):
    make, message = BAD_SCANS[name]
    save(tmp_path / "scans" / "a_good_one.nii.gz", image_array())
    make(tmp_path / "scans" / name)
    run = shutil.copytree(run_folder, tmp_path / "run")
    line = refuse(tmp_path, "jaxla.predict", f"--run={run}", "--input=scans", "--output=masks")
    assert re.search(f"^error: scans/{name}: .*{message}", line)


def another_shape(root):
    return save(root / "case_2_mask.nii.gz", mask_array(shape=(16, 14, 5)))


def another_affine(root):
    return save(root / "case_2_mask.nii.gz", mask_array(), np.diag([-1, -1, 2.5, 1]))


def no_mask(root):
    (root / "case_2_mask.nii.gz").unlink()
    return root / "case_2.nii.gz"


def no_image(root):
    (root / "case_2.nii.gz").unlink()
    return root / "case_2_mask.nii.gz"


def halves(root):
    return save(root / "case_2_mask.nii.gz", mask_array().astype(np.float32) / 2)


def cut_mask(root):
    (root / "case_2_mask.nii.gz").unlink()
    return truncate(save(root / "case_2_mask.nii", mask_array()))


def twin(root):
    return Path(shutil.copy(root / "case_0.nii.gz", root / "case_2.nii.gz"))


def beyond(root):
    return save(root / "case_2_mask.nii.gz", mask_array(value=3))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (no_mask, "has no mask"),
        (no_image, "has no image"),
        (another_shape, r"not on the grid of .*case_2.nii.gz \(shape \(16, 14, 5\) instead of \(16, 14, 4\)\)"),
        (another_affine, r"not on the grid of .*case_2.nii.gz \(same shape, different affine\)"),
        (halves, "values that are not labels"),
        (cut_mask, "truncated"),
        (beyond, r"label values 3 are not among the classes \(LA: 1\)"),
        (twin, "the same image as case case_0"),
    ],
)
def test_training_refuses_cases_that_do_not_fit_together(tmp_path, spoil, message):
    path = spoil(flat(tmp_path / "data"))
    line = refuse_to_train(tmp_path, "--data.labels=LA:1")
    assert re.search(f"^error: {path}: .*{message}", line)


def test_training_refuses_a_value_beyond_the_classes_of_dataset_json(tmp_path):
    names = [f"a_{n}" for n in range(5)]
    decathlon(tmp_path / "data", names, {"background": 0, "LA": 1}, "_0000", values=(1, 2))
    line = refuse_to_train(tmp_path)
    assert re.search(rf"^error: {tmp_path}/data/labelsTr/a_0.nii.gz: label values 2 are not .* \(LA: 1\)", line)


def test_training_refuses_masks_that_are_all_empty(tmp_path):
    lascarqs(tmp_path / "data", 5, value=0)
    line = refuse_to_train(tmp_path)
    assert re.search(f"^error: {tmp_path}/data: none of the 3 training cases contains LA", line)


def test_training_refuses_few_patients_without_a_class_that_others_have(tmp_path):
    folder = lascarqs(tmp_path / "data", 8)
    (first,) = make_split([path.name for path in folder.iterdir()], Data(train_patients=1)).train
    save(folder / first / "atriumSegImgMO.nii.gz", mask_array(value=0))
    line = refuse_to_train(tmp_path, "--data.train_patients=1")
    assert re.search(
        rf"^error: --data.subset_seed=0: no training case contains LA among the 1 that this protocol uses \({first}\)\."
        " Use another seed, or more training patients",
        line,
    )


@pytest.mark.parametrize("fold", ["all", "2"])
def test_training_refuses_folds_of_which_one_trains_without_a_class(tmp_path, fold):
    """Before the first of them begins: only the patients that validate in fold 2 have the class."""
    folder = flat(tmp_path / "data", 12)
    names = [path.name.removesuffix(".nii.gz") for path in folder.glob("*.nii.gz") if "mask" not in path.name]
    for name in make_split(names, Data(), "2").val:
        mask = mask_array()
        mask[0, 0, 0] = 2
        save(folder / f"{name}_mask.nii.gz", mask)
    line = refuse_to_train(tmp_path, "--data.labels=LA:1;scar:2", f"--fold={fold}")
    assert re.search(
        "^error: fold 2: no training case contains scar; every case with scar is in the validation set. "
        "Use another --fold.$",
        line,
    )


@pytest.mark.parametrize("module", ["jaxla.train", "jaxla.predict"])
def test_a_folder_without_any_case_is_named(tmp_path, module):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").write_text("no scans")
    if module == "jaxla.train":
        line = refuse_to_train(tmp_path)
        for layout in (f"{tmp_path / 'data'}: no case found", "LAScarQS", "dataset.json", "flat pairs"):
            assert layout in line
    else:
        line = refuse(tmp_path, module, "--run=run", "--input=data", "--output=masks")
        assert "--input=data: no .nii or .nii.gz file" in line


def test_fewer_patients_than_the_protocol_needs_are_counted(tmp_path):
    flat(tmp_path / "data", 5)
    line = refuse_to_train(tmp_path, "--exp=fewshot_10patients", "--method=vit_mini8")
    assert "--data.train_patients=10: there are only 3 training patients (of 5 cases" in line
    for n in (2, 3, 4):
        for path in (tmp_path / "data").glob(f"case_{n}*"):
            path.unlink()
    assert "2 patients, but training, validation and test need at least 3" in refuse_to_train(tmp_path)


def test_a_batch_that_the_memory_does_not_hold_names_the_option_and_leaves_no_run(tmp_path):
    flat(tmp_path / "data", 5)
    options = ("--model.widths=[8,8]", "--preprocessing.image_size=160", "--training.batch_size=9999")
    line = refuse_to_train(tmp_path, "--method=unet", *options)
    problem = r"^error: --training.batch_size=9999: a training step needs \S+, but the device has \S+\. Start a new"
    assert re.search(problem, line)
    for beyond in ("--preprocessing.image_size=99999", "--training.batch_size=999999999"):  # not even the images fit
        line = refuse_to_train(tmp_path, "--method=unet", "--model.widths=[8,8]", beyond)
        assert re.search(r"^error: --training.batch_size=\d+: a training step needs .*, but the device has", line)


# --- options ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exp=quickstrat"], "experiment 'quickstrat' is unknown; did you mean quickstart?"),
        (["--exp=nothing_like_it"], "experiment 'nothing_like_it' is unknown. Known: quickstart, "),
        (["--method=dinov2_vitb"], "method 'dinov2_vitb' is unknown; did you mean dinov2_vitb14?"),
        (["--training.epoch=3"], "option --training.epoch is unknown; did you mean --training.epochs?"),
        (["--data.rot=x"], "option --data.rot is unknown; did you mean --data.root?"),
        (["--no-such-thing"], "option --no-such-thing is unknown"),
        (["stray"], "'stray' is no option"),
        (["--training.epochs=many"], "option --training.epochs expects int"),
        (["--training.epochs"], "--training.epochs"),
        (["--training.epochs=0"], "option --training.epochs must be at least 1, got 0"),
        (["--training.batch_size=-1"], "option --training.batch_size must be at least 1"),
        (["--training.learning_rate=nan"], "option --training.learning_rate"),
        (["--model.decoder=lineal"], "option --model.decoder expects"),
        (["--model.decoder_widths=[]"], "option --model.decoder_widths"),
        (["--model.arch=vit_mini9"], "did you mean vit_mini8?"),
        (["--preprocessing.image_size=97"], "option --preprocessing.image_size=97 must be a multiple of .* 8, .* 96"),
        (["--data.labels=LA"], "--data.labels='LA': expected name:value"),
        (["--data.split=nowhere.json"], "--data.split=nowhere.json: cannot be read"),
        (["--data.train_patients=-1"], "--data.train_patients=-1"),
        (["--data.split_seed=-1"], "--data.split_seed"),
        (["--seed=-1"], "--seed"),
        (["--data.root=nowhere"], "--data.root=nowhere: no such folder"),
        (["--cache-dir=data/case_0.nii.gz/below"], "--cache-dir=data/case_0.nii.gz/below: cannot be written"),
        (["--run-dir=data/case_0.nii.gz"], "--run-dir=data/case_0.nii.gz: cannot be written"),
        (["--run-dir=data/case_0.nii.gz/below"], "--run-dir=data/case_0.nii.gz/below: cannot be written"),
        (["--run-dir=data"], "--run-dir=data: is not empty"),
        (["--method=unet", "--model.weights=x.safetensors"], "x.safetensors: unet has no pretrained weights; leave it"),
        (["--method=unet", "--model.decoder=linear"], "option --model.decoder is not one of method unet; leave it out"),
        (["--method=unet", "--model.backbone=frozen"], "option --model.backbone is not one of method unet"),
        (["--method=unet", "--training.backbone_learning_rate=1"], "backbone_learning_rate is that of a pretrained"),
        (
            ["--method=resnet50_unet", "--model.weights=random", "--model.decoder_widths=[8,8]"],
            "resnet50 has 5 stages;",
        ),
        (["--model.network=unet"], "option --model.network is the own of method vit_mini8; leave it out"),
        (["--method=segnet", "--model.widths=[8,8]"], "option --model.widths is not one of method segnet"),
        (
            ["--method=unet", "--model.arch=resnet50"],
            "resnet50 is no U-Net, on which method unet is built. Known: ",
        ),
        (["--method=unet", "--preprocessing.image_size=15"], "=15: unet needs at least 16 pixels, one of its smallest"),
        (["--method=segnet", "--preprocessing.image_size=31"], "vgg16_bn needs at least 32 pixels"),
        (["--method=unet", "--postprocessing.opening=2"], "option --postprocessing.opening must be odd, or 0"),
        (["--augmentation.rotation=-1"], "option --augmentation.rotation must be at least 0, got -1"),
        (["--augmentation.scale=nan"], "option --augmentation.scale expects float, got 'nan'"),
        (
            ["--method=resnet50_unet"],
            "weights of resnet50 not found.* --arch=resnet50 --download",
        ),
        (
            ["--method=segnet"],
            "weights of vgg16_bn not found.* --arch=vgg16_bn --download",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else None,
)
def test_training_names_the_option_that_is_wrong(tmp_path, options, message):
    flat(tmp_path / "data", 5)
    pattern = message if ".*" in message else re.escape(message)
    assert re.search(f"^error: .*{pattern}", refuse_to_train(tmp_path, *options))


def test_training_needs_an_experiment_and_data(tmp_path):
    line = refuse(tmp_path, "jaxla.train", "--data.root=data")
    assert "option --exp is required" in line
    assert "fewshot_10patients" in line
    line = refuse(tmp_path, "jaxla.train", "--exp=paper1")
    for text in ("option --data.root is required", "LAScarQS", "flat pairs", "by registration", "--data.root=phantom"):
        assert text in line


def test_a_folder_that_already_holds_a_run_is_not_written_into(tmp_path, run_folder):
    flat(tmp_path / "data", 5)
    shutil.copytree(run_folder, tmp_path / "run")
    assert f"--run-dir={tmp_path / 'run'}: already holds a run" in refuse_to_train(tmp_path)


# --- weights ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parameters():
    """Name -> zeros, of a vit_mini8 backbone."""
    from flax import nnx

    from jaxla.models.backbones import build_backbone
    from jaxla.models.weights import parameter_shapes

    network = nnx.eval_shape(lambda: build_backbone("vit_mini8", rngs=nnx.Rngs(0)))
    return {name: np.zeros(shape, np.float32) for name, shape in parameter_shapes(network).items()}


def write_weights(path, parameters, arch="vit_mini8", **metadata):
    from jaxla.models.weights_format import save_weights

    save_weights(path, parameters, {"arch": arch, "source": "a test", "licence": "", **metadata})
    return path


def without(parameters, name):
    return {key: value for key, value in parameters.items() if key != name}


class MakesAFile:
    """A pickle that, were it read, would make a file."""

    def __reduce__(self):
        return (open, ("executed", "w"))


BAD_WEIGHTS = {  # of those in tests/models/test_weights.py a few, as the command says them
    "another architecture": (
        lambda p, w: write_weights(p, w, "dinov2_vits14"),
        "contains dinov2_vits14, not vit_mini8",
    ),
    "truncated": (lambda p, w: truncate(write_weights(p, w)), "truncated"),
    "a pickle": (lambda p, w: p.write_bytes(pickle.dumps(MakesAFile())), "not written by convert_weights"),
    "a parameter too few": (lambda p, w: write_weights(p, without(w, "cls_token")), "lacks 1 parameter .*cls_token"),
}


@pytest.mark.parametrize("kind", BAD_WEIGHTS)
def test_training_refuses_weights_that_do_not_fit(tmp_path, parameters, kind):
    flat(tmp_path / "data", 5)
    path = tmp_path / "backbone.safetensors"
    make, message = BAD_WEIGHTS[kind]
    make(path, parameters)
    assert re.search(f"^error: {path}: .*{message}", refuse_to_train(tmp_path, f"--model.weights={path}"))


@pytest.mark.parametrize("given", [False, True], ids=["default place", "named file"])
def test_missing_weights_name_where_they_were_looked_for_and_how_to_make_them(tmp_path, given):
    flat(tmp_path / "data", 5)
    path = tmp_path / ("mine.safetensors" if given else "cache/weights/dinov2_vitb14.safetensors")
    line = refuse_to_train(tmp_path, "--exp=paper1", *([f"--model.weights={path}"] if given else []))
    assert f"{path}: weights of dinov2_vitb14 not found. " in line
    assert "python -m convert_weights --arch=dinov2_vitb14 --download --output=" in line
    assert "--model.weights=random" in line


def test_conversion_never_executes_what_a_pth_holds(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps(MakesAFile()))
    options = ("--arch=dinov2_vits14", "--source=evil.pth", "--output=new.safetensors")
    assert "evil.pth" in refuse(tmp_path, "convert_weights", *options, run=with_its_own_cache)


# --- prediction ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run that stopped before its first checkpoint."""
    from jaxla.experiments import EXPERIMENTS

    from jaxla.data.labels import Labels
    from jaxla.runs.record import Record, write_record

    folder = tmp_path_factory.mktemp("run")
    unknown = dict.fromkeys(("weights_sha256", "split_sha256", "data_sha256", "command", "begun"), "")
    write_record(
        folder,
        Record(
            EXPERIMENTS["quickstart"],
            Labels(("LA",)),
            "random",
            environment={"device": "cpu: cpu", "versions": {}},
            **unknown,
        ),
    )
    return folder


@pytest.fixture
def scan_and_run(tmp_path, run_folder):
    """A folder that holds `scan.nii.gz` and `run`."""
    save(tmp_path / "scan.nii.gz", image_array())
    shutil.copytree(run_folder, tmp_path / "run")
    return tmp_path


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--run=nowhere"], "nowhere: not a run folder"),
        (["--run=scan.nii.gz"], "scan.nii.gz: not a run folder"),
        (["--run=run"], "run.*: has no checkpoint"),
        (["--input=nowhere.nii.gz"], "--input=nowhere.nii.gz: no such file or folder"),
        (["--output=scan.nii.gz"], "scan.nii.gz: exists already"),
        (["--output=scan.nii.gz/below"], "scan.nii.gz/below.*: cannot be written"),
        (["--input=.", "--output=mask.nii.gz"], "--output=mask.nii.gz: a file, but --input=. is a folder"),
        (["--probability"], "did you mean --probabilities"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_prediction_names_what_is_wrong(scan_and_run, options, message):
    """A later option of the same name wins."""
    defaults = ("--run=run", "--input=scan.nii.gz", "--output=mask.nii.gz")
    assert re.search(f"^error: .*{message}", refuse(scan_and_run, "jaxla.predict", *defaults, *options))


@pytest.mark.parametrize("missing", ["run", "input", "output"])
def test_prediction_names_the_option_that_is_missing(scan_and_run, missing):
    given = {"run": "run", "input": "scan.nii.gz", "output": "mask.nii.gz"}
    options = [f"--{option}={value}" for option, value in given.items() if option != missing]
    assert re.search(rf"^error: .*\b{missing}\b", refuse(scan_and_run, "jaxla.predict", *options))


def test_a_damaged_record_of_a_run_is_named(scan_and_run):
    (scan_and_run / "run" / "experiment.json").write_text('{"version": 4}')
    options = ("--run=run", "--input=scan.nii.gz", "--output=mask.nii.gz")
    assert "run/experiment.json: damaged" in refuse(scan_and_run, "jaxla.predict", *options)


# --- as a user runs them ---------------------------------------------------------------------------------------------


def case_2_is(name):
    """A function that puts a bad scan in the place of case_2."""

    def make(root):
        (root / "case_2.nii.gz").unlink()
        BAD_SCANS[name][0](root / f"case_2.{name.split('.', 1)[1]}")

    return make


@pytest.mark.parametrize(
    ("spoil", "options", "message"),
    [
        (case_2_is("nan.nii.gz"), [], "data/case_2.nii.gz: 1 of 896 voxels are NaN or infinite"),
        (flat, ["--training.epoch=3"], "option --training.epoch is unknown"),
    ],
)
def test_a_user_who_trains_sees_one_line(tmp_path, spoil, options, message):
    spoil(flat(tmp_path / "data"))
    assert message in refuse_to_train(tmp_path, *options, run=with_its_own_cache)


def test_a_user_who_predicts_sees_one_line(scan_and_run):
    truncate(save(scan_and_run / "cut.nii", image_array()))
    options = ("--run=run", "--input=cut.nii", "--output=mask.nii.gz")
    assert "cut.nii: truncated or damaged" in refuse(scan_and_run, "jaxla.predict", *options, run=with_its_own_cache)
