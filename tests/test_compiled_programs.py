"""Compiled programs in the cache folder: a second process reuses them and gets the same result."""

import os
import subprocess
import sys

import pytest

# Prints the number of programs that were read from the cache, and a result as exact hexadecimal.
SCRIPT = """
import sys
from pathlib import Path
import jax
from jaxla import hardware
hardware.MIN_COMPILE_SECONDS = 0
hits = []
jax.monitoring.register_event_listener(lambda event, **about: hits.append(event) if event.endswith("cache_hits") else 0)
hardware.keep_compiled_programs(Path(sys.argv[1]))
x = jax.random.normal(jax.random.key(0), (64, 64))
def step(x):
    return jax.numpy.tanh(x @ x.T).sum() / 3
step = jax.jit(step)
result = float(step(x)).hex()
print(len(hits), result)
"""


def run_script(cache_dir, **environment):
    """Return the number of programs that were read from the cache, and the result."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")} | environment
    done = subprocess.run([sys.executable, "-c", SCRIPT, cache_dir], capture_output=True, text=True, env=variables)
    assert (done.returncode, done.stderr) == (0, "")
    hits, result = done.stdout.split()
    return int(hits), result


@pytest.mark.quick
def test_a_second_process_uses_the_programs_with_the_same_result(tmp_path):
    hits, result = run_script(tmp_path)
    assert hits == 0
    (folder,) = (tmp_path / "compiled").iterdir()
    programs = len(list(folder.glob("*-cache")))
    assert run_script(tmp_path) == (programs, result)
    (program,) = folder.glob("jit_step-*-cache")
    content = program.read_bytes()
    # as if a process had been killed while it wrote the program
    program.write_bytes(content[:20])
    program.with_name(program.name.removesuffix("cache") + "atime").unlink()
    assert run_script(tmp_path) == (programs - 1, result)
    assert run_script(tmp_path) == (programs, result)
    assert run_script(tmp_path, JAX_ENABLE_COMPILATION_CACHE="0") == (0, result)


@pytest.mark.quick
def test_the_compilation_cache_that_the_user_chose_is_used(tmp_path):
    run_script(tmp_path / "cache", JAX_COMPILATION_CACHE_DIR=str(tmp_path / "own"))
    assert not (tmp_path / "cache").exists()


@pytest.mark.quick
def test_without_a_writable_folder_no_program_is_cached(tmp_path):
    (tmp_path / "file").touch()
    assert run_script(tmp_path / "file")[0] == 0
