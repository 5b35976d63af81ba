"""The command `jaxla`, which has all other commands as subcommands."""

import re
import subprocess

import pytest

import jaxla
from tests.commands import ROOT, run_in_new_process

pytestmark = pytest.mark.quick


def test_version_option_prints_the_version_of_the_package(tmp_path):
    done = run_in_new_process(tmp_path, "jaxla", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"jaxla {jaxla.__version__}\n", "")
    assert re.search(rf"^version: {re.escape(jaxla.__version__)}$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)


def test_help_lists_every_command(tmp_path):
    listed = run_in_new_process(tmp_path, "jaxla", "--help").stdout
    modules = {path.stem for path in (ROOT / "jaxla").glob("*.py") if "run_command(main)" in path.read_text()}
    assert set(re.findall(r"^  (\w+) ", listed, re.MULTILINE)) == modules | {"convert"}


def test_jaxla_convert_runs_convert_weights(tmp_path):
    first, second = (run_in_new_process(tmp_path, *words) for words in (("jaxla", "convert"), ("convert_weights",)))
    assert (first.returncode, first.stderr) == (2, second.stderr)
    assert first.stderr.startswith("error: --source: required to convert a checkpoint.")


def test_an_unknown_command_suggests_the_nearest(tmp_path):
    done = run_in_new_process(tmp_path, "jaxla", "trian")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: trian: not a command (did you mean train?). Commands: train, predict,")
    assert len(done.stderr.splitlines()) == 1


def test_bash_completes_commands_options_and_paths(tmp_path):
    script = run_in_new_process(tmp_path, "jaxla", "--print-completion=bash").stdout
    (tmp_path / "scans").mkdir()
    completed = []
    for words in (["pre"], ["train", "--training.ep"], ["verify", "--data.root", "sc"]):
        line = f'COMP_WORDS=(jaxla {" ".join(words)}) COMP_CWORD={len(words)}\n_shtab_jaxla\necho "${{COMPREPLY[@]}}"'
        done = subprocess.run(["bash", "-c", f"{script}\n{line}"], cwd=tmp_path, capture_output=True, text=True)
        completed.append(done.stdout.strip())
    assert completed == ["predict", "--training.epochs", "scans"]


def test_an_unknown_shell_is_refused(tmp_path):
    done = run_in_new_process(tmp_path, "jaxla", "--print-completion=fish")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --print-completion=fish: unknown name. Known: bash, zsh, tcsh.\n"
