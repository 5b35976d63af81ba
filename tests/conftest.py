"""Fixtures that several test files share: compiled programs, phantoms, and one small finished run."""

import os
import tempfile
from pathlib import Path

import pytest
from filelock import FileLock

from tests.commands import SMALL_RUN_OPTIONS, run_module, succeed

# A program that one test has compiled is not compiled again by other tests, or by the commands that they start.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:  # workers inherit the folder from the process that started them
    COMPILATION_CACHE = tempfile.TemporaryDirectory(prefix="jaxla-compiled-")
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILATION_CACHE.name
    os.environ["JAX_COMPILATION_CACHE_MAX_SIZE"] = str(2 * 1024**3)  # with a limit, JAX locks the folder
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"  # many small programs slow the locked folder down

# These files take longest. They run first, so that several workers end at about the same time.
LONGEST = (
    "test_mesh.py", "test_golden.py", "test_two_process_runs.py", "test_nnunet_command.py", "test_tutorial.py",
    "test_all_patients.py", "test_minutes.py", "test_rivals.py", "test_resume.py", "test_cross_validation.py",
    "test_study_command.py", "test_processes.py", "test_resume_command.py", "test_two_pass.py", "test_paper_runs.py",
)  # fmt: skip


def pytest_configure(config):
    config.option.loadscopereorder = False  # xdist would begin with the files that have the most tests


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


def make_once(tmp_path_factory, name, make):
    """Return the folder `name`, which the first worker that needs it fills by `make(folder)` for all workers."""
    base = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        base = base.parent
    folder, finished = base / name, base / f"{name}.finished"
    with FileLock(base / f"{name}.lock"):
        if not finished.exists():
            folder.mkdir()
            make(folder)
            finished.touch()
    return folder


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory):
    """Six small phantoms in the LAScarQS layout. Read-only."""

    def make(folder):
        succeed(folder, "jaxla.phantom", f"--output={folder / 'phantoms'}", "--cases=6", "--size=small", "--seed=3")

    return make_once(tmp_path_factory, "data", make) / "phantoms"


@pytest.fixture(scope="session")
def small_run(phantoms, tmp_path_factory):
    """A finished run on the six phantoms: three epochs of vit_mini8 at 48 pixels. Read-only.

    Its cache folder is `cache`, next to the run folder. `stdout.txt` contains what the command printed.
    """

    def make(folder):
        folders = (f"--data.root={phantoms}", f"--run-dir={folder / 'small'}", f"--cache-dir={folder / 'cache'}")
        done = run_module("jaxla.train", "--exp=quickstart", *folders, *SMALL_RUN_OPTIONS)
        (folder / "small" / "stdout.txt").write_text(done.stdout)

    return make_once(tmp_path_factory, "runs", make) / "small"


@pytest.fixture(scope="session")
def hippocampus():
    """The folder of 60 real brain MR scans, if JAXLA_TEST_DATA contains it."""
    folder = Path(os.environ.get("JAXLA_TEST_DATA", ".")) / "Task04_Hippocampus"
    if not folder.is_dir():
        pytest.skip("JAXLA_TEST_DATA: not a folder with Task04_Hippocampus")
    return folder


@pytest.fixture(scope="module")
def fast_compilation():
    """Compile with little optimisation, in modules whose programs take longer to compile than to run."""
    import jax  # imported here because JAX reads the environment variables above

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
