"""Small scans in formats other than NIfTI, written by SimpleITK: NRRD, MetaImage and DICOM series."""

import locale
from contextlib import contextmanager

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from nibabel.eulerangles import euler2mat

from jaxla.config import InputError
from jaxla.data.volumes import read_image
from tests.data.nifti import AFFINE, save

ITK_NAMES = ("a.nrrd", "a.nhdr", "a.mha", "a.mhd")

OBLIQUE = np.eye(4)
OBLIQUE[:3, :3] = euler2mat(0.3, -0.2, 0.1) * (0.7, 0.8, 2.6)  # spacings that are not exact in binary
OBLIQUE[:3, 3] = (1.3, -2.7, 30.9)


def itk_image(array, affine=AFFINE):
    """Return an array [X, Y, Z] as a SimpleITK image; its axes point left, posterior and superior."""
    axes = np.diag([-1, -1, 1, 1]) @ affine
    spacing = np.linalg.norm(axes[:3, :3], axis=0)
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing(spacing.tolist())
    image.SetDirection((axes[:3, :3] / spacing).ravel().tolist())
    image.SetOrigin(axes[:3, 3].tolist())
    return image


def save_itk(path, array, affine=AFFINE, compressed=False):
    """Write an array in the format of the path's extension; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    sitk.WriteImage(itk_image(array, affine), str(path), compressed)
    return path


@contextmanager
def preserve_locale():
    """Restore the locale, which SimpleITK changes by writing DICOM, and with it the encoding of files opened later."""
    before = locale.setlocale(locale.LC_ALL)
    yield
    locale.setlocale(locale.LC_ALL, before)


def save_dicom(folder, array, affine=AFFINE, series="1", **tags):
    """Write an array as one DICOM file per slice, with file names in a different order; return the folder.

    Args:
        series: the last part of the series' UID.
        tags: additional values, such as `g0028_1053="2"` for the rescale slope.
    """
    folder.mkdir(parents=True, exist_ok=True)
    image = itk_image(array, affine)
    direction = np.reshape(image.GetDirection(), (3, 3))
    values = {
        "g0008_0060": "MR",
        "g0020_000d": "1.2.826.0.1.3680043.2.1125.1",
        "g0020_000e": f"1.2.826.0.1.3680043.2.1125.1.{series}",
        "g0008_103e": f"series {series}",
        "g0020_0052": "1.2.826.0.1.3680043.2.1125.2",  # the frame of reference
        "g0020_0037": "\\".join(f"{v:.12g}" for v in direction.T[:2].ravel()),
        **tags,
    }
    for k in range(array.shape[2]):
        slice_image = image[:, :, k]
        for name, value in values.items():
            slice_image.SetMetaData(name[1:].replace("_", "|"), value)
        position = image.TransformIndexToPhysicalPoint((0, 0, k))
        slice_image.SetMetaData("0020|0032", "\\".join(f"{v:.12g}" for v in position))
        slice_image.SetMetaData("0020|0013", str(k + 1))
        writer = sitk.ImageFileWriter()
        writer.KeepOriginalImageUIDOn()
        writer.SetImageIO("GDCMImageIO")
        writer.SetFileName(str(folder / f"s{series}_{k * 7 % 101:03d}.dcm"))
        with preserve_locale():
            writer.Execute(slice_image)
    return folder


def edit_dicom(folder, change, *positions):
    """Apply `change(dataset)` to all files, or to those at `positions` when sorted by name; return the folder."""
    files = sorted(folder.iterdir())
    for path in [files[i] for i in positions] if positions else files:
        dataset = pydicom.dcmread(path)
        change(dataset)
        dataset.save_as(path)
    return folder


def save_any(path, array, affine=AFFINE):
    """Write an array as NIfTI, NRRD, MetaImage, or, if the path has no extension, as DICOM; return the path."""
    if not path.suffix:
        return save_dicom(path, array, affine)
    return save(path, array, affine) if path.suffix in (".nii", ".gz") else save_itk(path, array, affine)


def refusal(path, read=read_image):
    """Return the one-line error with which a scan is refused."""
    with pytest.raises(InputError) as refused:
        read(path)
    text = str(refused.value)
    assert "\n" not in text
    return text
