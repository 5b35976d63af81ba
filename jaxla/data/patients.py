"""Several scans of one patient: which cases belong together, so that no split separates them."""

import csv
import re
from collections.abc import Sequence
from pathlib import Path

from jaxla.cli.files import report_os_errors
from jaxla.config import InputError, option
from jaxla.data.scan_files import compose_letters

AUTO = "auto"  # value of the option data.patients
COLUMNS = ("case", "patient")
# What follows the patient in an id such as P01_t0, P01_ED, P01_visit2, sub-01_ses-1_LGE, P01-1 or P01_scan2. The last
# two need a digit before them, since `case-1` and `case-2` are two patients.
VISIT = r"[_-](?:t|tp|time|timepoint|visit|v|baseline|followup|fu|pre|post|ed|es)[_-]?\d*"
PATIENT_OF_CASE = re.compile(
    rf"(.+?)(?:(?:{VISIT})+|_ses-[^_]+(?:_.*)?)|(.*\d.*?)(?:[_-](?:scan|frame|phase|run)[_-]?\d+|-\d+)", re.IGNORECASE
)


def group_by_patient(ids: Sequence[str], patients: str) -> dict[str, list[str]]:
    """Return patient -> sorted ids of the cases; with an empty `patients`, each case is a patient.

    Args:
        patients: a regular expression, a CSV file or `auto`, as in `config.Data.patients`.

    Raises:
        InputError: the expression or the file cannot be used, or assigns no patient to a case.
    """
    if not patients:
        patient_of_case = {case: case for case in ids}
    elif patients == AUTO:
        patient_of_case = {case: _guess_patient(case) for case in ids}
    elif patients.lower().endswith(".csv"):
        patient_of_case = _read_patients(Path(patients))
    else:
        patient_of_case = _match_patients(ids, patients)
    groups: dict[str, list[str]] = {}
    for case in sorted(ids):
        if case not in patient_of_case:
            problem = f"assigns no patient to case {case}"
            fix = "Add the case to the file, or write an expression that matches the beginning of every id."
            raise InputError(option("data.patients", patients), problem, fix)
        groups.setdefault(patient_of_case[case], []).append(case)
    return groups


def describe_shared_patients(ids: Sequence[str]) -> tuple[str, str] | None:
    """Return problem and fix if the ids look like several scans of one patient, otherwise None."""
    groups = {patient: cases for patient, cases in group_by_patient(ids, AUTO).items() if len(cases) > 1}
    if not groups or max(map(len, groups.values())) == len(ids):  # a common prefix, such as the name of the data set
        return None
    cases = next(iter(groups.values()))
    problem = f"cases {cases[0]} and {cases[1]} seem to be scans of one patient, which the split may separate"
    if len(groups) > 1:
        problem += f" ({len(groups)} patients with several scans)"
    return problem, f"Use {option('data.patients', AUTO)} to keep them together, or a regular expression or a table."


def _guess_patient(case: str) -> str:
    match = PATIENT_OF_CASE.fullmatch(case)
    return next(filter(None, match.groups())) if match else case


def _match_patients(ids: Sequence[str], expression: str) -> dict[str, str]:
    """Return case -> the first group of the expression, or what it matches at the beginning of the id."""
    try:
        pattern = re.compile(expression)
    except re.error as error:
        where = option("data.patients", expression)
        raise InputError(where, f"not a regular expression ({error})", r"Use 'P\d+', for example.") from error
    matches = {case: pattern.match(case) for case in ids}
    return {case: match[1 if pattern.groups else 0] or case for case, match in matches.items() if match}


def _read_patients(path: Path) -> dict[str, str]:
    """Read a table with the columns case and patient, separated by commas, semicolons or tabs."""
    where = option("data.patients", path)
    fix = "Write a table with the columns case and patient."
    with report_os_errors("read", where, fix):
        content = path.read_bytes()
    try:
        lines = content.decode("utf-8-sig").splitlines()
        delimiter = next((mark for mark in ",;\t" if mark in lines[0]), ",")
        rows = [tuple(row[column].strip() for column in COLUMNS) for row in csv.DictReader(lines, delimiter=delimiter)]
    except (ValueError, LookupError, AttributeError, csv.Error) as error:
        raise InputError(where, "not a table of cases and patients", fix) from error
    patient_of_case: dict[str, str] = {}
    for case, patient in ((compose_letters(case), patient) for case, patient in rows):
        if not patient or patient_of_case.setdefault(case, patient) != patient:
            raise InputError(where, f"assigns no patient, or several, to case {case}", fix)
    return patient_of_case
