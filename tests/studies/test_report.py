"""The report of a study: numbers computed by hand, and its files."""

import csv
import re
import shutil
from itertools import combinations

import numpy as np
import pytest
from jaxla.experiments import METHODS, STUDIES
from matplotlib import colors
from matplotlib.figure import Figure
from PIL import Image
from scipy import stats

from jaxla.config import InputError
from jaxla.report import main
from jaxla.studies.figures import choose_styles, draw_series, list_series
from jaxla.studies.page import report_study
from jaxla.studies.results import read_study
from jaxla.studies.tables import describe_devices
from tests.reporting.pages import Page
from tests.studies.runs import (
    LASCARQS_FILES,
    PREDICTED,
    PROTOCOLS,
    REFERENCES,
    TWO_CLASSES,
    BoxRun,
    edit_json,
    read_csv,
    run_dir,
    write_study,
)

DICE = {"unet": [1.0, 0.9, 0.8, 0.6], "segnet": [0.85, 0.8, 0.6, 0.3]}  # by case, averaged over seeds


def test_each_case_counts_once_averaged_over_seeds(reported_study):
    rows = {(r["method"], r["metric"], r["unit"]): r for r in read_csv(reported_study / "tables" / "table1_paper1.csv")}
    for method, dice in DICE.items():
        row = rows[method, "dice", "volume"]
        assert float(row["mean"]) == pytest.approx(np.mean(dice))
        assert float(row["sd"]) == pytest.approx(np.std(dice, ddof=1))
        assert row["n"] == "4"
        seed_means = [np.mean([1 - (start - 4) / 10 for start, _ in PREDICTED[method, seed]]) for seed in (0, 1)]
        assert float(row["sd_over_seeds"]) == pytest.approx(np.std(seed_means, ddof=1))
        assert float(row["ci95_low"]) < np.mean(dice) < float(row["ci95_high"])
    # 4 of the 6 slices of a case have the structure; in the other 2 both masks are empty, and Dice is 1.
    per_slice = rows["unet", "dice", "slice"]
    assert float(per_slice["mean"]) == pytest.approx((4 * np.mean(DICE["unet"]) + 2) / 6)
    assert per_slice["n"] == "24"
    assert per_slice["ci95_low"] == ""
    assert float(rows["atlas baseline", "dice", "volume"]["mean"]) == pytest.approx(0.4)


def test_published_numbers_have_their_own_columns(reported_study):
    rows = {(r["method"], r["metric"], r["unit"]): r for r in read_csv(reported_study / "tables" / "table1_paper1.csv")}
    assert [float(rows["unet", m, "volume"]["published_mean"]) for m in ("dice", "iou")] == [0.841, 0.764]
    assert [float(rows["unet", m, "volume"]["published_sd"]) for m in ("dice", "iou")] == [0.083, 0.128]
    assert rows["segnet", "dice", "volume"]["published_mean"] == rows["unet", "dice", "slice"]["published_mean"] == ""
    printed = (reported_study / "tables" / "table1_paper1.md").read_text()
    head, _, first, *_ = printed.splitlines()
    assert (
        re.sub(r"\s+", " ", head)
        == "| method | per | Dice | IoU | HD95, mm | ASSD, mm | sd over seeds | above atlas | published Dice "
        "| published IoU |"
    )
    assert re.sub(r"\s+", " ", first).startswith("| unet | volume | 0.825 ± 0.171 | ")
    # the seeds' means are 0.85 and 0.8; all four cases are above the atlas baseline's 0.4
    assert re.sub(r"\s+", " ", first).endswith("| 0.035 | 4 of 4 | 0.841 ± 0.083 | 0.764 ± 0.128 |")
    (atlas,) = (re.sub(r"\s+", " ", line) for line in printed.splitlines() if line.startswith("| atlas"))
    assert " | 0.000 | – | – | – |" in atlas  # equal for both seeds, and not compared with itself
    assert "Published: by paper 1, on LAScarQS 2022, with the paper's own recipe, which may differ from" in printed
    few = (reported_study / "tables" / "table1_fewshot_1patient.md").read_text()
    assert "Published: by paper 1, on LAScarQS 2022, read off its Figure 2, with the paper's own recipe" in few
    assert "(8 training patients): mean ± sd over 4 test volumes and over their 24 slices; values are aver" in printed


def test_each_published_number_names_its_own_paper(tmp_path):
    scheduled = [
        BoxRun("paper2", method, 0, dict(zip(REFERENCES, PREDICTED["unet", 0], strict=True)))
        for method in ("unet", "fusion_vitg14")
    ]
    write_study(tmp_path / "study", scheduled, REFERENCES, tmp_path / "scans", files=LASCARQS_FILES)
    page = Page(report_study(tmp_path / "study", tmp_path / "cache").read_text("utf-8"))
    printed = (tmp_path / "study" / "tables" / "table1_paper2.md").read_text()
    assert printed.rstrip().endswith(
        "Published: by paper 2, on LAScarQS 2022, with the paper's own recipe, which may differ from this study's; the "
        "paper does not state whether its means are over volumes or slices."
    )
    # the published IoU is lower than is possible with the published Dice
    assert "These pairs fail: paper2, fusion_vitg14, published." in page.text


def test_methods_are_compared_case_by_case(reported_study):
    rows = read_csv(reported_study / "tables" / "comparisons.csv")
    assert len(rows) == len(PROTOCOLS) * 4  # one pair of methods by four metrics
    (row,) = (r for r in rows if (r["protocol"], r["metric"]) == ("paper1", "dice"))
    differences = np.round(np.subtract(DICE["unet"], DICE["segnet"]), 12)
    assert (row["first"], row["second"], row["n"]) == ("unet", "segnet", "4")
    assert float(row["difference"]) == pytest.approx(differences.mean())
    assert float(row["p"]) == float(row["p_holm"]) == pytest.approx(stats.wilcoxon(differences).pvalue)
    assert float(row["effect"]) == 1


def test_cost_table_averages_times_and_takes_the_highest_peak(reported_study):
    unet, segnet = read_csv(reported_study / "tables" / "cost.csv")
    assert (unet["method"], segnet["method"]) == ("unet", "segnet")
    assert unet["protocol"] == "paper1"  # the protocol with the most training patients
    assert float(unet["epoch_seconds"]) == 15  # mean of 10 and 20 s
    assert float(unet["inference_seconds"]) == 2  # mean of 1, 2, 2 and 3 s
    assert float(unet["peak_bytes"]) == 4_000_000_001  # maximum of 4 GB and one byte more
    assert float(unet["dice"]) == pytest.approx(np.mean(DICE["unet"]))


def test_report_writes_all_tables_and_figures_reproducibly(study, tmp_path):
    names = {"comparisons", "cost", *(f"table1_{protocol}" for protocol in PROTOCOLS)}
    tables, figures = study / "tables", study / "figures"
    assert {path.name for path in tables.iterdir()} == {f"{n}.{e}" for n in names for e in ("csv", "md", "tex")}
    drawn = {"figure2", "figure3", "cost", "agreement"}
    assert {path.name for path in figures.iterdir()} == {f"{name}.{e}" for name in drawn for e in ("pdf", "png")}
    for name in drawn:
        pixels = np.asarray(Image.open(figures / f"{name}.png").convert("L"))
        assert pixels.shape[1] > 600
        assert pixels.std() > 10
        assert (figures / f"{name}.pdf").read_bytes().startswith(b"%PDF")
    files = [path for path in (study / "report.html", *tables.iterdir(), *figures.iterdir()) if path.suffix != ".png"]
    before = {path: path.read_bytes() for path in files}
    for path in before:
        path.unlink()
    assert report_study(study, tmp_path / "cache") == study / "report.html"
    assert all(path.read_bytes() == content for path, content in before.items())


def test_latex_is_ascii_with_special_characters_escaped(reported_study):
    for path in (reported_study / "tables").glob("*.tex"):
        text = path.read_text()
        assert text.isascii(), path
        assert not re.search(r"(?<!\\)[_%#]", text), path
        assert text.count("{tabular}") == text.count("\\toprule") * 2 == 2


def test_page_is_complete_and_needs_no_other_file(reported_study):
    page = Page((reported_study / "report.html").read_text("utf-8"))
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "base", "form"}
    loaded = [a for tag, a in page.tags if tag != "a"]  # links to the reports of runs are not loaded
    references = [a[key] for a in loaded for key in ("src", "href", "srcset", "data") if key in a]
    assert len(references) == 4
    assert all(reference.startswith("data:") for reference in references)
    assert all(len(a["alt"]) > 10 for tag, a in page.tags if tag == "img")
    assert "Consistency of Dice and IoU: passes." in page.text
    assert "All 16 pairs of means" in page.text  # 3 protocols of 2 methods by 2 units, 3 atlases, 1 published with IoU
    assert "random, not pretrained" in page.text
    assert "With 4 test cases, p before correction is at least 0.12." in page.text
    assert "Changed options" not in page.text
    for text in ("larger of the two directed 95th percentiles", "two empty masks count as perfect", "Wilcoxon"):
        assert text in page.text
    runs, _ = page.table("Run")
    assert [row[0] for row in runs] == [f"{p}_{m}_seed{s}" for p in PROTOCOLS for m, s in PREDICTED]


def test_impossible_pairs_of_dice_and_iou_are_named(study, tmp_path):
    for seed in (0, 1):
        path = run_dir(study, seed=seed) / "test" / "cases.csv"
        rows = read_csv(path)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows({**row, "iou": 0.3} for row in rows)
        edit_json(path.with_name("summary.json"), lambda content: content["classes"]["LA"]["iou"].update(mean=0.3))
    page = Page(report_study(study, tmp_path / "cache").read_text("utf-8"))
    assert "Consistency of Dice and IoU: FAILS." in page.text
    assert "These pairs fail: paper1, unet, per volume." in page.text


def test_figure_2_has_a_panel_by_percentage_and_one_by_number_of_patients(reported_study):
    results = read_study(reported_study)
    by_percentage, by_number = list_series(results)
    assert (by_percentage.ticks, by_percentage.protocols) == (["50 %", "100 %"], ["data_50percent", "paper1"])
    assert (by_number.ticks, by_number.protocols) == (["1", "all (8)"], ["fewshot_1patient", "paper1"])
    axes = Figure().add_subplot()
    draw_series(axes, results, choose_styles({m: m for m in results.methods}, list(METHODS)), by_number)
    lines = {container.get_label(): container.lines[0].get_ydata() for container in axes.containers}
    assert lines == {m: pytest.approx([np.mean(dice)] * 2) for m, dice in DICE.items()}
    assert axes.get_xlabel() == "training patients"


def test_styles_of_methods_differ_in_colour_and_in_grey():
    known = list(METHODS)
    for study in STUDIES.values():
        styles = choose_styles({m: m for m in study.methods}, known)
        assert styles == choose_styles({m: m for m in study.methods[::-1]}, known)  # independent of the order
        for a, b in combinations(styles.values(), 2):
            assert a.colour != b.colour
            assert (a.marker, a.dashes) != (b.marker, b.dashes)
        greys = sorted(np.dot(colors.to_rgb(style.colour), (0.299, 0.587, 0.114)) for style in styles.values())
        assert len(greys) == len(study.methods)
        assert greys[-1] - greys[0] > 0.5
    renamed = choose_styles({"unet": "unet", "renamed": "dinov2_vitb14"}, known)
    assert renamed["renamed"] == choose_styles({"dinov2_vitb14": "dinov2_vitb14"}, known)["dinov2_vitb14"]
    # there are ten colours: the eleventh method takes the next free one
    many = [f"method {n}" for n in range(12)]
    assert len({style.colour for style in choose_styles({m: m for m in (many[0], many[10])}, many).values()}) == 2
    assert len(set(choose_styles({m: m for m in many}, many).values())) == 12


def test_each_of_several_classes_has_its_own_numbers(tmp_path):
    scheduled = [
        BoxRun("paper1", method, 0, dict(zip(REFERENCES, PREDICTED[method, 0], strict=True)))
        for method in ("unet", "segnet")
    ]
    write_study(tmp_path / "study", scheduled, REFERENCES, tmp_path / "scans", TWO_CLASSES)
    page = Page(report_study(tmp_path / "study", tmp_path / "cache").read_text("utf-8"))
    dice = [1.0, 0.9, 0.8, 0.7]  # Dice of the first class; that of the second is always 1
    for unit, empty in (("volume", 0), ("slice", 2 / 6)):  # in two of six slices both masks are empty
        rows = {
            r["class"]: r
            for r in read_csv(tmp_path / "study" / "tables" / "table1_paper1.csv")
            if (r["method"], r["metric"], r["unit"]) == ("unet", "dice", unit)
        }
        mean = empty + (1 - empty) * np.mean(dice)
        assert {name: float(row["mean"]) for name, row in rows.items()} == pytest.approx(
            {"mean": (mean + 1) / 2, "LA": mean, "appendage": 1}
        )
    rows, _ = page.table("method")
    assert [row[:3] for row in rows] == [
        [method, name, unit]
        for unit, methods in (("volume", ["unet", "segnet", "atlas baseline"]), ("slice", ["unet", "segnet"]))
        for name in ("mean", "LA", "appendage")
        for method in methods
    ]
    assert "(mean: also over classes)" in page.text
    compared = read_csv(tmp_path / "study" / "tables" / "comparisons.csv")
    assert "published" not in page.text  # paper 1 published numbers of the LA only
    assert [r["class"] for r in compared if r["metric"] == "dice"] == ["mean", "LA", "appendage"]
    assert [float(r["difference"]) for r in compared if r["metric"] == "dice"] == pytest.approx([0.0875, 0.175, 0])
    assert "All 15 pairs of means" in page.text  # mean and 2 classes, of 2 methods by 2 units and of the atlas baseline


def test_report_of_a_smaller_study_removes_tables_of_a_larger_study(study, tmp_path, caplog):
    for name in ("notes.md", "table1_paper1_edited.tex"):
        (study / "tables" / name).write_text("mine")
    edit_json(study / "study.json", lambda content: content.update(runs=content["runs"][-2:-1]))
    report_study(study, tmp_path / "cache")
    tables = {f"{name}.{extension}" for name in ("table1_paper1", "cost") for extension in ("csv", "md", "tex")}
    kept = {"notes.md", "table1_paper1_edited.tex"}
    assert {path.name for path in (study / "tables").iterdir()} == tables | kept
    assert {path.stem for path in (study / "figures").iterdir()} == {"figure3", "cost", "agreement"}
    assert "not in the report, because the schedule does not list them: data_50percent_segnet_seed0, " in caplog.text


def test_report_warns_that_times_of_different_devices_cannot_be_compared(study):
    unet, segnet = (run_dir(study, method=m) / "experiment.json" for m in ("unet", "segnet"))
    gpus = {"device": "gpu: Fast", "devices": 4, "processes": 2}
    for path in (study / "runs").glob("*/experiment.json"):
        edit_json(path, lambda content: content["environment"].update(processor="Z80"))
    assert describe_devices(read_study(study), "paper1") == "cpu: Z80"
    edit_json(segnet, lambda content: content["environment"].update(gpus))
    edit_json(
        unet, lambda content: content.update(resumed=[{"environment": {**content["environment"], "processor": "6502"}}])
    )
    assert describe_devices(read_study(study), "paper1") == (
        "different devices, so times and memory cannot be compared (unet, segnet: cpu: Z80; unet: cpu: 6502; "
        "segnet: gpu: Fast, 4 devices, in 2 processes)"
    )


def test_changed_options_are_named(study, tmp_path):
    for path in (study / "runs").glob("*_unet_*/experiment.json"):
        edit_json(path, lambda content: content["experiment"]["model"].update(widths=[8, 16]))
    page = Page(report_study(study, tmp_path / "cache").read_text("utf-8"))
    assert "Changed options. unet: --model.widths=[8,16]. All other options have the method's own values." in page.text


def test_large_costs_are_printed_without_an_exponent(study, tmp_path):
    edit_json(run_dir(study) / "cost.json", lambda content: content.update(parameters=1_136_480_768))
    edit_json(
        run_dir(study, seed=1) / "cost.json",
        lambda content: content.update(inference_seconds=[3.0], inference_slices=[6]),
    )
    report_study(study, tmp_path / "cache")
    printed = (study / "tables" / "cost.md").read_text()
    assert [cell.strip() for cell in printed.splitlines()[2].split("|")[1:5]] == ["unet", "1136", "31", "75"]
    assert "mean over 1 to 2 test volumes of 6 slices in each run" in printed


def test_the_largest_protocol_has_all_patients_even_if_another_has_as_many(study):
    for method, seed in PREDICTED:
        run = run_dir(study, "data_50percent", method, seed)
        edit_json(run / "split.json", lambda content: content.update(train=[f"t{n}" for n in range(8)]))
    assert read_study(study).largest_protocol == "paper1"


def test_published_numbers_are_left_out_if_the_data_have_another_layout(tmp_path):
    predicted = dict(zip(REFERENCES, PREDICTED["unet", 0], strict=True))
    write_study(tmp_path / "study", [BoxRun("paper1", "unet", 0, predicted)], REFERENCES, tmp_path / "scans")
    page = Page(report_study(tmp_path / "study", tmp_path / "cache").read_text("utf-8"))
    assert not [heading for heading in page.table("method")[1] if "published" in heading]
    assert "Published:" not in page.text
    (dice, *_) = read_csv(tmp_path / "study" / "tables" / "table1_paper1.csv")
    assert (dice["metric"], dice["published_mean"], dice["published_sd"]) == ("dice", "", "")


def test_runs_are_linked_to_their_reports(reported_study):
    page = Page((reported_study / "report.html").read_text("utf-8"))
    links = [attributes["href"] for tag, attributes in page.tags if tag == "a"]
    assert len(links) == len(PROTOCOLS) * len(PREDICTED)
    assert all((reported_study / link).is_file() for link in links)


def test_the_page_has_a_row_for_each_cost_and_a_column_for_each_method(reported_study):
    page = Page((reported_study / "report.html").read_text("utf-8"))
    costs = next(table for table in page.tables if table[1][0] == "parameters, M")
    assert costs[0] == ["method", "unet", "segnet"]
    assert costs[1:4] == [["parameters, M", "31", "31"], ["trained, M", "31", "31"], ["multiply-adds, G", "75", "75"]]
    assert costs[-1] == ["Dice", "0.825", "0.637"]


def test_study_of_one_method_has_no_comparisons(tmp_path):
    predicted = dict(zip(REFERENCES, PREDICTED["unet", 0], strict=True))
    write_study(tmp_path / "study", [BoxRun("paper1", "unet", 0, predicted)], REFERENCES, tmp_path / "scans")
    page = Page(report_study(tmp_path / "study", tmp_path / "cache").read_text("utf-8"))
    assert {path.stem for path in (tmp_path / "study" / "tables").iterdir()} == {"table1_paper1", "cost"}
    assert "Are the differences significant?" not in page.text
    assert page.table("method")[0][0][:3] == ["unet", "volume", "0.850 ± 0.129"]


def test_cases_in_figure_3_can_be_chosen(study, tmp_path, capsys):
    before = (study / "figures" / "figure3.png").read_bytes()
    main([f"--study={study}", f"--cache-dir={tmp_path / 'cache'}", "--cases=c2,c0"])
    assert capsys.readouterr().out.splitlines()[-1] == f"wrote {study / 'report.html'}"
    assert (study / "figures" / "figure3.png").read_bytes() != before
    assert "Worst, median and best" not in (study / "report.html").read_text("utf-8")
    with pytest.raises(InputError, match=r"^--cases=c9: not a test case of this study. Choose from c0, c1, c2, c3.$"):
        main([f"--study={study}", "--cases=c9"])


def test_missing_or_changed_scans_are_refused(study, reported_study, tmp_path):
    elsewhere = shutil.copytree(reported_study.parent / "scans", tmp_path / "elsewhere")
    for run in (study / "runs").iterdir():
        edit_json(run / "experiment.json", lambda content: content["experiment"]["data"].update(root="/gone"))
    with pytest.raises(InputError, match=r"^data.root=/gone: no such folder"):
        report_study(study, tmp_path / "cache")
    (study / "report.html").unlink()
    assert report_study(study, tmp_path / "cache", str(elsewhere)).exists()
    scan = LASCARQS_FILES[0]
    (elsewhere / scan.format("c0")).write_bytes((elsewhere / scan.format("c1")).read_bytes())
    with pytest.raises(InputError, match=r"elsewhere: the scan or mask of case c0 has changed since training"):
        report_study(study, tmp_path / "cache", str(elsewhere))
    shutil.rmtree(elsewhere / "c0")
    with pytest.raises(InputError, match=r"case c0 is missing. Pass the folder of the scans as --data.root.$"):
        report_study(study, tmp_path / "cache", str(elsewhere))
