"""Synthetic LGE-MRI of the chest with a known left atrium, in the file layout of LAScarQS 2022.

Tissues are painted over one another on the voxel grid, with soft edges for the partial volume effect, and then
"scanned". Blood is about equally bright in all chambers, and the field of view differs between cases, so neither a
threshold nor the usual position finds the atrium. Crops are also as uneven as real scans: with strong shading by
surface coils, and with bright spots, up to three times as bright as blood.
"""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import nibabel as nib
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.transform import Rotation

from jaxla.cli.files import atomic_folder, report_os_errors
from jaxla.cli.terminal import track
from jaxla.config import InputError, option
from jaxla.data import phantom_anatomy as anatomy
from jaxla.data.phantom_anatomy import Array, Box, Grid

log = logging.getLogger(__name__)

VERSION = 1  # part of the cache folder's name; increase it when a seed gives different phantoms
SIZES = ("small", "full", "crop")
SPACING = (0.625, 0.625, 2.5)  # mm, as in LAScarQS
CROP_SPACING = (0.625, 0.625, 1.25)  # as in the challenge of 2018, whose scans were interpolated along the slices
BLOOD_LEVELS = (0.3, 0.9)  # range of the brightness of blood in a crop, relative to the brightest spots
ORIENTATIONS = ("LPS", "RAS", "LAS", "RPS")  # orientations of the array's axes; slices always lie along the third
EDGE_MM = 1.2  # width of the transition between two tissues
MAX_BEND_MM = 6.0  # limit of the smooth displacement that varies the shape of the heart


class Phantom(NamedTuple):
    """One synthetic case."""

    image: NDArray[np.int16]  # [X, Y, Z]
    mask: NDArray[np.uint8]  # [X, Y, Z], 0 or 255
    affine: NDArray[np.float64]  # [4, 4], voxel indices to mm


def make_phantom(size: str, seed: int, index: int) -> Phantom:
    """Make case `index` of the set `seed`; it does not depend on the number of cases.

    Args:
        size: `full`, the whole chest (576, 608 or 640 pixels square, 44 or 88 slices), or `small`, the region around
            the heart (160, 176 or 192 pixels square, 20 to 24 slices), both at 0.625 × 0.625 × 2.5 mm; or `crop`, 160
            to 240 × 132 to 158 pixels and 88 slices around the atrium, at 0.625 × 0.625 × 1.25 mm.
    """
    rng = np.random.default_rng([SIZES.index(size), seed, index])
    grid = _draw_grid(rng, size)
    spacing = CROP_SPACING if size == "crop" else SPACING
    signal, mask = _paint_patient(rng, grid)
    shading = 0.12
    if size == "crop":
        signal = _add_bright_spots(rng, grid, signal)
        shading = 0.25
    scanned = _scan(rng, signal, spacing, shading)
    return _orient(rng, scanned, mask, ORIENTATIONS[(seed + index) % len(ORIENTATIONS)], spacing)


def write_phantoms(folder: Path, cases: int, size: str, seed: int) -> None:
    """Write `cases` phantoms as `<folder>/task2/train_data/train_<n>/{enhanced,atriumSegImgMO}.nii.gz`, n from 1.

    They appear in `folder` together, once all are written.

    Raises:
        InputError: an argument is out of range, or `folder` is not empty or cannot be written.
    """
    if size not in SIZES:
        raise InputError(option("size", size), "unknown size", f"Use {' or '.join(SIZES)}.")
    if cases < 1:
        raise InputError(option("cases", cases), "must be at least 1", "Use a positive integer.")
    if seed < 0:
        raise InputError(option("seed", seed), "must not be negative", "Use 0 or a positive integer.")
    folder = Path(folder)
    where = option("output", folder)
    fix = "Choose a new or empty folder."
    with report_os_errors("written", where, fix):
        if folder.exists() and not folder.is_dir():
            raise InputError(where, "is a file, not a folder", fix)
        if folder.is_dir() and any(folder.iterdir()):
            raise InputError(where, "the folder is not empty", fix)
        _write(folder, cases, size, seed)


def ensure_phantoms(cache_dir: Path, size: str, cases: int) -> Path:
    """Return the cached folder of phantoms for `data.root=phantom`, and make it if it is missing."""
    folder = cache_dir / "phantoms" / f"{size}-{cases}-v{VERSION}"
    if not folder.is_dir():
        log.info("making %d %s phantoms in %s", cases, size, folder)
        with report_os_errors("written", option("cache-dir", cache_dir), "Use another folder."):
            try:
                _write(folder, cases, size, seed=0)
            except OSError:
                if not folder.is_dir():  # otherwise another process has made the same phantoms
                    raise
    return folder


def _write(folder: Path, cases: int, size: str, seed: int) -> None:
    is_present = folder.is_dir()  # an empty folder may be a mount point, which cannot be replaced
    with atomic_folder(folder / "task2" if is_present else folder) as temporary:
        parent = temporary / "train_data" if is_present else temporary / "task2" / "train_data"
        for index in track(range(1, cases + 1), "phantoms"):
            case = parent / f"train_{index}"
            case.mkdir(parents=True)
            image, mask, affine = make_phantom(size, seed, index)
            _save(case / "enhanced.nii.gz", image, affine)
            _save(case / "atriumSegImgMO.nii.gz", mask, affine)


def _save(path: Path, array: NDArray, affine: NDArray[np.float64]) -> None:
    image = nib.Nifti1Image(array, affine)
    image.header.set_xyzt_units("mm")
    image.set_sform(affine, code="scanner")
    image.set_qform(affine, code="scanner")
    nib.save(image, path)


def _draw_grid(rng: np.random.Generator, size: str) -> Grid:
    """Draw a field of view around the atrium."""
    if size == "full":
        plane, slices = int(rng.choice([576, 608, 640])), int(rng.choice([44, 88]))
        centre, jitter = (0, 5, -4), (16, 14, 12 if slices == 44 else 30)
    elif size == "crop":
        return _grid_around(
            (2 * rng.integers(80, 121), 2 * rng.integers(66, 80), 88), CROP_SPACING, rng.uniform(-1, 1, 3) * (3, 3, 16)
        )
    else:
        plane, slices = int(rng.choice([160, 176, 192])), int(rng.integers(20, 25))
        centre, jitter = (0, 6, 0), (17, 16, 8)
    return _grid_around((plane, plane, slices), SPACING, np.add(centre, np.multiply(jitter, rng.uniform(-1, 1, 3))))


def _grid_around(shape: Sequence[int], spacing: Sequence[float], middle: Sequence[float]) -> Grid:
    axes = zip(shape, spacing, middle, strict=True)
    return tuple(((np.arange(n) - (n - 1) / 2) * step + at).astype(np.float32) for n, step, at in axes)


# --- painting ---


def _paint(image: Array, box: Box, distance: Array, value: float | Array) -> None:
    inside = np.clip(np.float32(0.5) - distance * np.float32(1 / EDGE_MM), 0, 1)
    image[box] += inside * (value - image[box])


def _paint_patient(rng: np.random.Generator, grid: Grid) -> tuple[Array, NDArray[np.bool_]]:
    """Return signal and atrium mask [X, Y, Z] of one patient."""
    tissues = {tissue: np.float32(value * np.exp(rng.normal(0, 0.06))) for tissue, value in anatomy.TISSUES.items()}
    image, pleura = _paint_chest_wall(rng, grid, tissues)
    for structure in (*anatomy.CAVITY, *anatomy.MIDLINE):
        varied = anatomy.vary(rng, structure, np.eye(3), variation=1.5)
        box, distance = anatomy.measure_distance(grid, lambda box: anatomy.box_coordinates(grid, box), varied)
        if structure in anatomy.CAVITY:
            distance = np.maximum(distance, pleura[box[:2]])
        if structure.shell:
            _paint(image, box, distance - np.float32(structure.shell), tissues[structure.shell_tissue])
        _paint(image, box, distance, tissues[structure.tissue])

    rotation = Rotation.from_euler("zyx", rng.uniform(-1, 1, 3) * (20, 12, 12), degrees=True).as_matrix()
    region = anatomy.box_between(grid, (-110, -75, -np.inf), (110, 95, np.inf))
    mask = np.zeros(image.shape, bool)
    inner = tuple(axis[part] for axis, part in zip(grid, region, strict=True))
    _paint_heart(rng, inner, image[region], mask[region], tissues, rotation)
    return image, mask


def _paint_heart(
    rng: np.random.Generator, grid: Grid, image: Array, mask: NDArray[np.bool_], tissues: dict, rotation: NDArray
) -> None:
    """Paint chambers and great vessels into `image`, and the cavity of the left atrium into `mask`."""
    bent = [
        axis + np.clip(np.float32(2.2) * _smooth_field(rng, grid, anatomy.EVERYWHERE, 60), -MAX_BEND_MM, MAX_BEND_MM)
        for axis in anatomy.box_coordinates(grid, anatomy.EVERYWHERE)
    ]

    def points(box: Box) -> Sequence[Array]:
        return [coordinate[box] for coordinate in bent]

    def blood_signal() -> np.float32:
        return tissues["blood"] * np.float32(np.exp(rng.normal(0, 0.07)))  # a little different in each chamber

    veins = [anatomy.vary(rng, vein, rotation, variation=1.2) for vein in anatomy.VEINS]
    vessels = anatomy.draw_lung_vessels(rng)
    for structure in (*vessels, *[anatomy.vary(rng, part, rotation) for part in anatomy.HEART], *veins):
        box, distance = anatomy.measure_distance(grid, points, structure, rotation)
        _paint(image, box, distance - np.float32(structure.shell), tissues[structure.shell_tissue])
        _paint(image, box, distance, blood_signal())

    atrium = anatomy.vary(rng, anatomy.ATRIUM, rotation)
    stumps = tuple(anatomy.Tube(vein.parts[0].points[:2]) for vein in veins)
    box, distance = anatomy.measure_distance(
        grid, points, atrium._replace(parts=atrium.parts + stumps), rotation, blend=6.0
    )
    scarred = np.clip((_smooth_field(rng, grid, box, 16) - np.float32(rng.uniform(0.3, 1.6))) * 5, 0, 1)
    scar = tissues["blood"] * np.float32(rng.uniform(1.2, 1.6))
    wall = tissues["wall"] + scarred * (scar - tissues["wall"])
    _paint(image, box, distance - np.float32(atrium.shell), wall)
    _paint(image, box, distance, blood_signal())
    mask[box] = distance < 0


def _paint_chest_wall(rng: np.random.Generator, grid: Grid, tissues: dict) -> tuple[Array, Array]:
    """Return a cylinder of fat, muscle and sloping ribs around soft tissue, and the distance to its inner surface."""
    x, y, z = anatomy.box_coordinates(grid, anatomy.EVERYWHERE)
    radii = np.array([162, 106]) * rng.uniform(0.95, 1.06, 2)
    fat, muscle = np.float32(rng.uniform(7, 18)), np.float32(rng.uniform(14, 19))
    cylinder = anatomy.Ellipsoid((0, -8, 0), (*radii, np.inf))
    skin = anatomy.ellipsoid_distance((x, y, np.zeros_like(z[..., :1])), cylinder)
    plane = np.full(skin.shape, tissues["air"], np.float32)
    for depth, tissue in ((np.float32(0), "fat"), (fat, "muscle"), (fat + muscle, "fat")):
        _paint(plane, anatomy.EVERYWHERE, skin + depth, tissues[tissue])
    image = np.repeat(plane, z.size, axis=2)

    ring = np.clip(4 - np.abs(skin + fat + muscle - 6), 0, 1) * np.float32(0.5) * (tissues["cortex"] - plane)
    slope = np.float32(5) * np.arctan2(np.abs(x), -y - 8) + np.float32(rng.uniform(0, 6))
    height = z * np.float32(2 * np.pi / 28)  # one rib every 28 mm
    image += ring + np.cos(height) * (ring * np.cos(slope)) - np.sin(height) * (ring * np.sin(slope))
    return image, skin + fat + muscle


def _smooth_field(rng: np.random.Generator, grid: Grid, box: Box, period: float) -> Array:
    """Return a random field [X, Y, Z] of about unit deviation that varies over `period` mm: a few cosines per axis."""
    bases = []
    for axis in (a[part] for a, part in zip(grid, box, strict=True)):
        length = np.ptp(axis) + 1.0
        terms = int(np.clip(2 * length / period, 1, 24)) + 1
        phase = np.pi * (axis - axis[0]) / length
        bases.append(np.cos(phase[:, None] * np.arange(terms) + rng.uniform(0, 2 * np.pi, terms)).astype(np.float32))
    field = rng.standard_normal([basis.shape[1] for basis in bases]).astype(np.float32)
    field *= np.float32(np.sqrt(8 / field.size))
    for basis in bases:  # each step contracts the first axis and appends its voxels as the last
        field = np.tensordot(field, basis, axes=(0, 1))
    return field


# --- scanning ---


def _add_bright_spots(rng: np.random.Generator, grid: Grid, signal: Array) -> Array:
    """Return the signal with spots in one to three percent of the volume that may be far brighter than blood."""
    field = _smooth_field(rng, grid, anatomy.EVERYWHERE, 24)
    inside = np.clip((field - np.float32(np.quantile(field, rng.uniform(0.97, 0.99)))) * 4, 0, 1)
    brightest = np.float32(anatomy.TISSUES["blood"] / rng.uniform(*BLOOD_LEVELS))
    return signal + inside * np.maximum(brightest - signal, 0)


def _scan(rng: np.random.Generator, signal: Array, spacing: Sequence[float], shading: float) -> NDArray[np.int16]:
    """Apply a scanner to the signal: thick slices, uneven coils, Rician noise and a random intensity scale."""
    grid = tuple((np.arange(n) * step).astype(np.float32) for n, step in zip(signal.shape, spacing, strict=True))
    gain = np.float32(shading) * _smooth_field(rng, grid, anatomy.EVERYWHERE, 250)
    gain += np.float32(0.03) * _smooth_field(rng, grid, anatomy.EVERYWHERE, 14)
    np.exp(gain, out=gain)
    scale, sigma = np.float32(rng.uniform(200, 900)), np.float32(rng.uniform(0.045, 0.075))
    scanned = np.empty(signal.shape, np.int16)
    for start in range(0, signal.shape[0], 32):  # in slabs, to keep memory small
        slab = signal[start : start + 32]
        thick = np.float32(0.7) * slab
        thick[..., 1:] += np.float32(0.15) * slab[..., :-1]
        thick[..., :-1] += np.float32(0.15) * slab[..., 1:]
        thick[..., [0, -1]] *= np.float32(1 / 0.85)
        thick *= gain[start : start + 32]
        thick += sigma * _coarse_noise(rng, slab.shape)
        noisy = np.sqrt(thick**2 + (sigma * _coarse_noise(rng, slab.shape)) ** 2)
        scanned[start : start + 32] = np.rint(scale * noisy)
    return scanned


def _coarse_noise(rng: np.random.Generator, shape: tuple[int, int, int]) -> Array:
    """Return unit noise [X, Y, Z], X and Y even, interpolated in plane from half as many samples, as scanners do."""
    noise = rng.standard_normal((shape[0] // 2 + 2, shape[1] // 2 + 2, shape[2]), dtype=np.float32)
    noise *= np.float32(1.6)  # two means with weights ¾ and ¼ reduce the deviation by this factor
    for axis in (0, 1):
        noise = np.moveaxis(noise, axis, 0)
        fine = np.empty((2 * len(noise) - 4, *noise.shape[1:]), np.float32)
        middle = np.float32(0.75) * noise[1:-1]
        fine[0::2] = middle + np.float32(0.25) * noise[:-2]
        fine[1::2] = middle + np.float32(0.25) * noise[2:]
        noise = np.moveaxis(fine, 0, axis)
    return noise


def _orient(rng: np.random.Generator, image: NDArray, mask: NDArray, codes: str, spacing: Sequence[float]) -> Phantom:
    """Orient the array's axes along `codes`, and draw the position of the scan."""
    signs = np.array([1 if code in "RAS" else -1 for code in codes])
    flips = tuple(slice(None, None, sign) for sign in signs)
    affine = np.diag([*(signs * spacing), 1.0])
    affine[:3, 3] = rng.uniform(-30, 30, 3) - affine[:3, :3] @ np.subtract(image.shape, 1) / 2
    return Phantom(image[flips], mask[flips] * np.uint8(255), affine)
