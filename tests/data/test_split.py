"""The patient-level split: sizes, disjoint parts, reproducibility, and split files that do not fit the data."""

import json
import random

import pytest

from jaxla.config import Data, InputError
from jaxla.data.split import Split, make_split, read_split, write_split


def ids(count):
    return [f"train_{n}" for n in range(1, count + 1)]


def sizes(split):
    return len(split.train), len(split.val), len(split.test)


@pytest.mark.parametrize(
    ("count", "expected"),
    [(130, (91, 13, 26)), (60, (42, 6, 12)), (100, (70, 10, 20)), (10, (7, 1, 2)), (5, (3, 1, 1)), (3, (1, 1, 1))],
)
def test_parts_have_70_10_and_20_percent(count, expected):
    assert sizes(make_split(ids(count), Data())) == expected


@pytest.mark.parametrize("count", range(3, 151))
def test_every_patient_is_in_exactly_one_part_and_no_part_is_empty(count):
    split = make_split(ids(count), Data())
    assert sorted([*split.train, *split.val, *split.test]) == sorted(ids(count))
    assert min(sizes(split)) >= 1
    for part, fraction in zip(sizes(split), (0.7, 0.1, 0.2), strict=True):
        assert abs(part - fraction * count) <= (1.11 if count < 5 else 1)  # 3 patients: 1 for training, not 2.1


@pytest.mark.parametrize(
    ("count", "needed", "not_needed"),
    [
        (15, (10, 2, 3), (10, 2, 3)),
        (14, (10, 1, 3), (11, 0, 3)),
        (12, (9, 1, 2), (10, 0, 2)),
        (3, (1, 1, 1), (2, 0, 1)),
    ],
)
def test_few_patients_are_used_for_validation_only_if_validation_is_needed(count, needed, not_needed):
    drawn = {need: make_split(ids(count), Data(), needs_validation=need) for need in (True, False)}
    assert sizes(drawn[True]) == needed
    assert sizes(drawn[False]) == not_needed
    assert drawn[False].test == drawn[True].test
    assert make_split(ids(count), Data(validation="always"), needs_validation=False) == drawn[True]
    assert sizes(make_split(ids(count), Data(validation="never"))) == (count - needed[2], 0, needed[2])


def test_split_all_uses_every_patient_for_training():
    split = make_split(ids(12), Data(split="all"))
    assert sizes(split) == (12, 0, 0)
    assert sorted(split.train) == sorted(ids(12))
    few = make_split(ids(12), Data(split="all", train_patients=5))
    assert few == Split(split.train[:5], (), (), unused=split.train[5:])
    assert make_split(ids(12), Data(split="all", split_seed=1)).train != split.train
    folds = [make_split(ids(12), Data(split="all"), str(k)) for k in range(5)]
    assert sorted(name for fold in folds for name in fold.val) == sorted(ids(12))
    assert {fold.test for fold in folds} == {()}


def test_the_split_does_not_depend_on_the_order_of_the_patients():
    shuffled = random.Random(1).sample(ids(60), 60)
    assert make_split(ids(60), Data()) == make_split(shuffled, Data())
    assert make_split(ids(60), Data()).sha256 == make_split(shuffled, Data()).sha256


def test_different_seeds_give_different_splits():
    parts = {make_split(ids(60), Data(split_seed=seed)).test for seed in range(20)}
    assert len(parts) == 20
    tested = {name for part in parts for name in part}
    assert (
        len(tested) > 55
    )  # 20 random test sets of 12 out of 60 patients miss a given patient with a probability of 1 %


def test_few_shot_protocols_are_nested_with_the_same_validation_and_test_patients():
    full = make_split(ids(60), Data())
    for count in range(1, 43):
        split = make_split(ids(60), Data(train_patients=count))
        assert split.train == full.train[:count]
        assert (split.val, split.test) == (full.val, full.test)
    assert make_split(ids(60), Data(train_patients=0)) == full


@pytest.mark.parametrize("seed", [0, 1, 7])
def test_subsets_by_number_and_by_percent_are_nested(seed):
    full = make_split(ids(60), Data(subset_seed=seed))
    by_percent = {p: make_split(ids(60), Data(train_percent=p, subset_seed=seed)) for p in (1, 25, 50, 75, 100)}
    assert {p: len(split.train) for p, split in by_percent.items()} == {1: 1, 25: 11, 50: 21, 75: 32, 100: 42}
    for split in by_percent.values():
        by_number = make_split(ids(60), Data(train_patients=len(split.train), subset_seed=seed))
        assert split == by_number
        assert split.train + split.unused == full.train


def test_another_subset_seed_changes_only_the_training_patients():
    full = make_split(ids(60), Data())
    firsts = set()
    for seed in range(1, 60):
        split = make_split(ids(60), Data(train_patients=1, subset_seed=seed))
        assert (split.val, split.test) == (full.val, full.test)
        assert sorted(split.train + split.unused) == sorted(full.train)
        firsts.update(split.train)
    assert len(firsts) > 25  # 59 draws out of 42 find 32 on average, and fewer than 26 with a probability below 1 %
    protocol = Data(train_patients=5, subset_seed=3)
    assert make_split(ids(60), protocol) == make_split(ids(60), protocol)


def test_different_splits_have_different_hashes():
    split = Split(("a", "b"), ("c",), ("d",))
    assert split.sha256 == Split(("a", "b"), ("c",), ("d",)).sha256
    others = [Split(("b", "a"), ("c",), ("d",)), Split(("a",), ("b", "c"), ("d",)), Split(("a", "b"), ("d",), ("c",))]
    assert len({other.sha256 for other in (split, *others)}) == 4


# --- the split file --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "content",
    ['{"train": ["train_2"], "val": [], "test": []}', '{"train": ["train_2"]}', '{"train": ["train_2"], "val": []}'],
)
def test_a_split_file_may_have_no_validation_and_test_cases(tmp_path, content):
    path = tmp_path / "split.json"
    path.write_text(content)
    split = make_split(ids(5), Data(split=str(path)))
    assert split == Split(("train_2",), (), ())
    write_split(split, path)
    assert json.loads(path.read_text()) == {"train": ["train_2"], "val": [], "test": []}


def test_a_written_split_can_be_used_again(tmp_path):
    split = make_split(ids(60), Data(split_seed=5))
    write_split(split, tmp_path / "split.json")
    again = make_split(ids(60), Data(split=str(tmp_path / "split.json"), split_seed=99))
    assert again == split
    assert again.sha256 == split.sha256
    few = make_split(ids(60), Data(split=str(tmp_path / "split.json"), train_patients=10))
    assert few == Split(split.train[:10], split.val, split.test, unused=split.train[10:])


def test_the_split_file_of_a_few_shot_run_lists_every_patient(tmp_path):
    few = make_split(ids(60), Data(train_patients=1))
    write_split(few, tmp_path / "split.json")
    full = make_split(ids(60), Data(split=str(tmp_path / "split.json")))
    assert full == make_split(ids(60), Data())


def test_a_split_file_has_three_lists_of_case_ids(tmp_path):
    write_split(Split(("b", "a"), ("c",), ("d",)), tmp_path / "split.json")
    assert json.loads((tmp_path / "split.json").read_text()) == {"train": ["b", "a"], "val": ["c"], "test": ["d"]}


def test_an_unreadable_split_file_is_named_with_its_option(tmp_path):
    path = tmp_path / "split.json"
    write_split(Split(("b", "a"), ("c",), ("d", "e")), path)
    assert read_split(path, "cases").test == ("d", "e")
    path.unlink()
    with pytest.raises(InputError, match=f"^cases={path}: cannot be read"):
        read_split(path, "cases")


def test_a_split_file_may_leave_cases_out(tmp_path):
    write_split(Split(("train_1",), ("train_2",), ("train_3",)), tmp_path / "split.json")
    split = make_split(ids(10), Data(split=str(tmp_path / "split.json")))
    assert split == Split(("train_1",), ("train_2",), ("train_3",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"train": ["train_1", "train_1"], "val": ["train_2"], "test": ["train_3"]}', "lists case train_1 twice"),
        ('{"train": ["train_1"], "val": ["train_2"], "test": ["train_1"]}', "lists case train_1 twice"),
        (
            '{"train": ["train_1", "x", "y"], "val": ["train_2"], "test": ["train_3"]}',
            r"case x is not .*\(2 such cases\)",
        ),
        ('{"train": [], "val": ["train_2"], "test": ["train_3"]}', "its list train is empty or missing"),
        ('{"val": ["train_2"], "test": ["train_3"]}', "its list train is empty or missing"),
        ('{"train": ["train_1"], "valid": ["train_2"]}', "has the unknown entry 'valid'.* lists train, val and test"),
        ('{"train": 1, "val": ["train_2"], "test": ["train_3"]}', "not a split file"),
        ('["train_1", "train_2", "train_3"]', "not a split file"),
        ("null", "not a split file"),
        ("train: train_1", "not a split file"),
        ("", "not a split file"),
        (b"\xff\xfe\x00", "not a split file"),
        (None, "cannot be read"),
    ],
)
def test_a_split_file_that_does_not_fit_the_data_is_named(tmp_path, content, message):
    path = tmp_path / "split.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=f"^data.split={path}: .*{message}"):
        make_split(ids(5), Data(split=str(path)))


def test_a_folder_instead_of_a_split_file_is_refused(tmp_path):
    with pytest.raises(InputError, match=f"^data.split={tmp_path}: cannot be read"):
        make_split(ids(5), Data(split=str(tmp_path)))


@pytest.mark.parametrize(("count", "found"), [(0, "0 patients"), (1, "1 patient"), (2, "2 patients")])
def test_fewer_than_three_patients_are_refused(count, found):
    with pytest.raises(InputError, match=f"^data.root: holds {found}, but .*at least 3.*data.split=all"):
        make_split(ids(count), Data())
    if count < 2:
        with pytest.raises(InputError, match=f"^data.root: holds {found}, but training and test need at least 2"):
            make_split(ids(count), Data(), needs_validation=False)


@pytest.mark.parametrize("count", [4, 10])
def test_the_error_for_too_many_training_patients_counts_those_available(count):
    message = rf"^data.train_patients={count}: there are only 3 training patients \(of 5 cases, 1 for validation, 1 "
    with pytest.raises(InputError, match=message):
        make_split(ids(5), Data(train_patients=count))
    assert sizes(make_split(ids(5), Data(train_patients=3))) == (3, 1, 1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_patients": -1}, "^data.train_patients=-1: must not be negative"),
        ({"train_percent": 0}, "^data.train_percent=0: must be above 0"),
        ({"train_percent": 101}, "^data.train_percent=101: must be .* at most 100"),
        ({"train_percent": float("nan")}, "^data.train_percent=nan: must be"),
        ({"train_percent": 50, "train_patients": 2}, "^data.train_patients=2: cannot be combined with data.train_perc"),
        ({"subset_seed": -1}, "^data.subset_seed=-1: must not be negative"),
    ],
)
def test_an_impossible_subset_is_an_error_that_names_the_option(options, message):
    with pytest.raises(InputError, match=message):
        make_split(ids(10), Data(**options))


def test_a_negative_seed_is_an_error_that_names_the_option():
    with pytest.raises(InputError, match=r"^data.split_seed=-1: must not be negative"):
        make_split(ids(5), Data(split_seed=-1))


# --- folds -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [10, 33, 60])
def test_folds_validate_on_each_patient_outside_the_test_set_once(count):
    full = make_split(ids(count), Data())
    folds = [make_split(ids(count), Data(), str(k)) for k in range(5)]
    pool = sorted(full.train + full.val)
    for fold in folds:
        assert fold.test == full.test
        assert sorted(fold.train + fold.val) == pool
        assert not set(fold.train) & set(fold.val)
    assert sorted(name for fold in folds for name in fold.val) == pool
    assert make_split(ids(count), Data(), "all") == full
    assert max(len(fold.val) for fold in folds) - min(len(fold.val) for fold in folds) <= 1


def test_folds_equal_those_of_nnunet(tmp_path):
    """nnU-Net calls scikit-learn's KFold(5, shuffle=True, random_state=12345), here on twelve sorted cases."""
    names = [f"c{n:02}" for n in range(12)]
    write_split(Split(tuple(names[:10]), tuple(names[10:]), ("t",)), tmp_path / "split.json")
    folds = [make_split([*names, "t"], Data(split=str(tmp_path / "split.json")), str(k)).val for k in range(5)]
    assert [[int(name[1:]) for name in val] for val in folds] == [[0, 3, 8], [7, 10, 11], [6, 9], [1, 4], [2, 5]]


def test_folds_need_all_training_patients_and_at_least_five():
    for protocol in (Data(train_patients=1), Data(train_percent=50)):
        with pytest.raises(InputError, match=r"^fold=0: needs all training patients\. Remove data\.train_p"):
            make_split(ids(20), protocol, "0")
    with pytest.raises(
        InputError, match=r"^fold=0: needs at least 5 training and validation patients, but there are 4"
    ):
        make_split(ids(5), Data(), "0")
    with pytest.raises(InputError, match=r"^fold=all: needs at least 5 training"):
        make_split(ids(5), Data(), "all")
