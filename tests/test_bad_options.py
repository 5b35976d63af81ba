"""Training refuses options that cannot work with exit code 2 and one line that names the option."""

import re

import pytest

from tests.commands import refuse, refuse_to_train
from tests.data.nifti import write_flat_pairs


@pytest.mark.quick
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--exp=quickstrat"], "--exp=quickstrat: unknown name (did you mean quickstart?). Known: quickstart, "),
        (["--exp=nothing_like_it"], "--exp=nothing_like_it: unknown name. Known: quickstart, "),
        (["--method=dinov2_vitb"], "--method=dinov2_vitb: unknown name (did you mean dinov2_vitb14?)"),
        (["--method=dinov3_vitb16"], "--method=dinov3_vitb16: names a backbone, not a method. Use --model.arch="),
        (["--training.epoch=3"], "--training.epoch: unknown option (did you mean --training.epochs?)"),
        (["--training.lr=3"], "--training.lr: unknown option (did you mean --training.learning_rate?)"),
        (["--epochs=3"], "--epochs: unknown option (did you mean --training.epochs?)"),
        (["--data.rot=x"], "--data.rot: unknown option (did you mean --data.root?)"),
        (["--no-such-thing"], "--no-such-thing: unknown option. See --help"),
        (["stray"], "command line: unexpected argument 'stray'. Write options as --name=value."),
        (["data.root=scans"], "command line: unexpected argument 'data.root=scans'. Did you mean --data.root=scans?"),
        (["--training.epochs=many"], "command line: .*training.epochs"),
        (["--training.epochs"], "command line: .*training.epochs"),
        (["--training.epochs=0"], "--training.epochs=0: less than 1"),
        (["--training.batch_size=-1"], "--training.batch_size=-1: less than 1"),
        (["--training.learning_rate=nan"], ".*training.learning_rate"),
        (["--model.decoder=lineal"], "command line: .*model.decoder"),
        (["--model.decoder_widths=[]"], "--model.decoder_widths=[]: expected one or more positive widths"),
        (["--model.arch=vit_mini9"], "--model.arch=vit_mini9: unknown name (did you mean vit_mini8?)"),
        (
            ["--preprocessing.image_size=97"],
            "--preprocessing.image_size=97: not a multiple of the patch size 8 of vit_mini8. Use 96",
        ),
        (
            ["--preprocessing.patch_size=104"],
            "--preprocessing.patch_size=104: larger than --preprocessing.image_size=96. Use smaller patches, or 0 for "
            "whole slices.",
        ),
        (["--preprocessing.patch_size=-8"], "--preprocessing.patch_size=-8: less than 0"),
        (
            ["--preprocessing.patch_size=50", "--preprocessing.image_size=97"],
            "--preprocessing.patch_size=50: not a multiple of the patch size 8 of vit_mini8. Use 48",
        ),
        (["--method=unet", "--preprocessing.patch_size=15"], "--preprocessing.patch_size=15: unet needs at least 16"),
        (
            ["--method=windows_vit_mini8", "--preprocessing.patch_size=48"],
            "--preprocessing.patch_size=48: has no effect, because windows_vit_mini8 does not train on single slices. "
            "Remove the option.",
        ),
        (
            ["--method=nnunet_2d", "--preprocessing.patch_size=48"],
            "--preprocessing.patch_size: method nnunet_2d has no",
        ),
        (["--data.labels=LA"], "--data.labels='LA': expected name:value"),
        (
            ["--data.split=all"],
            "--data.split=all: leaves no validation cases, which vit_mini8 needs for --training.checkpoint and "
            "--training.patience. Use --training.checkpoint=last --training.patience=0, or another split.",
        ),
        (
            ["--method=nnunet_2d", "--data.validation=never"],
            "--data.validation=never: leaves no validation cases, which nnunet_2d needs for --postprocessing.largest. "
            "Use --postprocessing.largest=always, or another split.",
        ),
        (
            ["--data.split=all", "--data.validation=always"],
            "--data.validation=always: has no effect, because --data.split sets the validation patients. Remove one",
        ),
        (
            ["--data.split=split.json", "--data.split_seed=1"],
            "--data.split_seed=1: has no effect, because --data.split sets the patients of each part. Remove one of",
        ),
        (
            ["--data.phantom_size=crop"],
            "--data.phantom_size=crop: has no effect, because --data.root is a folder of scans. Remove one of the two.",
        ),
        (["--data.split=nowhere.json"], "--data.split=nowhere.json: cannot be read (No such file"),
        (["--data.train_patients=-1"], "--data.train_patients=-1: "),
        (["--data.split_seed=-1"], "--data.split_seed=-1: "),
        (["--seed=-1"], "--seed=-1: less than 0"),
        (["--data.root=nowhere"], "--data.root=nowhere: no such folder"),
        (
            ["--cache-dir=data/case_0.nii.gz/sub"],
            "--cache-dir=data/case_0.nii.gz/sub: .*/case_0.nii.gz is not a writable fol",
        ),
        (["--run-dir=data/case_0.nii.gz"], "--run-dir=data/case_0.nii.gz: data/case_0.nii.gz is not a writable folder"),
        (
            ["--run-dir=data/case_0.nii.gz/sub"],
            "--run-dir=data/case_0.nii.gz/sub: .*/case_0.nii.gz is not a writable folder",
        ),
        (["--run-dir=data"], "--run-dir=data: not empty. Use another folder."),
        (["--model.network=unet"], "--model.network: fixed by --method=vit_mini8. Remove the option."),
        (["--model.blocks=[0]"], "--model.blocks: method vit_mini8 has no such option; fusion_vitb14, "),
        (["--method=unet", "--model.blocks=[0]"], "--model.blocks: method unet has no such option; fusion_vitb14, "),
        (["--method=unet", "--model.network=x"], "--model.network: fixed by --method=unet. Remove the option."),
        (["--method=unet", "--model.weights=x.safetensors"], "--model.weights: method unet has no such option; "),
        (["--method=unet", "--model.decoder=linear"], "--model.decoder: method unet has no such option; "),
        (["--method=unet", "--model.backbone=frozen"], "--model.backbone: method unet has no such option; "),
        (
            ["--method=unet", "--training.backbone_learning_rate=1"],
            "--training.backbone_learning_rate: method unet has",
        ),
        (["--method=nnunet_3d", "--preprocessing.image_size=9"], "--preprocessing.image_size: method nnunet_3d has no"),
        (
            ["--training.backbone_learning_rate=1"],
            "--training.backbone_learning_rate: has no effect, because vit_mini8",
        ),
        (
            ["--method=resnet50_unet", "--model.weights=random", "--model.decoder_widths=[8,8]"],
            "--model.decoder_widths=[8, 8]: 2 widths, but the network needs 5. Set 5 widths, one for each decoder",
        ),
        (
            ["--method=segnet", "--model.widths=[8,8]"],
            "--model.widths: method segnet has no such option; it belongs to",
        ),
        (["--method=unet", "--model.arch=resnet50"], "--model.arch: method unet has no such option; "),
        (["--method=resnet50_unet", "--model.arch=vit_mini8"], "--model.arch=vit_mini8: not a ResNet, which this netw"),
        (["--method=unet", "--preprocessing.image_size=15"], "--preprocessing.image_size=15: unet needs at least 16"),
        (
            ["--method=segnet", "--preprocessing.image_size=31"],
            "--preprocessing.image_size=31: vgg16_bn needs at least",
        ),
        (["--method=unet", "--postprocessing.opening=2"], "--postprocessing.opening=2: must be odd. Use an odd"),
        (["--augmentation.rotation=-1"], "--augmentation.rotation=-1.0: less than 0"),
        (["--augmentation.scale=nan"], ".*augmentation.scale"),
        (["--method=resnet50_unet"], ".*weights of resnet50 not found. .* --arch=resnet50 --download"),
        (["--method=segnet"], ".*weights of vgg16_bn not found. .* --arch=vgg16_bn --download"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_training_names_the_option_at_fault(tmp_path, options, message):
    write_flat_pairs(tmp_path / "data", 5)
    pattern = ".*".join(map(re.escape, message.split(".*")))
    assert re.search(f"^error: {pattern}", refuse_to_train(tmp_path, *options))


def test_training_needs_an_experiment_and_data(tmp_path):
    line = refuse(tmp_path, "jaxla.train", "--data.root=data")
    assert line.startswith("error: --exp: missing. Use one of ")
    assert "fewshot_10patients" in line
    line = refuse(tmp_path, "jaxla.train", "--exp=paper1")
    for text in ("error: --data.root: missing. ", "flat pairs", "Register for LAScarQS", "--data.root=phantom"):
        assert text in line
