"""The report of a run: one self-contained file with the numbers of the run's files."""

import copy
import re
import shlex

import numpy as np
import pytest

from jaxla.cli.command_line import strip_run_options
from jaxla.reporting.page import Pair
from jaxla.reporting.run_report import write_report
from tests.reporting.pages import SHAPE, SPACING, Page, embedded_images, make_outcome

GOOD, FAIR, POOR = (5, 14), (6, 16), (12, 18)  # rows of a box; the reference's are 4 to 14, the atlas's 8 to 18
COLUMNS = ("volume", "atlas", "slice")


@pytest.fixture
def write_page(tmp_path):
    def write(run):
        write_report(tmp_path / "report.html", **run)
        return Page((tmp_path / "report.html").read_text("utf-8"))

    return write


@pytest.fixture
def one_class():
    return make_outcome({"a1": GOOD, "a2": POOR, "a3": FAIR})


@pytest.fixture
def two_classes():
    return make_outcome({"a1": GOOD, "a2": POOR}, names=("Anterior", "Posterior"))


def parse_cell(cell):
    """Parse `0.855 ± 0.046` to (0.855, 0.046), and a dash to None."""
    return tuple(None if part == "–" else float(part.replace("−", "-")) for part in cell.split(" ± "))


def expected_cell(statistics, digits):
    return tuple(None if statistics[key] is None else round(statistics[key], digits) for key in ("mean", "sd"))


@pytest.mark.parametrize("run", ["one_class", "two_classes"])
def test_results_have_every_number_of_the_summary(run, write_page, request):
    run = request.getfixturevalue(run)
    rows, _ = write_page(run).table("Metric")
    summary, names = run["summary"], list(run["summary"]["classes"])
    sources = {"volume": summary, "atlas": summary["atlas"], "slice": summary["slice"]}
    blocks = [sources]
    if len(names) > 1:
        blocks += [{column: source["classes"][name] for column, source in sources.items()} for name in names]
    metrics = list(summary["definitions"] | summary["slice"]["definitions"])
    assert len(rows) == len(blocks) * (1 + len(metrics))
    for index, block in enumerate(blocks):
        title, *lines = rows[index * (1 + len(metrics)) :][: 1 + len(metrics)]
        assert title[0] == (["Mean over classes", *names][index] if len(names) > 1 else "LA")
        n, slices = len(run["split"]["test"]), len(run["split"]["test"]) * SHAPE[0]
        assert title[1:] == [f"n = {n} volumes", f"n = {n} volumes", f"n = {slices} slices"]
        for metric, (_, *cells) in zip(metrics, lines, strict=True):
            digits = 2 if metric.endswith(("_mm", "_ml", "_mm2")) else 3
            for column, cell in zip(COLUMNS, cells, strict=True):
                if metric in block[column]:
                    assert parse_cell(cell) == expected_cell(block[column][metric], digits)
                else:
                    assert cell == "–"


def test_headline_has_dice_and_iou_of_network_and_atlas_with_unit_and_n(one_class, write_page):
    text = write_page(one_class).text
    for name, summary, metric in (
        ("Test Dice", one_class["summary"], "dice"),
        ("Test IoU", one_class["summary"], "iou"),
        ("Atlas baseline Dice", one_class["summary"]["atlas"], "dice"),
        ("Atlas baseline IoU", one_class["summary"]["atlas"], "iou"),
    ):
        mean, sd = expected_cell(summary[metric], 3)
        assert f"{name} {mean:.3f} ± {sd:.3f} mean ± sd per volume, n = 3" in text


def test_cases_are_sorted_worst_first_and_marked_if_not_above_the_atlas(one_class, write_page):
    page = write_page(one_class)
    rows, headings = page.table("Case")
    by_case = {row["case"]: row for row in one_class["rows"]}
    ranked = sorted(by_case, key=lambda case: by_case[case]["dice"])
    assert [row[0].split(" ")[0] for row in rows] == ranked == ["a2", "a3", "a1"]
    assert [row[0] for row in page.marked] == ["a2 not above baseline"]
    assert "2 of 3 test cases have a higher Dice than the atlas baseline" in page.text
    metrics = {"Dice": "dice", "IoU": "iou", "HD95, mm": "hd95_mm", "ASSD, mm": "assd_mm", "Volume, ml": "volume_ml",
               "Reference, ml": "reference_volume_ml", "Baseline Dice": "atlas_dice"}  # fmt: skip
    for case, cells in zip(ranked, rows, strict=True):
        row, cells = by_case[case], dict(zip(headings, cells, strict=True))
        for heading, metric in metrics.items():
            assert float(cells[heading]) == pytest.approx(row[metric], abs=0.0051 if "m" in heading else 0.00051)
        difference = float(cells["Difference, ml"].replace("−", "-"))
        assert difference == pytest.approx(row["volume_ml"] - row["reference_volume_ml"], abs=0.0051)


def test_each_of_several_classes_has_a_row(two_classes, write_page):
    rows, _ = write_page(two_classes).table("Case")
    assert [(row[0].split(" ")[0], row[1]) for row in rows] == [
        ("a2", "Anterior"), ("a2", "Posterior"), ("a1", "Anterior"), ("a1", "Posterior"),
    ]  # fmt: skip


def test_options_without_effect_are_not_listed(one_class, write_page):
    page = write_page({**one_class, "unread": {"data.labels", "model.widths"}})
    names = [name for name, _ in page.table("Option")[0]]
    assert "data.root" in names
    assert "data.labels" not in names
    assert "Options that had no effect on this run are not listed." in page.text
    assert "had no effect" not in write_page(one_class).text


def test_names_of_options_are_not_divided_by_line_breaks(one_class, write_page):
    one_class["record"]["command"] = "python -m jaxla.train --exp=a --data.root=/my--scans/b-c --resume"
    page = write_page(one_class)
    # in the command that reproduces the run, and in the original one
    assert page.tags.count(("span", {"class": "option"})) == 2 + 3
    assert re.search(r"\.option \{ white-space: nowrap; \}", page.style)
    assert "python -m jaxla.train --exp=a --data.root=/my--scans/b-c" in page.text


def test_page_names_every_patient_option_hash_and_version(one_class, write_page):
    page = write_page(one_class)
    parts, _ = page.table("Part")
    assert parts == [
        ["Training", "2", "t1, t2"], ["Validation", "1", "v1"], ["Test", "3", "a1, a2, a3"], ["Unused", "1", "u1"],
    ]  # fmt: skip
    options, _ = page.table("Option")
    assert options == [
        ["method", "vit_mini8"], ["seed", "7"], ["data.root", "/scans"], ["data.labels", "not given"],
        ["model.decoder_widths", "[64,32]"], ["training.batch_size", "8"],
        ["training.checkpoint", "best"],
    ]  # fmt: skip
    facts = dict(page.table("Item")[0])
    assert facts["SHA-256 of data"] == "d" * 64
    assert facts["SHA-256 of split"] == "5" * 64
    assert facts["SHA-256 of weights"] == "none"
    assert facts["Mask values"] == "LA: 1; ignored: 9"
    assert facts["Versions"] == "Python 3.11.7, jaxla 0.1.0, jax 0.10.2"
    assert facts["Device"] == "cpu: Z80, 1 cores"
    assert facts["Command"] == one_class["record"]["command"]
    assert "python -m jaxla.train --exp=tiny --seed=7" in page.text
    assert "Every step ran the backbone." in page.text
    for definition in one_class["summary"]["definitions"].values():
        assert definition in page.text
    assert one_class["summary"]["empty_rule"] in page.text
    assert one_class["summary"]["averaging"] in page.text


def test_costs_have_units_and_n(one_class, write_page):
    assert write_page(one_class).table("Quantity")[0] == [
        ["Parameters", "1.2 M, 0.2 M of them trained"],
        ["Multiply-adds", "5.68 G per slice"],
        ["Training", "30.0 s per epoch, including validation"],
        ["Inference", "2.17 s per volume of 20 slices, from the scan in memory to its mask (mean, n = 3 volumes)"],
        ["Memory of a training step", "2.34 GB for 8 slices, as reported by XLA"],
        ["Peak memory of the process on the host", "3.45 GB"],
    ]
    on_gpu = one_class["cost"] | {"peak_device_bytes": 12_000_000_000, "peak_host_bytes": None}
    lines = dict(write_page(one_class | {"cost": on_gpu}).table("Quantity")[0])
    assert lines["Peak memory of the device"] == "12.00 GB"
    assert "Peak memory of the process on the host" not in lines


def test_page_states_the_origin_of_weights_and_data(one_class, write_page):
    text = write_page(one_class).text
    assert "random weights: no pretrained weights" in text
    assert "phantom" not in text
    record = copy.deepcopy(one_class["record"])
    record |= {"weights": "/w/dinov2_vitb14.safetensors", "weights_sha256": "e" * 64}
    record["experiment"]["data"]["root"] = "phantom"
    text = write_page(one_class | {"record": record}).text
    assert "no pretrained weights" not in text
    assert "Its pretrained weights come from /w/dinov2_vitb14.safetensors." in text
    assert "e" * 64 in text
    assert "Synthetic phantoms, not patients" in text


def test_page_needs_no_other_file(one_class, write_page):
    page = write_page(one_class)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "iframe", "object", "embed", "base", "form"}
    references = [a[key] for _, a in page.tags for key in ("src", "href", "srcset", "data", "action") if key in a]
    assert len(references) == 3 + 4 + 1  # charts, slices, the link to the definitions
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert "url(" not in page.style
    assert "@import" not in page.style
    for svg in page.svgs():
        assert all(target.startswith(("#", "data:")) for target in re.findall(r"href=\"([^\"]*)", svg))
        assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)", svg))


def test_images_have_text_alternatives_and_table_headings_a_scope(one_class, write_page):
    page = write_page(one_class)
    alternatives = [attributes["alt"] for tag, attributes in page.tags if tag == "img"]
    assert len(set(alternatives)) == 7
    assert all(len(text) > 20 for text in alternatives)
    assert all("scope" in attributes for tag, attributes in page.tags if tag == "th")
    assert [tag for tag, _ in page.tags if re.fullmatch("h[12]", tag)].count("h1") == 1


def test_text_is_escaped(write_page):
    name = "<i>&amp;\"1'"
    run = make_outcome({name: GOOD, "a2": FAIR})
    run["record"]["experiment"]["data"]["root"] = "/scans/<i>&lt;"
    page = write_page(run)
    assert "i" not in {tag for tag, _ in page.tags}
    assert name in [row[0] for row in page.table("Case")[0]]
    assert ["data.root", "/scans/<i>&lt;"] in page.table("Option")[0]
    assert any(attributes["alt"].startswith(f"{name}, shown") for tag, attributes in page.tags if tag == "img")


def test_single_case_has_no_standard_deviation(write_page):
    run = make_outcome({"a1": GOOD})
    page = write_page(run)
    assert f"Test Dice {run['summary']['dice']['mean']:.3f} ± – mean ± sd per volume, n = 1" in page.text
    title, dice, *_ = page.table("Metric")[0]
    assert title == ["LA", "n = 1 volume", "n = 1 volume", "n = 10 slices"]
    assert parse_cell(dice[1]) == expected_cell(run["summary"]["dice"], 3)
    assert parse_cell(dice[1])[1] is None


def test_empty_masks_are_marked(write_page):
    run = make_outcome({"a1": GOOD, "missed": (0, 0), "invented": GOOD}, references={"invented": (0, 0)})
    run["panels"] = run["panels"] * 2 + [run["panels"][0]._replace(title="none", prediction=np.zeros(SHAPE, np.uint8))]
    page = write_page(run)
    cells = {row[0].split(" ")[0]: row for row in page.table("Case")[0]}
    assert cells["missed"][0] == "missed not above baseline prediction empty"
    assert cells["invented"][0] == "invented not above baseline reference empty"
    assert cells["a1"][0] == "a1"
    assert cells["missed"][1] == "0.000"


def test_dice_and_iou_are_checked_against_each_other(one_class, write_page):
    page = write_page(one_class)
    assert "Consistency of Dice and IoU: passes." in page.text
    assert "All 4 pairs of means and 6 pairs of single cases" in page.text
    rows, _ = page.table("Mean")
    dice, iou = (one_class["summary"][metric]["mean"] for metric in ("dice", "iou"))
    assert rows[0] == ["Test, per volume", f"{dice:.3f}", f"{iou:.3f}", f"{dice / (2 - dice):.3f}", "passes"]
    assert [row[-1] for row in rows] == ["passes"] * 4

    impossible = copy.deepcopy(one_class["summary"])
    impossible["slice"]["iou"]["mean"] = impossible["slice"]["dice"]["mean"] / 2
    page = write_page(one_class | {"summary": impossible})
    assert "Consistency of Dice and IoU: FAILS." in page.text
    assert "These pairs fail: Test, per slice." in page.text
    assert [row[0] for row in page.table("Mean")[0] if row[-1] == "FAILS"] == ["Test, per slice"]

    rows = copy.deepcopy(one_class["rows"])
    rows[1]["iou"] -= 0.01
    assert "These pairs fail: a2, LA." in write_page(one_class | {"rows": rows}).text


@pytest.mark.parametrize(("dice", "iou", "passes"), [(0.923, 0.841, False), (0.871, 0.792, True), (0.5, 1 / 3, True)])
def test_pair_passes_if_the_iou_is_possible(dice, iou, passes):
    assert Pair("", dice, iou).passes is passes


def test_slices_are_embedded_at_their_own_resolution_and_aspect_ratio(one_class, write_page):
    panel = one_class["panels"][0]
    slices = [svg for svg in write_page(one_class).svgs() if "data:image/png" in svg]
    low, high = np.percentile(panel.image, (0.5, 99.5))
    indices = [2, 4, 5, 7]  # spread over 1 to 8, which the reference covers
    assert len(slices) == len(indices)
    for index, svg in zip(indices, slices, strict=True):
        (grey,) = embedded_images(svg)
        assert grey.shape == SHAPE[1:]
        expected_grey = np.clip((panel.image[index] - low) / (high - low), 0, 1) * 255
        assert np.abs(grey - expected_grey).max() < 2  # grey values up to 255, which matplotlib rounds down
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', svg).groups())
        assert height / width == pytest.approx(SHAPE[1] * SPACING[1] / (SHAPE[2] * SPACING[2]), rel=1e-3)


def test_agreement_of_volumes_has_n_and_limits_from_ten_cases(write_page):
    few = make_outcome({"a1": GOOD, "a2": FAIR})
    rows, _ = write_page(few).table("Class")
    bias = np.mean([row["volume_ml"] - row["reference_volume_ml"] for row in few["rows"]])
    assert rows == [["LA", "2", f"{bias:+.2f}".replace("-", "−"), "–"]]

    many = make_outcome({f"a{n}": (4, 8 + n) for n in range(10)})
    differences = [row["volume_ml"] - row["reference_volume_ml"] for row in many["rows"]]
    bias, sd = np.mean(differences), np.std(differences, ddof=1)
    ((name, n, shown_bias, limits),) = write_page(many).table("Class")[0]
    assert (name, n) == ("LA", "10")
    numbers = [float(text.replace("−", "-")) for text in (shown_bias, *limits.split(" to "))]
    assert numbers == pytest.approx([bias, bias - 1.96 * sd, bias + 1.96 * sd], abs=0.0051)


@pytest.mark.parametrize(
    ("given", "repeated"),
    [
        ("python -m jaxla.train --exp=a --run-dir=runs/b --seed=1", "python -m jaxla.train --exp=a --seed=1"),
        ("python -m jaxla.train --run-dir 'my runs/b' --exp=a", "python -m jaxla.train --exp=a"),
        ("python -m jaxla.train --exp=a --resume --run-dir=b", "python -m jaxla.train --exp=a"),
        ("python -m jaxla.train '--data.labels=a:1;b:2'", "python -m jaxla.train '--data.labels=a:1;b:2'"),
    ],
)
def test_command_to_reproduce_a_run_has_no_folder(given, repeated):
    assert shlex.split(strip_run_options(given)) == shlex.split(repeated)


def test_report_is_reproducible_and_leaves_no_other_file(one_class, tmp_path):
    path = tmp_path / "report.html"
    write_report(path, **one_class)
    first = path.read_bytes()
    write_report(path, **one_class)
    assert path.read_bytes() == first
    assert list(tmp_path.iterdir()) == [path]


def test_incomplete_record_keeps_the_old_report(one_class, tmp_path):
    path = tmp_path / "report.html"
    path.write_text("old")
    record = {key: value for key, value in one_class["record"].items() if key != "data_sha256"}
    with pytest.raises(KeyError, match="data_sha256"):
        write_report(path, **one_class | {"record": record})
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("block_weights", "caption"),
    [
        ("per_level", "Learned weights in the best epoch; each row sums to 1"),
        ("uniform", "The weights are equal and were not learned; each row sums to 1"),
    ],
)
def test_block_weights_of_a_fusion_are_shown(one_class, write_page, block_weights, caption):
    assert "Weights of the backbone" not in write_page(one_class).text
    one_class["summary"]["block_weights"] = {"blocks": [0, 11], "levels": [[0.25, 0.75], [0.5, 0.5], [0.9, 0.1]]}
    one_class["record"]["experiment"]["model"]["block_weights"] = block_weights
    page = write_page(one_class)
    assert f"Weights of the backbone's blocks {caption} Cost" in page.text
    (alt,) = [tag["alt"] for name, tag in page.tags if name == "img" and "blocks" in tag["alt"]]
    assert alt == "Weight of each of 2 blocks at each of 3 levels of the decoder"


def test_the_record_describes_the_input_of_the_network_and_the_unit_of_validation(one_class, write_page):
    one_class["record"] |= {"unit": "over all patches together", "input": "patches of 8 × 32 × 32 voxels"}
    text = write_page(one_class).text
    assert "One input of the network: patches of 8 × 32 × 32 voxels. Data." in text
    assert "IoU 0.560 (over all patches together, n = 1 patient, in the network's input pixels)" in text
    assert "Validation, over all patches together" in text
