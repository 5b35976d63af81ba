"""A study of box masks with its report, shared by several test files."""

import shutil

import pytest

from jaxla.studies.page import report_study
from tests.studies.runs import LASCARQS_FILES, PREDICTED, PROTOCOLS, REFERENCES, BoxRun, write_study


@pytest.fixture(scope="session")
def reported_study(tmp_path_factory):
    """A study with its report. Read-only."""
    folder = tmp_path_factory.mktemp("reported")
    scheduled = [
        BoxRun(protocol, method, seed, dict(zip(REFERENCES, rows, strict=True)))
        for protocol in PROTOCOLS
        for (method, seed), rows in PREDICTED.items()
    ]
    write_study(folder / "study", scheduled, REFERENCES, folder / "scans", files=LASCARQS_FILES)
    report_study(folder / "study", folder / "cache")
    return folder / "study"


@pytest.fixture
def study(reported_study, tmp_path):
    """A copy of `reported_study`."""
    return shutil.copytree(reported_study, tmp_path / "study")
