"""What several tests share: one cache of compiled programs, some phantoms and one small finished run."""

import os
import tempfile
from pathlib import Path

import pytest

from tests.commands import run_module

# What one test has compiled, the others and the commands that they start need not compile again.
if "PYTEST_XDIST_WORKER" not in os.environ:  # workers share that of the process that started them
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxla-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2 * 1024**3)  # with a limit, JAX locks the folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # many small ones slow the locked folder down


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Six small phantoms in the LAScarQS layout."""
    folder = tmp_path_factory.mktemp("data") / "phantoms"
    run_module("jaxla.phantom", f"--output={folder}", "--cases=6", "--size=small", "--seed=3")
    return folder


@pytest.fixture(scope="session")
def small_run(phantoms, tmp_path_factory):
    """A finished run on the six phantoms: three epochs of the quickstart's method at 48 pixels."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    done = run_module(
        "jaxla.train",
        "--exp=quickstart",
        f"--data.root={phantoms}",
        f"--run-dir={folder}",
        f"--cache-dir={folder.parent / 'cache'}",
        "--preprocessing.image_size=48",
        "--training.epochs=3",
        "--seed=1",
    )
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


@pytest.fixture(scope="session")
def hippocampus():
    """Folder of 60 real brain MR scans, where the environment has them."""
    folder = Path(os.environ.get("JAXLA_TEST_DATA", ".")) / "Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip("JAXLA_TEST_DATA names no folder with Task04_Hippocampus")
    return folder
