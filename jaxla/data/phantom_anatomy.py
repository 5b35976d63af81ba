"""Anatomy of the synthetic LGE-MRI: a table of structures, their variation, and distances to their surfaces.

Each structure is an implicit function: its value at a point is the signed distance in mm to its surface, negative
inside. Coordinates are in mm: x to the patient's right, y to the front, z to the head (RAS+). The left atrium is at the
origin.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Grid = tuple[Array, Array, Array]  # voxel centres along x, y and z, in mm
Box = tuple[slice, slice, slice]
Points = Callable[[Box], Sequence[Array]]  # x, y and z of a box's voxels, which broadcast to its shape
EVERYWHERE: Box = (slice(None),) * 3
MARGIN = 8.0  # mm around a structure within its box, for soft edges and for the bending of the heart

# Signal before coil sensitivity, noise and scanner scale.
TISSUES = {
    "air": 0.02, "lung": 0.13, "fat": 0.50, "muscle": 0.36, "wall": 0.30, "myocardium": 0.33, "blood": 0.80,
    "bone": 0.42, "cortex": 0.18, "cord": 0.55, "liver": 0.46, "spleen": 0.52,
}  # fmt: skip


class Ellipsoid(NamedTuple):
    centre: tuple[float, float, float]
    radii: tuple[float, float, float]


class Tube(NamedTuple):
    """A chain of tapered capsules through points (x, y, z, radius)."""

    points: tuple[tuple[float, float, float, float], ...]


class Structure(NamedTuple):
    tissue: str
    shell: float  # thickness in mm of the wall outside the surface
    shell_tissue: str
    parts: tuple[Ellipsoid | Tube, ...]


# Nominal adult anatomy, painted in this order: later structures cover earlier ones.
CAVITY = (  # clipped to the inside of the chest wall
    Structure("lung", 0, "", (Ellipsoid((84, -8, 20), (62, 84, 125)),)),
    Structure("lung", 0, "", (Ellipsoid((-92, -12, 20), (58, 82, 125)),)),
    Structure("liver", 1.5, "muscle", (Ellipsoid((70, 10, -112), (85, 85, 62)),)),
    Structure("spleen", 1.5, "muscle", (Ellipsoid((-80, -5, -122), (62, 75, 60)),)),
    Structure("fat", 0, "", (Ellipsoid((-4, 28, -14), (66, 58, 62)), Ellipsoid((0, 0, 62), (36, 44, 70)))),
)
MIDLINE = (
    Structure("fat", 0, "", (Tube(((2, -52, 160, 27), (2, -54, -160, 27))),)),
    Structure("bone", 1.5, "wall", (Tube(((2, -66, 160, 17), (2, -68, -160, 18))),)),
    Structure("cord", 2.0, "bone", (Tube(((2, -92, 160, 7), (2, -94, -160, 7))),)),
    Structure("muscle", 0, "", (Tube(((-4, -28, 120, 5), (-6, -27, 0, 5), (-4, -28, -120, 6))),)),  # oesophagus
)
HEART = (
    Structure("blood", 3.0, "myocardium", (  # right ventricle and its outflow
        Ellipsoid((6, 55, -30), (31, 24, 28)),
        Tube(((0, 60, -14, 15), (-16, 56, 6, 13))),
    )),
    Structure("blood", 2.0, "wall", (  # right atrium and both caval veins
        Ellipsoid((41, 21, -14), (20, 23, 26)),
        Tube(((28, 12, 150, 8), (30, 13, 70, 9), (34, 13, 8, 9.5))),
        Tube(((36, 8, -30, 11), (34, 2, -62, 11), (26, -8, -130, 11))),
    )),
    Structure("blood", 9.5, "myocardium", (  # left ventricle
        Tube(((-24, 32, -22, 20), (-38, 46, -36, 18), (-56, 62, -50, 10))),
    )),
    Structure("blood", 1.8, "wall", (  # pulmonary artery
        Tube(((-17, 57, 4, 12), (-24, 44, 22, 13), (-20, 22, 37, 12))),
        Tube(((-20, 22, 37, 10), (16, 3, 36, 9), (44, -8, 32, 7))),
        Tube(((-20, 22, 37, 10), (-34, -6, 39, 9), (-54, -20, 36, 7))),
    )),
    Structure("blood", 1.8, "wall", (  # aorta: root, arch and descending part
        Tube(((-3, 34, 0, 11), (6, 33, 12, 14), (15, 32, 32, 14), (13, 22, 56, 14), (-2, -4, 72, 13))),
        Tube(((-2, -4, 72, 13), (-20, -34, 60, 12), (-24, -40, 20, 11.5), (-21, -42, -30, 11), (-12, -44, -150, 10.5))),
    )),
)  # fmt: skip
ATRIUM = Structure("blood", 2.2, "wall", (  # left atrium and its appendage
    Ellipsoid((0, 0, 0), (24, 17, 20)),
    Tube(((-15, 8, 6, 9), (-29, 20, 13, 8), (-37, 31, 9, 6))),
))  # fmt: skip
VEINS = tuple(  # pulmonary veins; as in reference masks, their first segment belongs to the atrium
    Structure("blood", 1.2, "wall", (Tube(points),))
    for points in (
        ((14, -3, 9, 7), (34, -8, 17, 5.2), (58, -14, 27, 4), (84, -16, 46, 2)),
        ((14, -7, -7, 7), (33, -18, -11, 5.2), (55, -33, -18, 4), (80, -48, -34, 2)),
        ((-14, -3, 10, 7), (-33, -11, 18, 5), (-56, -20, 27, 4), (-82, -22, 46, 2)),
        ((-14, -7, -6, 7), (-32, -18, -9, 5), (-54, -32, -16, 4), (-80, -44, -32, 2)),
    )
)


def vary(rng: np.random.Generator, structure: Structure, rotation: NDArray, variation: float = 1.0) -> Structure:
    """Return one patient's version of a nominal structure: moved, resized and rotated with the heart."""
    shift = rng.normal(0, 1.5 * variation, 3)

    def move(point: Sequence[float]) -> NDArray:
        point = np.add(point, shift)
        mobility = np.clip((point[1] + 36) / 26, 0, 1)  # structures at the spine do not rotate with the heart
        return point + mobility * (rotation @ point - point)

    parts = []
    for part in structure.parts:
        if isinstance(part, Ellipsoid):
            parts.append(Ellipsoid(tuple(move(part.centre)), tuple(part.radii * np.exp(rng.normal(0, 0.09, 3)))))
        else:
            scale = np.exp(rng.normal(0, 0.08))
            moved = {point: tuple(move(point[:3]) + rng.normal(0, 0.5 * variation, 3)) for point in part.points}
            parts.append(Tube(tuple((*moved[point], point[3] * scale) for point in part.points)))
    return structure._replace(parts=tuple(parts))


def draw_lung_vessels(rng: np.random.Generator) -> list[Structure]:
    """Return thin branches that fan out from the root of each lung."""
    branches = []
    for side in (-1, 1):
        for _ in range(7):
            root = np.array([side * 44, -12, 8]) + rng.normal(0, 8, 3)
            tip = root + (np.array([side * 1.2, 0, 0]) + rng.normal(0, 0.6, 3)) * rng.uniform(25, 45)
            branches.append(Tube(((*root, 2.6), (*tip, 1.0))))
    return [Structure("blood", 0, "lung", (branch,)) for branch in branches]


def box_between(grid: Grid, low: Sequence[float], high: Sequence[float]) -> Box:
    """Return the voxels between two corners."""
    return tuple(slice(*np.searchsorted(axis, (a, b))) for axis, a, b in zip(grid, low, high, strict=True))


def box_coordinates(grid: Grid, box: Box) -> Sequence[Array]:
    """Return the coordinates of a box's voxels, as broadcastable axes."""
    return np.ix_(*(axis[part] for axis, part in zip(grid, box, strict=True)))


def ellipsoid_distance(points: Sequence[Array], ellipsoid: Ellipsoid, rotation: NDArray | None = None) -> Array:
    """Return the distance to the surface, to first order."""
    along = [p - np.float32(c) for p, c in zip(points, ellipsoid.centre, strict=True)]
    if rotation is not None:
        along = [sum(a * np.float32(t) for a, t in zip(along, column, strict=True)) for column in rotation.T]
    level = np.sqrt(sum((a / np.float32(r)) ** 2 for a, r in zip(along, ellipsoid.radii, strict=True)))
    slope = np.sqrt(sum((a / np.float32(r**2)) ** 2 for a, r in zip(along, ellipsoid.radii, strict=True)))
    return level * (level - 1) / (slope + np.float32(1e-6))


def _capsule_distance(points: Sequence[Array], capsule: Tube) -> Array:
    start, end = np.array(capsule.points, np.float32)
    axis = end[:3] - start[:3]
    shifted = [p - c for p, c in zip(points, start[:3], strict=True)]
    dot = sum(s * a for s, a in zip(shifted, axis, strict=True))
    along = np.clip(dot / (axis @ axis), 0, 1)
    square = sum(s**2 for s in shifted) - along * (2 * dot - along * (axis @ axis))
    return np.sqrt(np.maximum(square, 0)) - (start[3] + along * (end[3] - start[3]))


def measure_distance(
    grid: Grid, points: Points, structure: Structure, rotation: NDArray | None = None, blend: float = 1.0
) -> tuple[Box, Array]:
    """Return a box around a structure, and in this box the distance to the union of its parts.

    Distances above MARGIN are only bounds.

    Args:
        points: returns the coordinates of a box's voxels.
        rotation: [3, 3], axes of the ellipsoids.
        blend: mm over which creases between the parts are rounded.
    """
    solids, ends = [], []  # ends: the spheres (x, y, z, radius) whose hull contains each solid
    for part in structure.parts:
        if isinstance(part, Ellipsoid):
            solids.append(part)
            ends.append([(*part.centre, max(part.radii))])
        else:
            solids += [Tube(pair) for pair in itertools.pairwise(part.points)]
            ends += itertools.pairwise(part.points)
    reach = structure.shell + blend + MARGIN
    spheres = [np.array(pair) for pair in ends]
    lows = [(s[:, :3] - s[:, 3:]).min(0) - reach for s in spheres]
    highs = [(s[:, :3] + s[:, 3:]).max(0) + reach for s in spheres]
    box = box_between(grid, np.min(lows, 0), np.max(highs, 0))
    union = np.full([side.stop - side.start for side in box], 99, np.float32)
    for solid, low, high in zip(solids, lows, highs, strict=True):
        solid_box = box_between(grid, low, high)
        near = points(solid_box)
        is_ellipsoid = isinstance(solid, Ellipsoid)
        distance = ellipsoid_distance(near, solid, rotation) if is_ellipsoid else _capsule_distance(near, solid)
        view = union[tuple(slice(s.start - b.start, s.stop - b.start) for s, b in zip(solid_box, box, strict=True))]
        crease = np.maximum(np.float32(blend) - np.abs(view - distance), 0) ** 2 * np.float32(0.25 / blend)
        np.minimum(view, distance, out=view)
        view -= crease
    return box, union
