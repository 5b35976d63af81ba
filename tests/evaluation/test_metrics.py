"""Metrics of one unit, compared with hand-computed numbers, MONAI and SimpleITK, and checked for their properties."""

import warnings

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from monai import metrics as monai
from scipy.ndimage import gaussian_filter

from jaxla.config import InputError
from jaxla.evaluation.metrics import COLUMNS, METRICS, score

OVERLAPS = ("dice", "iou", "precision", "recall", "nsd_1mm", "nsd_2mm")
DISTANCES = ("hd_mm", "hd95_mm", "assd_mm")
ALL_METRICS = (*OVERLAPS, *DISTANCES)


def block(shape, *ranges):
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*r) for r in ranges)] = True
    return mask


def blob(rng, shape, fraction=0.15):
    field = gaussian_filter(rng.standard_normal(shape), 2.0)
    return field > np.quantile(field, 1 - fraction)


FULL, NONE = np.ones((3, 4), bool), np.zeros((3, 4), bool)


@pytest.mark.parametrize(
    ("prediction", "reference", "spacing", "dice", "iou", "hd", "hd95", "assd"),
    [
        # equal masks; two empty masks; one empty mask, whose distance is the diagonal of 3 mm and 4 mm
        (FULL, FULL, (1, 1), 1, 1, 0, 0, 0),
        (NONE, NONE, (1, 1), 1, 1, 0, 0, 0),
        (NONE, FULL, (1, 1), 0, 0, 5, 5, 5),
        (FULL, NONE, (1, 1), 0, 0, 5, 5, 5),
        # two voxels at a distance of two slices of 2.5 mm
        (
            block((5, 3, 3), (1, 2), (1, 2), (1, 2)),
            block((5, 3, 3), (3, 4), (1, 2), (1, 2)),
            (2.5, 1, 1),
            0,
            0,
            5,
            5,
            5,
        ),
        # a pixel, and the same pixel with two neighbours at 2 mm: distances 0; and 2, 0, 2
        (block((3, 5), (1, 2), (2, 3)), block((3, 5), (1, 2), (1, 4)), (1, 2), 1 / 2, 1 / 3, 2, 2, 1),
        # the full array, and without its last column: distances 7 × 0 and 3 × 0.5 mm; and 7 × 0 and 1 × 0.5 mm
        (FULL, block((3, 4), (0, 3), (0, 3)), (1, 0.5), 18 / 21, 9 / 12, 0.5, 0.5, 2 / 18),
    ],
)
def test_small_masks_match_hand_computed_values(prediction, reference, spacing, dice, iou, hd, hd95, assd):
    values = score(prediction, reference, spacing)
    named = {"dice": dice, "iou": iou, "hd_mm": hd, "hd95_mm": hd95, "assd_mm": assd}
    assert {metric: values[metric] for metric in named} == pytest.approx(named, rel=1e-12)


def test_two_single_voxels_match_hand_computed_values():
    a, b = block((8, 9, 10), (1, 2), (1, 2), (1, 2)), block((8, 9, 10), (4, 5), (1, 2), (3, 4))
    values = score(a, b, (1.0, 0.5, 2.0))
    # distances of 3 × 1 mm and 2 × 2 mm along two axes: 5 mm
    assert values == {
        "dice": 0, "iou": 0, "precision": 0, "recall": 0, "nsd_1mm": 0, "nsd_2mm": 0,
        "hd_mm": 5, "hd95_mm": 5, "assd_mm": 5, "volume_ml": 0.001, "reference_volume_ml": 0.001,
    }  # fmt: skip


def test_shifted_cubes_match_hand_computed_values():
    # two cubes of 4³ voxels, the prediction shifted by one voxel along the axis with 1.5 mm
    reference = block((12, 12, 12), (3, 7), (3, 7), (3, 7))
    prediction = block((12, 12, 12), (4, 8), (3, 7), (3, 7))
    values = score(prediction, reference, (1.5, 1.0, 1.0))
    assert values["dice"] == pytest.approx(2 * 48 / 128)
    assert values["iou"] == pytest.approx(48 / 80)
    assert values["precision"] == values["recall"] == pytest.approx(48 / 64)
    assert values["volume_ml"] == pytest.approx(64 * 1.5 / 1000)
    # The border of a 4³ cube has 64 - 8 voxels. In the prediction, 12 rim voxels in each of the planes x = 4, 5, 6 lie
    # on the border of the reference, the inner 4 of x = 4 are 1 mm from it, and the 16 of x = 7 are 1.5 mm from x = 6.
    directed = np.array([0.0] * 36 + [1.0] * 4 + [1.5] * 16)
    assert values["hd_mm"] == pytest.approx(1.5)
    assert values["hd95_mm"] == pytest.approx(1.5)
    assert values["assd_mm"] == pytest.approx(directed.mean())
    assert values["nsd_1mm"] == pytest.approx(40 / 56)
    assert values["nsd_2mm"] == 1


def test_hd95_is_the_larger_directed_percentile_not_the_pooled_percentile():
    # The prediction has a stray pixel outside the line of the reference; only distances from the prediction include it.
    reference = block((4, 60), (1, 2), (0, 19))
    prediction = reference | block((4, 60), (1, 2), (58, 59))
    values = score(prediction, reference, (1.0, 1.0))
    forth = np.array([0.0] * 19 + [40.0])
    assert values["hd_mm"] == 40  # from column 58 to column 18
    assert values["hd95_mm"] == pytest.approx(np.percentile(forth, 95))
    assert np.percentile(np.concatenate([forth, np.zeros(19)]), 95) < values["hd95_mm"]


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, np.float32])
def test_any_non_zero_value_is_foreground(dtype):
    """The values 4 and 3 have no bit in common."""
    prediction, reference = blob(np.random.default_rng(0), (9, 12, 11)), blob(np.random.default_rng(1), (9, 12, 11))
    expected = score(prediction, reference, (2, 1, 1))
    assert score(prediction.astype(dtype) * 4, reference.astype(dtype) * 3, (2, 1, 1)) == expected


def test_slices_are_measured_in_square_millimetres():
    values = score(block((5, 5), (0, 2), (0, 3)), block((5, 5), (0, 2), (0, 3)), (0.5, 2.0))
    assert (values["area_mm2"], values["reference_area_mm2"]) == (6, 6)
    assert "volume_ml" not in values
    assert set(values) <= set(COLUMNS)


def test_a_mask_has_a_border_at_the_edge_of_the_array():
    full = np.ones((5, 5, 5), bool)
    values = score(full, block((5, 5, 5), (0, 5), (0, 5), (0, 4)), (1, 1, 1))
    assert values["hd_mm"] == 1  # from the last plane to the plane before it


def mask_pairs(rng, shape):
    """Yield pairs of masks: random, one inside the other, single voxels, opposite corners, the full array."""
    for _ in range(10):
        prediction, reference = blob(rng, shape), blob(rng, shape)
        within = prediction & reference
        yield (within if within.any() and rng.random() < 0.5 else prediction), reference
    one, corners, full = np.zeros(shape, bool), np.zeros(shape, bool), np.ones(shape, bool)
    one[tuple(side // 2 for side in shape)] = True
    corners[(0,) * len(shape)] = corners[(-1,) * len(shape)] = True
    yield from ((one, reference), (one, one), (corners, one), (full, corners), (full, one), (reference, full))


def score_with_monai(prediction, reference, spacing):
    p, r = (torch.from_numpy(mask)[None, None].float() for mask in (prediction, reference))
    shared = {"include_background": True, "spacing": spacing}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        values = {
            "dice": monai.compute_dice(p, r),
            "iou": monai.compute_iou(p, r),
            "hd_mm": monai.compute_hausdorff_distance(p, r, **shared),
            "hd95_mm": monai.compute_hausdorff_distance(p, r, percentile=95, **shared),
            "assd_mm": monai.compute_average_surface_distance(p, r, symmetric=True, **shared),
            "nsd_1mm": monai.compute_surface_dice(p, r, class_thresholds=[1.0], **shared),
            "nsd_2mm": monai.compute_surface_dice(p, r, class_thresholds=[2.0], **shared),
        }
    return {metric: value.item() for metric, value in values.items()}


def score_with_simpleitk(prediction, reference, spacing):
    images = []
    for mask in (prediction, reference):
        # padded, because SimpleITK has no contour at the edge of the array
        image = sitk.GetImageFromArray(np.pad(mask, 1).astype(np.uint8))
        image.SetSpacing([float(mm) for mm in spacing[::-1]])
        images.append(image)
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(images[1], images[0])
    contours = [sitk.LabelContour(image, fullyConnected=False) for image in images]
    maps = [
        np.abs(sitk.GetArrayFromImage(sitk.SignedMaurerDistanceMap(c, squaredDistance=False, useImageSpacing=True)))
        for c in contours
    ]
    borders = [sitk.GetArrayFromImage(contour) > 0 for contour in contours]
    forth, back = maps[1][borders[0]], maps[0][borders[1]]
    pooled = np.concatenate([forth, back])
    return {
        "dice": overlap.GetDiceCoefficient(),
        "iou": overlap.GetJaccardCoefficient(),
        "hd_mm": pooled.max(),
        "hd95_mm": max(np.percentile(forth, 95), np.percentile(back, 95)),
        "assd_mm": pooled.mean(),
        "nsd_1mm": np.mean(pooled <= 1 + 1e-6),
        "nsd_2mm": np.mean(pooled <= 2 + 1e-6),
    }


# The differences come from float32 in the other packages. Measured with MONAI: 7e-7 for HD95, whose percentile it
# interpolates, and 2e-7 for the other metrics.
@pytest.mark.parametrize(
    ("shape", "spacing"),
    [((24, 20, 16), (1, 1, 1)), ((24, 20, 16), (0.625, 0.7, 2.5)), ((32, 28), (0.8, 1.3)), ((20, 31), (0.625, 0.625))],
)
@pytest.mark.parametrize("compute", [score_with_monai, score_with_simpleitk])
def test_metrics_agree_with_other_packages(compute, shape, spacing):
    worst = {}
    for prediction, reference in mask_pairs(np.random.default_rng(0), shape):
        ours = score(prediction, reference, spacing)
        for metric, value in compute(prediction, reference, spacing).items():
            worst[metric] = max(worst.get(metric, 0.0), abs(ours[metric] - value) / max(1.0, value))
    assert len(worst) == 7
    assert worst.pop("hd95_mm") < 2e-6, worst
    assert max(worst.values()) < 4e-7, worst


@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("compute", [score_with_monai, score_with_simpleitk])
def test_a_volume_of_one_slice_has_the_distances_of_that_slice(compute, axis):
    spacing = np.insert((0.8, 1.3), axis, 10.0)
    for prediction, reference in mask_pairs(np.random.default_rng(0), (32, 28)):
        volume = score(np.expand_dims(prediction, axis), np.expand_dims(reference, axis), spacing)
        plane = compute(prediction, reference, (0.8, 1.3))
        assert {metric: volume[metric] for metric in plane} == pytest.approx(plane, rel=2e-6, abs=2e-6)
        assert volume["volume_ml"] == pytest.approx(prediction.sum() * 0.8 * 1.3 * 10 / 1000, rel=1e-12)


def test_equal_masks_get_perfect_scores_and_metrics_are_symmetric():
    rng = np.random.default_rng(1)
    a, b = blob(rng, (20, 18, 12)), blob(rng, (20, 18, 12))
    spacing = (0.6, 0.9, 2.0)
    same = score(a, a, spacing)
    assert all(same[metric] == 1 for metric in OVERLAPS)
    assert all(same[metric] == 0 for metric in DISTANCES)
    forth, back = score(a, b, spacing), score(b, a, spacing)
    for metric in ("dice", "iou", "nsd_1mm", "nsd_2mm", *DISTANCES):
        assert forth[metric] == pytest.approx(back[metric], rel=1e-12)
    assert forth["precision"] == back["recall"]
    assert forth["volume_ml"] == back["reference_volume_ml"]


def test_metrics_do_not_change_when_both_masks_move():
    rng = np.random.default_rng(2)
    a, b = (np.pad(blob(rng, (12, 12, 12)), 6) for _ in range(2))
    moved = score(np.roll(a, (3, -4, 5), (0, 1, 2)), np.roll(b, (3, -4, 5), (0, 1, 2)), (0.6, 0.9, 2.0))
    assert moved == pytest.approx(score(a, b, (0.6, 0.9, 2.0)), rel=1e-12)


def test_axes_may_be_permuted_with_their_spacing():
    rng = np.random.default_rng(3)
    a, b = blob(rng, (14, 12, 10)), blob(rng, (14, 12, 10))
    permuted = score(a.transpose(2, 0, 1), b.transpose(2, 0, 1), (2.0, 0.6, 0.9))
    assert permuted == pytest.approx(score(a, b, (0.6, 0.9, 2.0)), rel=1e-12)


def test_distances_scale_with_the_spacing_and_overlaps_do_not():
    rng = np.random.default_rng(4)
    a, b = blob(rng, (14, 12, 10)), blob(rng, (14, 12, 10))
    once, twice = score(a, b, (0.5, 0.5, 1.5)), score(a, b, (1.0, 1.0, 3.0))
    assert twice["dice"] == once["dice"]
    assert twice["volume_ml"] == pytest.approx(8 * once["volume_ml"])
    for metric in DISTANCES:
        assert twice[metric] == pytest.approx(2 * once[metric], rel=1e-12)


def test_a_distance_equal_to_the_tolerance_is_within_it():
    a, b = block((6, 6), (1, 2), (1, 2)), block((6, 6), (2, 3), (2, 3))
    for spacing in ((0.6, 0.8), (0.28, 0.96), (0.1**0.5, 0.9**0.5)):
        assert score(a, b, spacing)["nsd_1mm"] == 1


@pytest.mark.parametrize("empty", ["one", "zero", "skip"])
def test_a_missed_structure_gets_the_worst_score_under_every_policy(empty):
    shape, spacing = (10, 20, 30), (1.0, 0.5, 0.2)
    box, nothing = block(shape, (4, 6), (4, 6), (4, 6)), np.zeros(shape, bool)
    missed = score(nothing, box, spacing, empty)
    diagonal = (10**2 + 10**2 + 6**2) ** 0.5  # the array's diagonal, not that of the mask's bounding box
    assert [missed[metric] for metric in OVERLAPS] == [0] * len(OVERLAPS)
    assert [missed[metric] for metric in DISTANCES] == pytest.approx([diagonal] * 3)
    assert missed["volume_ml"] == 0
    assert missed["reference_volume_ml"] > 0


def test_all_metrics_are_tested_here():
    assert tuple(METRICS) == ALL_METRICS


def test_each_policy_for_an_empty_reference():
    shape, spacing = (3, 4), (1.0, 1.0)
    pixel, nothing = block(shape, (1, 2), (1, 2)), np.zeros(shape, bool)
    perfect, worst = [1] * len(OVERLAPS) + [0] * 3, [0] * len(OVERLAPS) + [5] * 3
    expected = {"one": (perfect, worst), "zero": (worst, worst), "skip": ([None] * len(ALL_METRICS),) * 2}
    for empty, (both_empty, false_positive) in expected.items():
        assert [score(nothing, nothing, spacing, empty)[m] for m in ALL_METRICS] == both_empty
        assert [score(pixel, nothing, spacing, empty)[m] for m in ALL_METRICS] == false_positive


def test_all_values_are_finite_and_no_distance_exceeds_the_diagonal():
    rng = np.random.default_rng(5)
    for _ in range(100):
        shape = tuple(rng.integers(1, 6, size=3))
        a, b = (rng.random(shape) < rng.choice([0, 0.1, 0.5, 1]) for _ in range(2))
        values = score(a, b, (0.5, 1.0, 2.0))
        assert np.isfinite(list(values.values())).all()
        assert all(values[metric] <= np.linalg.norm(np.multiply(shape, (0.5, 1.0, 2.0))) for metric in DISTANCES)


def test_masks_that_cannot_be_scored_are_refused():
    mask = np.zeros((3, 3, 3), bool)
    with pytest.raises(InputError, match="shape"):
        score(mask, mask[:2], (1, 1, 1))
    with pytest.raises(InputError, match="3 dimensions and 2 spacings"):
        score(mask, mask, (1, 1))
    with pytest.raises(InputError, match=r"^empty='none': unknown policy\. Use one of one, zero, skip\.$"):
        score(mask, mask, (1, 1, 1), empty="none")
