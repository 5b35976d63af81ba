"""The chest of the synthetic LGE-MRI: a table of structures, how patients differ, and distances to the surfaces.

Each structure is an implicit function: its value at a point is the distance in mm to its surface, negative inside.
Frame: mm, x to the patient's right, y to the front, z to the head (NIfTI's RAS+); the left atrium lies at the origin.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Grid = tuple[Array, Array, Array]  # voxel centres along x, y and z, in mm
Box = tuple[slice, slice, slice]
Points = Callable[[Box], Sequence[Array]]  # the coordinates x, y and z of a box's voxels, which broadcast to its shape
EVERYWHERE: Box = (slice(None),) * 3
MARGIN = 8.0  # mm by which a box exceeds its structure: room for soft edges and for the heart's bending

# Signal before coil, noise and scanner scale.
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
    shell: float  # mm of wall outside the surface
    shell_tissue: str
    parts: tuple[Ellipsoid | Tube, ...]


# Nominal adult anatomy, painted in this order: what comes later lies on top.
CAVITY = (  # kept within the chest wall
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
    Structure("blood", 1.8, "wall", (  # aorta: root, arch, along the spine
        Tube(((-3, 34, 0, 11), (6, 33, 12, 14), (15, 32, 32, 14), (13, 22, 56, 14), (-2, -4, 72, 13))),
        Tube(((-2, -4, 72, 13), (-20, -34, 60, 12), (-24, -40, 20, 11.5), (-21, -42, -30, 11), (-12, -44, -150, 10.5))),
    )),
)  # fmt: skip
ATRIUM = Structure("blood", 2.2, "wall", (  # left atrium and its appendage
    Ellipsoid((0, 0, 0), (24, 17, 20)),
    Tube(((-15, 8, 6, 9), (-29, 20, 13, 8), (-37, 31, 9, 6))),
))  # fmt: skip
VEINS = tuple(  # pulmonary; up to the second point they belong to the atrium, as in the reference masks
    Structure("blood", 1.2, "wall", (Tube(points),))
    for points in (
        ((14, -3, 9, 7), (34, -8, 17, 5.2), (58, -14, 27, 4), (84, -16, 46, 2)),
        ((14, -7, -7, 7), (33, -18, -11, 5.2), (55, -33, -18, 4), (80, -48, -34, 2)),
        ((-14, -3, 10, 7), (-33, -11, 18, 5), (-56, -20, 27, 4), (-82, -22, 46, 2)),
        ((-14, -7, -6, 7), (-32, -18, -9, 5), (-54, -32, -16, 4), (-80, -44, -32, 2)),
    )
)


def vary(rng: np.random.Generator, structure: Structure, turn: NDArray, loose: float = 1.0) -> Structure:
    """One patient's version of a nominal structure: moved, resized and turned with the heart."""
    shift = rng.normal(0, 1.5 * loose, 3)

    def place(point: Sequence[float]) -> NDArray:
        point = np.add(point, shift)
        free = np.clip((point[1] + 36) / 26, 0, 1)  # what lies on the spine stays there when the heart turns
        return point + free * (turn @ point - point)

    parts = []
    for part in structure.parts:
        if isinstance(part, Ellipsoid):
            parts.append(Ellipsoid(tuple(place(part.centre)), tuple(part.radii * np.exp(rng.normal(0, 0.09, 3)))))
        else:
            size = np.exp(rng.normal(0, 0.08))
            own = {point: tuple(place(point[:3]) + rng.normal(0, 0.5 * loose, 3)) for point in part.points}
            parts.append(Tube(tuple((*own[point], point[3] * size) for point in part.points)))
    return structure._replace(parts=tuple(parts))


def lung_vessels(rng: np.random.Generator) -> list[Structure]:
    """Thin branches that fan out from each lung's root."""
    branches = []
    for side in (-1, 1):
        for _ in range(7):
            root = np.array([side * 44, -12, 8]) + rng.normal(0, 8, 3)
            tip = root + (np.array([side * 1.2, 0, 0]) + rng.normal(0, 0.6, 3)) * rng.uniform(25, 45)
            branches.append(Tube(((*root, 2.6), (*tip, 1.0))))
    return [Structure("blood", 0, "lung", (branch,)) for branch in branches]


def box_between(grid: Grid, low: Sequence[float], high: Sequence[float]) -> Box:
    """The voxels between two corners, so that a structure is evaluated only where it can be."""
    return tuple(slice(*np.searchsorted(axis, (a, b))) for axis, a, b in zip(grid, low, high, strict=True))


def straight(grid: Grid, box: Box) -> Sequence[Array]:
    """The coordinates of a box's voxels, as broadcastable axes."""
    return np.ix_(*(axis[part] for axis, part in zip(grid, box, strict=True)))


def ellipsoid_distance(points: Sequence[Array], solid: Ellipsoid, turn: NDArray | None = None) -> Array:
    """Distance to the surface, to first order."""
    along = [p - np.float32(c) for p, c in zip(points, solid.centre, strict=True)]
    if turn is not None:
        along = [sum(a * np.float32(t) for a, t in zip(along, column, strict=True)) for column in turn.T]
    near = np.sqrt(sum((a / np.float32(r)) ** 2 for a, r in zip(along, solid.radii, strict=True)))
    slope = np.sqrt(sum((a / np.float32(r**2)) ** 2 for a, r in zip(along, solid.radii, strict=True)))
    return near * (near - 1) / (slope + np.float32(1e-6))


def _capsule_distance(points: Sequence[Array], solid: Tube) -> Array:
    start, end = np.array(solid.points, np.float32)
    axis = end[:3] - start[:3]
    shifted = [p - c for p, c in zip(points, start[:3], strict=True)]
    dot = sum(s * a for s, a in zip(shifted, axis, strict=True))
    along = np.clip(dot / (axis @ axis), 0, 1)
    square = sum(s**2 for s in shifted) - along * (2 * dot - along * (axis @ axis))
    return np.sqrt(np.maximum(square, 0)) - (start[3] + along * (end[3] - start[3]))


def distance_to(
    grid: Grid, points: Points, structure: Structure, turn: NDArray | None = None, blend: float = 1.0
) -> tuple[Box, Array]:
    """A box around a structure, and the distance to the union of its parts there.

    `points` gives the coordinates of a box's voxels, `turn` [3, 3] the axes of the ellipsoids; `blend` mm rounds off
    the creases between the parts. Distances beyond MARGIN are only bounds.
    """
    solids, balls = [], []
    for part in structure.parts:
        if isinstance(part, Ellipsoid):
            solids.append(part)
            balls.append([(*part.centre, max(part.radii))])
        else:
            solids += [Tube(ends) for ends in itertools.pairwise(part.points)]
            balls += itertools.pairwise(part.points)
    reach = structure.shell + blend + MARGIN
    spheres = [np.array(ball) for ball in balls]
    lows = [(s[:, :3] - s[:, 3:]).min(0) - reach for s in spheres]
    highs = [(s[:, :3] + s[:, 3:]).max(0) + reach for s in spheres]
    box = box_between(grid, np.min(lows, 0), np.max(highs, 0))
    union = np.full([part.stop - part.start for part in box], 99, np.float32)
    for solid, low, high in zip(solids, lows, highs, strict=True):
        own = box_between(grid, low, high)
        near = points(own)
        distance = (
            ellipsoid_distance(near, solid, turn) if isinstance(solid, Ellipsoid) else _capsule_distance(near, solid)
        )
        within = union[tuple(slice(o.start - b.start, o.stop - b.start) for o, b in zip(own, box, strict=True))]
        crease = np.maximum(np.float32(blend) - np.abs(within - distance), 0) ** 2 * np.float32(0.25 / blend)
        np.minimum(within, distance, out=within)
        within -= crease
    return box, union
