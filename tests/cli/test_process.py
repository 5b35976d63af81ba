"""How a command starts and ends: environment variables, exit codes, tracebacks, signals and pipes."""

import os
import pwd
import re
import signal
import subprocess
import sys

import nibabel as nib
import numpy as np
import pytest

from jaxla.cli.files import default_cache_dir
from jaxla.config import InputError
from tests.commands import ROOT, refuse, run_in_new_process
from tests.runs.folders import read_json, scan_file


@pytest.fixture(autouse=True)
def ctrl_c():
    """Let new processes receive Ctrl-C even if the tests run in the background, where a shell ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run_statement(statement, stdout=subprocess.DEVNULL):
    """Run a command whose `main` is one statement, in a new process."""
    code = f"from jaxla.cli.process import run_command\ndef main(arguments): {statement}\nrun_command(main)"
    return subprocess.run([sys.executable, "-u", "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True)


@pytest.mark.quick
def test_a_closed_stdout_ends_a_command_silently():
    """As in `... | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    done = run_statement("print('a line')", writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


@pytest.mark.quick
@pytest.mark.parametrize(
    ("statement", "error"),
    [
        ("raise BrokenPipeError('another process')", "BrokenPipeError: another process"),
        ("open('nowhere.npy')", "FileNotFoundError: [Errno 2] No such file or directory: 'nowhere.npy'"),
    ],
)
def test_a_programming_error_shows_its_traceback(statement, error):
    done = run_statement(statement)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert done.stderr.endswith(f"{error}\n")


@pytest.mark.quick
def test_bad_input_is_reported_in_one_line():
    done = run_statement(
        "from jaxla.config import InputError, option; raise InputError(option('seed', 1), 'odd', 'Use 2.')"
    )
    assert (done.returncode, done.stderr) == (2, "error: --seed=1: odd. Use 2.\n")


# --- signals ---------------------------------------------------------------------------------------------------------

DISCARDED = {  # code in which Python discards the exception of a signal handler
    "a callback of the garbage collector": """
    def once(phase, info):
        gc.callbacks.remove(once)
        signal.raise_signal(NUMBER)
    gc.callbacks.append(once)
    gc.collect()""",
    "a destructor": """
    class Dying:
        def __del__(self):
            signal.raise_signal(NUMBER)
    Dying()""",
    "a weak reference's callback, twice": """
    class Kept(set): pass
    for _ in range(2):
        kept = Kept()
        reference = weakref.ref(kept, lambda _: signal.raise_signal(NUMBER))
        del kept""",
}


@pytest.mark.quick
@pytest.mark.parametrize("number", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("kind", DISCARDED)
def test_a_signal_that_python_discards_is_delivered_again(kind, number):
    """JAX also registers a callback of the garbage collector."""
    code = f"""
import gc, signal, time, weakref
from jaxla.cli.process import run_command
NUMBER = signal.{number}
def main(arguments):{DISCARDED[kind]}
    time.sleep(600)  # interrupted by the signal
run_command(main)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "interrupted\n")


@pytest.mark.quick
@pytest.mark.parametrize("words", [("jaxla.info",), ("jaxla", "info"), ("convert_weights",)])
def test_ctrl_c_during_imports_shows_no_traceback(tmp_path, words):
    (tmp_path / "jsonargparse.py").write_text("import signal; signal.raise_signal(signal.SIGINT)")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = subprocess.run(
        [sys.executable, "-m", *words], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


# --- the environment -------------------------------------------------------------------------------------------------


@pytest.mark.quick
def test_characters_that_the_terminal_cannot_show_are_escaped():
    code = "from jaxla.cli.process import run_command\nrun_command(lambda arguments: print('48 × 48 µm'))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, b"48 \\xd7 48 \\xb5m\n", b"")


@pytest.mark.quick
def test_control_characters_in_an_error_are_escaped():
    done = run_statement(
        "from jaxla.config import InputError; raise InputError('a\\x1b[2Jb.nii', 'odd\\nerror: forged', '')"
    )
    assert (done.returncode, done.stderr) == (2, "error: a\\x1b[2Jb.nii: odd error: forged.\n")


def test_settings_that_would_change_results_are_ignored_by_a_command(small_run, phantoms, tmp_path):
    """The mask is bit-identical to the one that the run predicted for the same test case."""
    hostile = {
        "JAX_ENABLE_X64": "1",
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "JAX_NUMPY_DTYPE_PROMOTION": "strict",
        "MPLBACKEND": "module://a_notebook.backend",
        "PYTHONIOENCODING": "ascii",
    }
    case = read_json(small_run / "split.json")["test"][0]
    options = (f"--run={small_run}", f"--input={scan_file(phantoms, case)}", f"--output={tmp_path / 'mask.nii.gz'}")
    done = run_in_new_process(tmp_path, "jaxla.predict", *options, **hostile)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:3] == [
        "JAX_ENABLE_X64=1: ignored; commands use JAX_ENABLE_X64=0",
        "JAX_NUMPY_RANK_PROMOTION=raise: ignored; commands use JAX_NUMPY_RANK_PROMOTION=allow",
        "JAX_NUMPY_DTYPE_PROMOTION=strict: ignored; commands use JAX_NUMPY_DTYPE_PROMOTION=standard",
    ]
    expected, mask = (
        nib.load(path).get_fdata()
        for path in (small_run / "test" / "predictions" / f"{case}.nii.gz", tmp_path / "mask.nii.gz")
    )
    np.testing.assert_array_equal(mask, expected)


@pytest.mark.quick
def test_figures_do_not_need_the_backend_of_a_notebook():
    code = "from jaxla.cli.start import start_command; start_command(); import matplotlib.figure"
    environment = os.environ | {"MPLBACKEND": "module://a_notebook.backend"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("JAX_DEFAULT_MATMUL_PRECISION", 'Invalid value "foo" for JAX flag jax_default_matmul_precision'),
        ("JAX_THREEFRY_PARTITIONABLE", "invalid truth value 'foo' for environment 'JAX_THREEFRY_PARTITIONABLE'"),
    ],
)
def test_a_setting_that_jax_refuses_is_reported_in_one_line(tmp_path, name, problem):
    line = refuse(tmp_path, "jaxla.train", run=lambda *words: run_in_new_process(*words, **{name: "foo"}))
    assert line == f"error: environment: {problem}. Correct this variable, or unset it."


@pytest.mark.parametrize("platform", ["cuda", "cpuu"])
def test_a_platform_without_a_device_is_refused(tmp_path, platform):
    def run_on_platform(folder, module, *options):
        return run_in_new_process(folder, module, *options, JAX_PLATFORMS=platform)

    options = ("--exp=quickstart", "--data.root=phantom", f"--run-dir={tmp_path / 'run'}")
    line = refuse(tmp_path, "jaxla.train", *options, run=run_on_platform)
    message = rf"JAX_PLATFORMS={platform}: JAX finds no such device \(.*\)\. Use JAX_PLATFORMS=cpu, or unset it\."
    assert re.fullmatch(f"error: {message}", line)


@pytest.mark.quick
def test_a_user_without_a_home_folder_is_asked_for_a_cache_folder(monkeypatch):
    """A container may run under a user id that its password file does not list."""

    def unknown(number):
        raise KeyError(number)

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    with pytest.raises(InputError, match=r"^cache-dir: the user has no home folder\. Pass a folder, or set XDG_CACHE"):
        default_cache_dir()
