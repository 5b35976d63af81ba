"""An end-to-end run on real scans with several classes."""

import json
import shutil
from pathlib import Path

import nibabel as nib
import numpy as np

from tests.commands import succeed
from tests.runs.folders import predict, read_json


def test_classes_of_dataset_json_and_reoriented_scans(hippocampus, tmp_path):
    """Fifteen real patients: masks use the data set's label values, and a reoriented scan gets the same mask."""
    run, data = tmp_path / "run", tmp_path / "data"
    content = json.loads((hippocampus / "dataset.json").read_text())
    for part in ("imagesTr", "labelsTr"):
        (data / part).mkdir(parents=True)
        for path in sorted((hippocampus / part).glob("*.nii.gz"))[:15]:
            shutil.copy(path, data / part)
    content["training"] = [
        files for files in content["training"] if (data / "imagesTr" / Path(files["image"]).name).exists()
    ]
    (data / "dataset.json").write_text(json.dumps(content | {"numTraining": 15}))
    succeed(
        tmp_path, "jaxla.train", "--exp=quickstart", "--method=vit_mini8", f"--data.root={data}", f"--run-dir={run}",
        f"--cache-dir={tmp_path / 'cache'}", "--data.train_patients=8", "--training.epochs=2",
        "--preprocessing.image_size=48", "--seed=1",
    )  # fmt: skip
    summary = read_json(run / "test" / "summary.json")
    assert set(summary["classes"]) == {"Anterior", "Posterior"}
    assert summary["dice"]["n"] == 3
    values = [np.unique(nib.load(path).get_fdata()) for path in (run / "test" / "predictions").iterdir()]
    assert set(np.concatenate(values)) <= {0, 1, 2}

    scan = nib.load(hippocampus / "imagesTr" / "hippocampus_064.nii.gz")
    turned = scan.as_reoriented(np.array([[2, -1], [0, 1], [1, -1]]))
    (tmp_path / "scans").mkdir()
    nib.save(scan, tmp_path / "scans" / "scan.nii.gz")
    nib.save(turned, tmp_path / "scans" / "turned.nii.gz")
    predict(run, tmp_path / "scans", tmp_path / "masks")
    mask, mask_of_turned = (
        nib.as_closest_canonical(nib.load(tmp_path / "masks" / name)) for name in ("scan.nii.gz", "turned.nii.gz")
    )
    assert mask.get_fdata().any()
    assert np.array_equal(mask.get_fdata(), mask_of_turned.get_fdata())
    np.testing.assert_allclose(mask.affine, mask_of_turned.affine, atol=1e-6)
