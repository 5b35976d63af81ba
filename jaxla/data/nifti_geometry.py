"""The grid of a NIfTI file in millimetres, chosen from the geometries in its header.

A header may hold an affine (sform), a rotation with the voxel sizes of pixdim (qform), or pixdim alone. docs/data.md
shows the rule as a table.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np

from jaxla.config import InputError

MAX_CODE = 5  # largest code of sform and qform in the NIfTI standard
UNITS_MM = {1: 1000.0, 3: 0.001}  # metres and micrometres, by code of xyzt_units; all other units are read as mm
UNIT_NAMES = {1: "metres", 3: "micrometres"}
MAX_LENGTH_DIFFERENCE = 0.01  # relative difference between voxel sizes that count as equal
MAX_ANGLE = 1.0  # degrees between axes that count as equal
MAX_SKEW = 0.01  # cosine of the angle between two axes; rounding in a header causes far less
MAX_QUATERNION_EXCESS = 1e-3  # length above 1 of a unit quaternion, from rounding
MIN_VOXEL_MM, MAX_VOXEL_MM, MAX_EXTENT_MM = 1e-3, 100, 10_000  # beyond these the header is wrong
MIN_USUAL_VOXEL_MM, MAX_USUAL_VOXEL_MM, MAX_USUAL_EXTENT_MM = 0.01, 20, 2500  # beyond these it may be wrong
LIMIT_ROUNDING = 1e-3  # relative tolerance of the limits on voxel sizes

CORRECT = "Correct the header, or export the file again."


class Grid(NamedTuple):
    """The positions of a scan's voxels."""

    affine: np.ndarray  # [4, 4], voxel indices to mm (RAS+)
    header: nib.Nifti1Header  # as stored, so that a mask with this header lies exactly on its scan in any viewer
    warnings: tuple[str, ...] = ()  # unusual entries of the header, which the user should check


class _Form(NamedTuple):
    name: str
    affine: np.ndarray  # [4, 4], in the header's units
    fault: str = ""  # why it cannot be used

    @property
    def spacing(self) -> np.ndarray:
        return nib.affines.voxel_sizes(self.affine)

    @property
    def directions(self) -> np.ndarray:
        return self.affine[:3, :3] / self.spacing


@np.errstate(all="ignore")  # NaN and infinite values raise an InputError below
def find_grid(path: Path, stored: nib.Nifti1Header, shape: tuple[int, int, int]) -> Grid:
    """Return the grid of the file `path` with this header, in mm.

    Args:
        stored: the header as it is in the file.
        shape: X, Y, Z.

    Raises:
        InputError: no geometry in the header can be used, or it is not clear which one is right.
    """
    for key in ("sform_code", "qform_code"):
        if not 0 <= stored[key] <= MAX_CODE:
            raise InputError(path, f"{key} is {stored[key]}, but codes are 0 to {MAX_CODE}", CORRECT)
    pixdim = stored["pixdim"][1:4].astype(float)
    if not (np.isfinite(pixdim).all() and (pixdim != 0).all()):
        raise InputError(path, f"invalid voxel spacing {pixdim.tolist()} in the header", "Set the true spacing in mm.")
    if stored["qform_code"] and (qfac := stored["pixdim"][0]) not in (-1, 0, 1):
        raise InputError(path, f"qfac (pixdim[0]) is {qfac:g}, but the sign of qform's third axis is 1 or -1", CORRECT)
    warnings = []
    if (pixdim < 0).any():
        warnings.append(f"pixdim has negative voxel sizes ({_sides(pixdim)}); using their absolute values")
    if (unit := int(stored["xyzt_units"]) & 7) > 3:  # the other bits are the unit of time
        warnings.append(f"the code {unit} of its length unit is not defined; reading lengths as mm")

    header = stored.copy()
    form, form_warnings = _choose_form(path, header)
    affine = form.affine.copy()
    affine[:3] *= UNITS_MM.get(unit, 1.0)
    warnings += [*form_warnings, *_check_sizes(path, nib.affines.voxel_sizes(affine), shape, unit)]
    return Grid(affine, header, tuple(warnings))


def _choose_form(path: Path, header: nib.Nifti1Header) -> tuple[_Form, list[str]]:
    """Return the form to use, in the header's units, and warnings."""
    pixdim = np.abs(header["pixdim"][1:4].astype(float))
    forms = []
    if header["sform_code"]:
        forms.append(_check_form("sform", header.get_sform()))
    if header["qform_code"]:
        forms.append(_read_qform(header))
    if not forms:
        warning = "no orientation is recorded (the codes of sform and qform are 0); assuming the axes left, anterior, "
        return _Form("pixdim", _repaired(header).get_base_affine()), [f"{warning}superior"]

    usable = [form for form in forms if not form.fault]
    if not usable:
        raise InputError(path, " and ".join(form.fault for form in forms), CORRECT)
    warnings = [f"{form.fault}; using {usable[0].name}" for form in forms if form.fault]
    if len(usable) == 2:
        sform, qform = usable
        if not _same_lengths(sform.spacing, qform.spacing):
            sizes = f"voxels of {_sides(sform.spacing)} and {_sides(qform.spacing)}"
            return qform, [f"sform and qform disagree ({sizes}); using qform, which agrees with pixdim"]
        if (angle := _angle(sform, qform)) > MAX_ANGLE:
            _require_same_directions(path, sform, qform)
            warnings.append(f"sform and qform are rotated by {angle:.1f}° relative to each other; using sform")
        return sform, warnings
    (form,) = usable
    if not _same_lengths(form.spacing, pixdim):
        problem = f"sform has voxels of {_sides(form.spacing)}, but pixdim of {_sides(pixdim)}"
        raise InputError(path, f"{problem}, and there is no qform to decide between them", CORRECT)
    return form, warnings


def _read_qform(header: nib.Nifti1Header) -> _Form:
    """Return the qform; shorten a quaternion in `header` that rounding made too long, because nibabel refuses it."""
    keys = ("quatern_b", "quatern_c", "quatern_d")
    quaternion = np.array([header[key] for key in keys])
    if not np.isfinite([*quaternion, *(header[f"qoffset_{axis}"] for axis in "xyz")]).all():
        return _Form("qform", np.eye(4), "qform holds values that are not finite")
    length = float(np.linalg.norm(quaternion.astype(float)))
    if length > 1 + MAX_QUATERNION_EXCESS:
        return _Form("qform", np.eye(4), f"the quaternion of qform has length {length:.4g} instead of at most 1")
    if length**2 - 1 > header.quaternion_threshold:
        for key, value in zip(keys, quaternion / (length * (1 + np.finfo(quaternion.dtype).eps)), strict=True):
            header[key] = value
    return _check_form("qform", _repaired(header).get_qform())


def _repaired(header: nib.Nifti1Header) -> nib.Nifti1Header:
    """Return a copy with the signs of pixdim that nibabel requires."""
    repaired = header.copy()
    repaired.check_fix(error_level=100)
    return repaired


def _check_form(name: str, affine: np.ndarray) -> _Form:
    fault = describe_fault(affine)
    return _Form(name, affine, f"{name} {fault}" if fault else "")


@np.errstate(all="ignore")  # an axis of length 0 is a fault
def describe_fault(affine: np.ndarray) -> str:
    """Return why an affine cannot be used, in words that follow its name; empty if it can."""
    if not np.isfinite(affine).all():
        return "holds values that are not finite"
    axes = affine[:3, :3] / nib.affines.voxel_sizes(affine)
    volume = abs(np.linalg.det(axes)) if np.isfinite(axes).all() else 0.0
    if volume < 1e-3:
        return "is singular: two of its axes are parallel or have no length"
    if (skew := np.abs(axes.T @ axes - np.eye(3)).max()) > MAX_SKEW:
        return f"is sheared: two axes are {np.degrees(np.arcsin(skew)):.1f}° off a right angle"
    return ""


def _require_same_directions(path: Path, sform: _Form, qform: _Form) -> None:
    """Raise an InputError if two forms give the axes different anatomical directions: one may mirror the scan."""
    names = ["".join(nib.aff2axcodes(form.affine)) for form in (sform, qform)]
    if names[0] != names[1]:
        problem = f"sform and qform give the axes different directions ({names[0]} and {names[1]}); pixdim fits both"
        raise InputError(path, problem, "Set the code of the wrong one to 0.")


def _same_lengths(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((np.abs(a - b) <= MAX_LENGTH_DIFFERENCE * np.maximum(a, b)).all())


def _angle(a: _Form, b: _Form) -> float:
    """Return the largest angle in degrees between corresponding axes."""
    cosines = (a.directions * b.directions).sum(axis=0)
    return float(np.degrees(np.arccos(np.clip(cosines, -1, 1))).max())


def _check_sizes(path: Path, spacing: np.ndarray, shape: tuple[int, int, int], unit: int) -> list[str]:
    """Return a warning if a scan's size is unusual for an anatomy; raise an InputError if it is impossible."""
    extent = spacing * shape
    sizes = f"voxels of {_sides(spacing)} mm, {_sides(extent)} mm in all"
    if unit in UNIT_NAMES:
        sizes += f" (lengths in {UNIT_NAMES[unit]})"
    if not _lie_within(spacing, extent, MIN_VOXEL_MM, MAX_VOXEL_MM, MAX_EXTENT_MM):
        raise InputError(path, f"impossible size: {sizes}", "Correct the spacing and the unit in its header.")
    if not _lie_within(spacing, extent, MIN_USUAL_VOXEL_MM, MAX_USUAL_VOXEL_MM, MAX_USUAL_EXTENT_MM):
        return [f"unusual size: {sizes}; check the spacing and the unit in its header"]
    return []


def _lie_within(spacing: np.ndarray, extent: np.ndarray, shortest: float, longest: float, farthest: float) -> bool:
    is_long_enough = spacing.min() >= shortest * (1 - LIMIT_ROUNDING)
    return bool(is_long_enough and spacing.max() <= longest * (1 + LIMIT_ROUNDING) and extent.max() <= farthest)


def _sides(sizes: Iterable[float]) -> str:
    return "×".join(f"{size:.4g}" for size in sizes)
