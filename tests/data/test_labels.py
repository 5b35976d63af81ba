"""The option `data.labels`: the classes of mask values, and the mask values of classes."""

import numpy as np
import pytest

from jaxla.config import Data, InputError
from jaxla.data.labels import Labels, parse_labels


@pytest.mark.parametrize(
    ("text", "labels"),
    [
        ("LA:1", Labels(("LA",), ((1,),))),
        ("anterior:1;posterior:2", Labels(("anterior", "posterior"), ((1,), (2,)))),
        ("hippocampus:1,2", Labels(("hippocampus",), ((1, 2),))),
        ("LA:1;background:2,3", Labels(("LA",), ((1,),), (2, 3))),
        ("background:0,2;LA:420", Labels(("LA",), ((420,),), (2,))),
        (" left atrium : 1 , 2 ; LA-wall:3", Labels(("left atrium", "LA-wall"), ((1, 2), (3,)))),
    ],
)
def test_labels_are_read_from_text(text, labels):
    assert parse_labels(text) == labels


@pytest.mark.parametrize(
    "text",
    [
        "LA", "LA:", ":1", "LA:one", "LA:-1", "LA:1.5", "LA:" + "1" * 5000, "LA=1", "LA:1;", "LA:1,",
        "LA:1;LA:2", "LA:1;wall:1", "LA:1,1", "LA:0", "background:1",
    ],
)  # fmt: skip
def test_labels_that_cannot_be_parsed_are_an_error_with_an_example(text):
    with pytest.raises(InputError, match=f"^data.labels='{text}': .*Use LA:1, for example"):
        parse_labels(text)


def test_classes_and_values_of_several_structures():
    labels = parse_labels("front:5,6;back:2;background:9")
    mask = np.array([0, 5, 6, 2, 9])
    classes = labels.to_classes(mask, "m")
    assert classes.tolist() == [0, 1, 1, 2, 0]
    assert classes.dtype == np.uint8
    assert labels.to_values(classes).tolist() == [0, 5, 5, 2, 0]  # the first value of each class
    assert labels.outputs == 3
    assert labels.describe() == "front: 5/6, back: 2"


def test_all_other_values_can_be_background():
    """An example is a brain mask with many labels, one of which is the structure."""
    labels = parse_labels("hippocampus:1,2;background:rest")
    assert labels.to_classes(np.array([0, 1, 2, 3, 50]), "m").tolist() == [0, 1, 1, 0, 0]
    assert labels.describe() == "hippocampus: 1/2; all other values are background"
    assert Data(labels="hippocampus:1,2", other_labels="background").all_labels == "hippocampus:1,2;background:rest"
    assert Data(labels="hippocampus:1,2").all_labels == "hippocampus:1,2"
    assert parse_labels("LA:1 ; background: rest").ignored is None
    for text in ("background:rest", "background:rest;LA:1", "LA:1;background:rest;background:rest"):
        with pytest.raises(InputError, match=r"expected name:value|names no class"):
            parse_labels(text)


@pytest.mark.parametrize(("value", "dtype"), [(1, "u1"), (255, "u1"), (256, "i2"), (32767, "i2")])
def test_mask_values_have_the_smallest_common_dtype(value, dtype):
    values = parse_labels(f"LA:{value}").to_values(np.array([0, 1], np.uint8))
    assert values.tolist() == [0, value]
    assert values.dtype == np.dtype(dtype)


def test_255_classes_are_supported_and_256_are_refused():
    names = [f"c{n}:{n}" for n in range(1, 257)]
    classes = parse_labels(";".join(names[:255])).to_classes(np.array([0, 1, 255]), "m")
    assert classes.tolist() == [0, 1, 255]
    with pytest.raises(InputError, match=r"names 256 classes, but at most 255 are supported\. Use LA:1, for example"):
        parse_labels(";".join(names))


def test_a_value_too_large_for_masks_is_refused():
    with pytest.raises(InputError, match="the value 65536 is more than a mask can hold"):
        parse_labels("LA:65536")


@pytest.mark.parametrize("value", [32768, 65535])
def test_large_mask_values_are_kept(value):
    assert parse_labels(f"LA:{value}").to_values(np.array([0, 1], np.uint8)).tolist() == [0, value]


def test_values_without_a_class_are_named_with_their_file():
    mask = np.array([0, 1, 2, 7, 7])
    with pytest.raises(InputError, match=r"^m.nii.gz: label values 2, 7 are not among the classes \(LA: 1\)\. "):
        parse_labels("LA:1").to_classes(mask, "m.nii.gz")
    assert parse_labels("LA:1;background:2,7").to_classes(mask, "m").tolist() == [0, 1, 0, 0, 0]


def test_several_values_in_a_mask_of_flat_pairs_are_refused(tmp_path):
    labels = Labels(("foreground",), one_value=True)
    assert labels.to_classes(np.array([0, 7, 7]), tmp_path / "m.nii.gz").tolist() == [0, 1, 1]
    with pytest.raises(
        InputError, match=r"m\.nii\.gz: holds the label values 1, 2, .* for example data\.labels='a:1;b:2'"
    ):
        labels.to_classes(np.array([0, 1, 2]), tmp_path / "m.nii.gz")
