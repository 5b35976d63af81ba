"""Small NIfTI files for tests: single volumes, broken ones, and whole folders of cases."""

import gzip
import json
import struct

import nibabel as nib
import numpy as np

SHAPE = (16, 14, 4)
AFFINE = np.array([[-0.75, 0, 0, 6], [0, -0.75, 0, 5], [0, 0, 2.5, -4], [0, 0, 0, 1]])  # exact in float32


def image_array(seed=0, shape=SHAPE, dtype=np.int16):
    """Return grey values 0..999, a different scan for every seed."""
    return np.random.default_rng(seed).integers(0, 1000, shape).astype(dtype)


def mask_array(shape=SHAPE, value=1):
    """Return a box of `value` on a background of 0."""
    mask = np.zeros(shape, np.int16 if value > 255 else np.uint8)
    mask[tuple(slice(n // 4, n // 2 + 1) for n in shape)] = value
    return mask


def image_with_voxel(value):
    """Return float32 grey values with one voxel replaced by `value`."""
    array = image_array().astype(np.float32)
    array[1, 2, 3] = value
    return array


def save(path, array, affine=AFFINE, image_class=nib.Nifti1Image):
    """Write an array as NIfTI, with its type and byte order; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    endianness = "<" if array.dtype.newbyteorder("<") == array.dtype else ">"
    header = image_class.header_class(endianness=endianness)
    header.set_data_dtype(array.dtype)
    nib.save(image_class(array, affine, header), path)
    return path


def save_image(path, image):
    """Write a nibabel image; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(image, path)
    return path


FIELDS = {  # field of a little-endian NIfTI-1 header -> byte offset and format, as in the standard
    "dim": (40, "<8h"),
    "datatype": (70, "<h"),
    "bitpix": (72, "<h"),
    "pixdim": (76, "<8f"),
    "vox_offset": (108, "<f"),
    "scl_slope": (112, "<f"),
    "scl_inter": (116, "<f"),
    "xyzt_units": (123, "b"),
    "qform_code": (252, "<h"),
    "sform_code": (254, "<h"),
    "quatern": (256, "<3f"),
    "qoffset": (268, "<3f"),
    "srow": (280, "<12f"),
    "magic": (344, "4s"),
}


def edit_header(path, **fields):
    """Overwrite fields of a NIfTI-1 header, byte by byte, with values that nibabel might refuse; return the path."""
    content = path.read_bytes()
    is_compressed = content.startswith(b"\x1f\x8b")
    content = bytearray(gzip.decompress(content) if is_compressed else content)
    for name, value in fields.items():
        offset, layout = FIELDS[name]
        struct.pack_into(layout, content, offset, *(value if isinstance(value, tuple) else (value,)))
    path.write_bytes(gzip.compress(content, mtime=0) if is_compressed else content)
    return path


def save_raw_spacing(path, spacing):
    """Write an uncompressed .nii with `spacing` in its header, which nibabel might refuse; return the path."""
    return edit_header(save(path, image_array()), pixdim=(1, *spacing, 1, 1, 1, 1))


def save_singular(path):
    """Write a file whose sform maps two axes to one direction; return the path."""
    affine = AFFINE.copy()
    affine[:, 1] = affine[:, 0]
    image = nib.Nifti1Image(image_array(), None)
    image.header.set_sform(affine, code=1)
    image.header.set_qform(None, code=0)
    image.header["pixdim"][1:4] = (0.75, 0.75, 2.5)
    return save_image(path, nib.Nifti1Image(image_array(), None, image.header))


def save_sheared(path):
    """Write a file whose first two axes are three degrees off a right angle; return the path."""
    affine = AFFINE.copy()
    affine[0, 1] = 0.05 * affine[1, 1]
    return save(path, image_array(), affine)


def truncate(path, fraction=0.5):
    """Keep the first part of a file; return the path."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * fraction)])
    return path


def write_lascarqs(root, count=6, value=255, first=1):
    """Write a LAScarQS tree of `count` cases; return the folder with train_1, train_2, …"""
    folder = root / "task2" / "train_data"
    for n in range(first, first + count):
        save(folder / f"train_{n}" / "enhanced.nii.gz", image_array(n))
        save(folder / f"train_{n}" / "atriumSegImgMO.nii.gz", mask_array(value=value))
    return folder


def write_decathlon(root, names, labels, suffix="", values=(1,)):
    """Write a data set with a dataset.json, whose masks contain all of `values`; return its folder."""
    for seed, name in enumerate(names):
        mask = mask_array(value=values[0])
        for i, value in enumerate(values[1:]):
            mask[i, 0, 0] = value
        save(root / "imagesTr" / f"{name}{suffix}.nii.gz", image_array(seed))
        save(root / "labelsTr" / f"{name}.nii.gz", mask)
    (root / "dataset.json").write_text(json.dumps({"labels": labels}))
    return root


def write_flat_pairs(root, count=5, value=1):
    """Write `count` flat pairs case_0.nii.gz + case_0_mask.nii.gz, …; return the folder."""
    for n in range(count):
        save(root / f"case_{n}.nii.gz", image_array(n))
        save(root / f"case_{n}_mask.nii.gz", mask_array(value=value))
    return root


def oblique_affine(spacing=(0.7, 0.8, 2.5)):
    """Return an affine with axes rotated by about 20 degrees around each world axis, so that none lies along one."""
    rotation = np.eye(3)
    for i, j in ((0, 1), (1, 2), (2, 0)):
        single = np.eye(3)
        single[[i, i, j, j], [i, j, i, j]] = np.cos(0.35), -np.sin(0.35), np.sin(0.35), np.cos(0.35)
        rotation = single @ rotation
    return nib.affines.from_matvec(rotation @ np.diag(spacing), (-40, 30, 7))
