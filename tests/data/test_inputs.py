"""Conversion of slices to the network's square input and back: positions, grey values and classes."""

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.ndimage import center_of_mass

from jaxla.data.inputs import (
    Canvas,
    Frame,
    find_neighbours,
    image_to_input,
    input_to_slice,
    intensity_range,
    mask_to_input,
    smallest_extent,
    structure_extent,
)

# --- the frame -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pixels", [96, 448, 576, 640])
def test_a_square_slice_fills_the_input(pixels):
    assert Canvas(448).frame((pixels, pixels), (0.625, 0.625)) == Frame(448, 0, 0, 448, 448)


@pytest.mark.parametrize(
    ("shape", "spacing", "expected"),
    [
        ((50, 100), (1, 1), Frame(96, 24, 0, 48, 96)),  # wide: padding above and below
        ((100, 50), (1, 1), Frame(96, 0, 24, 96, 48)),  # tall: padding left and right
        ((100, 100), (0.5, 1), Frame(96, 24, 0, 48, 96)),  # the aspect ratio in mm is kept
        ((50, 100), (2, 1), Frame(96, 0, 0, 96, 96)),
        ((10, 96), (1, 1), Frame(96, 43, 0, 10, 96)),
        ((11, 96), (1, 1), Frame(96, 42, 0, 11, 96)),  # odd padding: one row more below
        ((1, 1000), (1, 1), Frame(96, 47, 0, 1, 96)),  # at least one row
    ],
)
def test_a_slice_keeps_its_aspect_ratio_in_mm_and_is_centred(shape, spacing, expected):
    assert Canvas(96).frame(shape, spacing) == expected


@pytest.mark.parametrize("size", [96, 448])
def test_frames_of_any_shape_fill_the_longer_side_and_are_centred(size):
    rng = np.random.default_rng(0)
    for _ in range(300):
        shape, spacing = tuple(rng.integers(20, 700, 2)), tuple(rng.uniform(0.3, 3, 2))
        frame = Canvas(size).frame(shape, spacing)
        assert max(frame.height, frame.width) == size
        assert 0 <= frame.size - frame.height - 2 * frame.top <= 1
        assert 0 <= frame.size - frame.width - 2 * frame.left <= 1
        mm_per_pixel = [n * mm / side for n, mm, side in zip(shape, spacing, (frame.height, frame.width), strict=True)]
        # the shorter side is rounded to whole pixels, so it is off by at most half a pixel
        assert abs(mm_per_pixel[0] / mm_per_pixel[1] - 1) <= 0.5 / (min(frame.height, frame.width) - 0.5)


# --- slice to input --------------------------------------------------------------------------------------------------


def test_the_intensity_range_falls_back_to_extremes_if_the_percentiles_are_equal():
    assert intensity_range(np.arange(1001)) == (5, 995)
    outlier = np.zeros(1001)
    outlier[3] = 8
    assert intensity_range(outlier) == (0, 8)


def test_without_resizing_only_the_grey_values_change():
    pixels = np.array([[0, 10], [20, 40]], np.int16)
    grey = image_to_input(pixels, (10, 30), Frame(2, 0, 0, 2, 2))
    assert grey.shape == (2, 2, 1)
    assert grey.dtype == np.float32
    assert grey[..., 0].tolist() == [[0, 0], [0.5, 1]]  # clipped to 0 and 1
    assert mask_to_input(pixels.astype(np.uint8), Frame(2, 0, 0, 2, 2)).tolist() == [[0, 10], [20, 40]]


@pytest.mark.parametrize("dtype", ["u1", "i2", ">i2", "i4", "f4"])
def test_scans_of_every_type_give_the_same_input(dtype):
    pixels = np.random.default_rng(0).integers(0, 250, (30, 40))
    frame = Canvas(96).frame((30, 40), (1, 1))
    expected = image_to_input(pixels.astype(np.float32), (5, 200), frame)
    np.testing.assert_array_equal(image_to_input(pixels.astype(dtype), (5, 200), frame), expected)


def test_values_lie_in_0_to_1_and_padding_is_0():
    rng = np.random.default_rng(0)
    for shape in ((20, 33), (200, 130), (96, 50)):
        frame = Canvas(96).frame(shape, (1, 1))
        pixels = rng.normal(500, 300, shape).astype(np.float32)
        inside = np.zeros((96, 96), bool)
        inside[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = True
        grey = image_to_input(pixels, (100, 900), frame)[..., 0]
        assert grey.min() == 0
        assert 0.8 < grey.max() <= 1  # below 1 where shrinking averages pixels
        assert not grey[~inside].any()
        mask = mask_to_input(np.ones(shape, np.uint8), frame)
        np.testing.assert_array_equal(mask, inside)


@pytest.mark.parametrize("shape", [(20, 20), (20, 30), (47, 33), (200, 200), (130, 200), (576, 640)])
def test_grey_values_are_resized_like_pytorch_with_antialiasing(shape):
    pixels = np.random.default_rng(0).random(shape, np.float32)
    frame = Canvas(96).frame(shape, (1, 1))
    ours = image_to_input(pixels, (0, 1), frame)[frame.top :, frame.left :][: frame.height, : frame.width, 0]
    theirs = torch.nn.functional.interpolate(
        torch.from_numpy(pixels)[None, None], (frame.height, frame.width), mode="bilinear", antialias=True
    )[0, 0]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=5e-6)  # measured: 3.3e-6


def test_bilinear_resizing_matches_a_worked_example():
    """A row 0, 1 is doubled: relative to the two old centres, 0 and 1, the new ones are -1/4, 1/4, 3/4 and 5/4."""
    row = image_to_input(np.array([[0, 1], [0, 1]], np.float32), (0, 1), Frame(4, 0, 0, 4, 4))[1, :, 0]
    assert row.tolist() == [0, 0.25, 0.75, 1]


def test_mask_pixels_get_the_class_that_covers_them():
    row = np.array([[1, 2, 3]], np.uint8)
    assert mask_to_input(row, Frame(6, 0, 0, 1, 6))[0].tolist() == [1, 1, 2, 2, 3, 3]
    # in units of the three pixels, the centres of the five are 0.3, 0.9, 1.5, 2.1 and 2.7
    assert mask_to_input(row, Frame(5, 0, 0, 1, 5))[0].tolist() == [1, 1, 2, 3, 3]
    nine = np.array([[1, 1, 2, 2, 3, 3, 4, 5, 4]], np.uint8)
    assert mask_to_input(nine, Frame(3, 0, 0, 1, 3))[0].tolist() == [1, 3, 4]
    assert mask_to_input(row, Frame(6, 2, 0, 1, 6))[:, 0].tolist() == [0, 0, 1, 0, 0, 0]


@pytest.mark.parametrize(("pixels", "size"), [(192, 96), (576, 320), (100, 180)])
@pytest.mark.parametrize(("smallest", "largest"), [(2, 6), (15, 40)])
def test_structures_keep_their_position_and_area(pixels, size, smallest, largest):
    """Nearest-neighbour resizing to half the size would move structures by a quarter of an input pixel."""
    rng, frame = np.random.default_rng(0), Canvas(size).frame((pixels, pixels), (1, 1))
    scale = pixels / size
    rows, columns = np.indices((pixels, pixels))
    moved, areas = [], []
    for _ in range(300):
        centre, radii = rng.uniform(45, 55, 2), rng.uniform(smallest, largest, 2)
        ellipse = ((rows - centre[0]) / radii[0]) ** 2 + ((columns - centre[1]) / radii[1]) ** 2 < 1
        mask = mask_to_input(ellipse.astype(np.uint8), frame)
        moved.append(np.array(center_of_mass(mask)) - ((np.array(center_of_mass(ellipse)) + 0.5) / scale - 0.5))
        areas.append((mask.sum() * scale**2, ellipse.sum()))
    assert np.abs(np.mean(moved, axis=0)).max() < 0.015  # input pixels; measured: 0.011
    assert abs(np.divide(*np.sum(areas, axis=0)) - 1) < 0.03  # measured: 0.023, for the small ellipses


def test_one_enlarged_pixel_stays_a_square():
    one = np.zeros((5, 5), np.uint8)
    one[1, 3] = 7
    np.testing.assert_array_equal(mask_to_input(one, Frame(20, 0, 0, 20, 20)), np.kron(one, np.ones((4, 4), np.uint8)))


def test_pixels_that_two_classes_share_equally_alternate():
    half = np.repeat(np.array([[0, 0, 0, 5, 5, 5]], np.uint8), 6, axis=0)
    assert mask_to_input(half, Frame(3, 0, 0, 3, 3)).tolist() == [[0, 0, 5], [0, 5, 5], [0, 0, 5]]


def test_resizing_a_mask_adds_no_class():
    mask = np.random.default_rng(0).choice([0, 3, 7], (200, 133)).astype(np.uint8)
    for size in (96, 448):
        assert set(np.unique(mask_to_input(mask, Canvas(size).frame(mask.shape, (1, 1))))) == {0, 3, 7}


# --- input to slice --------------------------------------------------------------------------------------------------


def blob(shape, spacing, centre_mm, radius_mm):
    """Return a smooth bump of height 1, [H, W] float32."""
    rows, columns = ((np.arange(n) + 0.5) * mm for n, mm in zip(shape, spacing, strict=True))
    squared = (rows[:, None] - centre_mm[0]) ** 2 + (columns - centre_mm[1]) ** 2
    return np.exp(-squared / radius_mm**2 * 2).astype(np.float32)


def centre_mm(pixels, spacing):
    return (np.array(center_of_mass(pixels)) + 0.5) * spacing


SLICES = [
    ((160, 160), (1, 1)),
    ((576, 576), (0.625, 0.625)),
    ((120, 200), (1.3, 0.7)),
    ((35, 51), (1, 1)),
    ((640, 300), (0.625, 1.1)),
]


@pytest.mark.parametrize(("shape", "spacing"), SLICES, ids=str)
@pytest.mark.parametrize("size", [96, 448])
def test_a_blob_keeps_its_position_through_input_and_back(shape, spacing, size):
    extent = np.multiply(shape, spacing)
    for position in ((0.3, 0.35), (0.5, 0.5), (0.65, 0.7)):
        image = blob(shape, spacing, extent * position, 0.12 * min(extent))
        frame = Canvas(size).frame(shape, spacing)
        grey = image_to_input(image, (0, 1), frame)
        back = input_to_slice(grey, frame, shape)
        assert back.shape == (*shape, 1)
        assert back.dtype == np.float32
        moved = centre_mm(back[..., 0], spacing) - centre_mm(image, spacing)
        # mm; measured: 0.0059 for the slice with 35 × 51 pixels, whose bump is cut off most, 0.0009 for the rest
        assert np.abs(moved).max() < (0.008 if shape == (35, 51) else 0.0015)


@pytest.mark.parametrize(("shape", "spacing"), SLICES, ids=str)
@pytest.mark.parametrize("size", [96, 448])
def test_image_and_mask_of_one_structure_coincide_in_the_input(shape, spacing, size):
    extent = np.multiply(shape, spacing)
    frame = Canvas(size).frame(shape, spacing)
    bump = blob(shape, spacing, extent * (0.4, 0.55), 0.12 * min(extent))
    disc = (bump > 0.2).astype(np.uint8)

    def expected(pixels):  # position in the input, in pixels, to which the frame maps a centre
        return centre_mm(pixels, spacing) / extent * (frame.height, frame.width) + (frame.top, frame.left) - 0.5

    grey = image_to_input(bump, (0, 1), frame)[..., 0]
    assert np.abs(center_of_mass(grey) - expected(bump)).max() < 0.003  # input pixels; measured: 0.0024
    mask = mask_to_input(disc, frame)
    assert np.abs(center_of_mass(mask) - expected(disc)).max() < 0.12  # measured: 0.094


@pytest.mark.parametrize(("shape", "spacing"), SLICES, ids=str)
def test_a_mask_is_almost_unchanged_through_input_and_back(shape, spacing):
    extent = np.multiply(shape, spacing)
    disc = blob(shape, spacing, extent * (0.45, 0.5), 0.4 * min(extent)) > 0.5
    frame = Canvas(448).frame(shape, spacing)
    back = input_to_slice(mask_to_input(disc.astype(np.uint8), frame)[..., None].astype(np.float32), frame, shape)
    back = back[..., 0] > 0.5
    dice = 2 * np.count_nonzero(back & disc) / (np.count_nonzero(back) + np.count_nonzero(disc))
    assert dice >= 0.998  # measured: 0.99838 where slices of more than 448 pixels shrink, otherwise 1


def test_channels_are_resized_independently():
    rng = np.random.default_rng(0)
    frame = Canvas(96).frame((60, 100), (1, 1))
    channels = rng.random((96, 96, 3), np.float32)
    group_commands = input_to_slice(channels, frame, (60, 100))
    assert (group_commands.shape, group_commands.dtype) == ((60, 100, 3), np.float32)
    for k in range(3):
        alone = input_to_slice(channels[..., k : k + 1], frame, (60, 100))
        np.testing.assert_array_equal(group_commands[..., k], alone[..., 0])


def test_probabilities_still_sum_to_1_on_the_slice():
    values = np.random.default_rng(0).random((96, 96, 4), np.float32)
    values /= values.sum(-1, keepdims=True)
    for shape in ((40, 60), (200, 300)):
        back = input_to_slice(values, Canvas(96).frame(shape, (1, 1)), shape)
        np.testing.assert_allclose(back.sum(-1), 1, rtol=0, atol=1e-6)
        assert back.min() >= 0


def test_padding_never_reaches_the_slice():
    frame = Canvas(96).frame((30, 60), (1, 1))
    probabilities = np.ones((96, 96, 1), np.float32)
    probabilities[frame.top : frame.top + frame.height, frame.left : frame.left + frame.width] = 0
    assert not input_to_slice(probabilities, frame, (30, 60)).any()


# --- one square for all slices ---------------------------------------------------------------------------------------


def test_the_largest_slice_fills_the_input_and_smaller_slices_are_centred():
    slices = [((576, 576), (0.625, 0.625)), ((640, 640), (0.625, 0.625)), ((400, 500), (0.625, 0.625))]
    canvas = Canvas(320, smallest_extent(slices))
    assert canvas.extent == 400.0
    assert [canvas.frame(*geometry) for geometry in slices] == [
        Frame(320, 16, 16, 288, 288), Frame(320, 0, 0, 320, 320), Frame(320, 60, 35, 200, 250),
    ]  # fmt: skip
    assert not any(canvas.frame(*geometry).is_cropped for geometry in slices)


@pytest.mark.parametrize(
    ("rows", "columns", "expected"),
    [
        ((4, 6), (9, 11), 10.0),  # 10 × 20 pixels of 2 × 5 mm: 1 pixel on each side of the centre
        ((0, 6), (9, 11), 20.0),  # the whole slice from the centre to its first row
        ((4, 6), (10, 18), 80.0),  # 8 columns of 5 mm on one side
    ],
)
def test_the_extent_of_structures_is_the_side_of_a_square_in_the_centre(rows, columns, expected):
    mask = np.zeros((3, 10, 20), np.uint8)
    mask[1, slice(*rows), slice(*columns)] = 2
    assert structure_extent(mask, (2.0, 5.0)) == expected
    assert structure_extent(0 * mask, (2.0, 5.0)) == 0


def test_the_result_equals_padding_followed_by_resizing():
    """The expected result is the slice padded to the largest size, then halved; values inside the slice are equal."""
    pixels = np.random.default_rng(0).random((24, 28), dtype=np.float32)
    padded = np.pad(pixels, ((8, 8), (6, 6)))
    halved = np.asarray(Image.fromarray(padded).resize((20, 20), Image.Resampling.BILINEAR))
    ours = image_to_input(pixels, (0, 1), Canvas(20, 40.0).frame(pixels.shape, (1, 1)))[..., 0]
    np.testing.assert_allclose(ours[5:-5, 4:-4], halved[5:-5, 4:-4], atol=1e-6)  # measured: 6e-8
    assert not ours[:4].any()
    assert not ours[:, :3].any()


def test_a_larger_slice_is_cropped_to_its_centre_and_the_rest_becomes_background():
    shape, canvas = (60, 100), Canvas(32, 40.0)
    frame = canvas.frame(shape, (1, 1))
    assert (frame.height, frame.width, frame.top, frame.left) == (48, 80, -8, -24)
    assert frame.is_cropped
    mask = np.zeros(shape, np.uint8)
    mask[10:50, 30:70] = 1  # the part within the canvas
    np.testing.assert_array_equal(mask_to_input(mask, frame), np.ones((32, 32)))
    grey = np.tile(np.linspace(0, 1, 100, dtype=np.float32), (60, 1))
    expected = np.interp(np.arange(32) * 1.25 + 30.125, np.arange(100), grey[0])
    np.testing.assert_allclose(image_to_input(grey, (0, 1), frame)[16, :, 0], expected, atol=1e-3)
    single = input_to_slice(np.ones((32, 32, 1), np.float32), frame, shape)
    assert (single.shape, single.dtype) == ((60, 100, 1), np.float32)
    np.testing.assert_array_equal(single[12:48, 32:68, 0], 1)
    assert not single[:8].any()
    assert not single[:, :28].any()
    several = input_to_slice(np.full((32, 32, 3), 1 / 3, np.float32), frame, shape)
    np.testing.assert_allclose(several.sum(-1), 1, atol=1e-6)
    np.testing.assert_array_equal(several[0, 0], [1, 0, 0])


@pytest.mark.parametrize(
    ("index", "spacing", "neighbours", "expected"),
    [
        (5, 2.5, 0, [5]),
        (5, 2.5, 1, [4, 5, 6]),
        (5, 1.25, 1, [3, 5, 7]),
        *[(5, spacing, 1, [3, 5, 7]) for spacing in (0.999999, 1.0, 1.000001)],
        (5, 10.0, 2, [3, 4, 5, 6, 7]),
        (0, 1.25, 2, [0, 0, 0, 2, 4]),
        (9, 2.5, 1, [8, 9, 9]),
    ],
)
def test_neighbours_are_the_slices_about_2_5_mm_apart(index, spacing, neighbours, expected):
    assert find_neighbours(index, 10, spacing, neighbours) == expected
