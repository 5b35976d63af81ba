"""The start of a command, before it imports JAX and Matplotlib: their settings, and signals during the imports."""

from __future__ import annotations

import os
import signal
import sys
import traceback
from pathlib import Path
from types import TracebackType

# Settings of JAX that change results or reject valid computations -> the value that commands use, and its other
# spellings.
FIXED_SETTINGS = {
    "JAX_ENABLE_X64": ("0", "false", "f", "no", "n", "off"),
    "JAX_NUMPY_RANK_PROMOTION": ("allow",),
    "JAX_NUMPY_DTYPE_PROMOTION": ("standard",),
}
JAX_SETTINGS = ("jax", "_src", "config.py")  # the file that reads all variables named JAX_…


def start_command() -> None:
    """Let Ctrl-C end the process at once, and ignore environment variables that would break or change a command.

    `jaxla.cli.process.run_command` handles Ctrl-C from then on.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as behind nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["MPLBACKEND"] = "agg"  # a backend set for notebooks may not be installed; commands only write files
    for name, (value, *synonyms) in FIXED_SETTINGS.items():
        given = os.environ.get(name, "").lower()
        if given not in ("", value, *synonyms):
            print(f"{name}={given}: ignored; commands use {name}={value}", flush=True)
        os.environ[name] = value
    sys.excepthook = _report_error


def _report_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print a traceback, or one line if JAX rejects the value of an environment variable, which its error names."""
    frames = traceback.extract_tb(trace)
    if not frames or not isinstance(error, ValueError) or Path(frames[-1].filename).parts[-3:] != JAX_SETTINGS:
        sys.__excepthook__(kind, error, trace)
        return
    print(f"error: environment: {error}. Correct this variable, or unset it.", file=sys.stderr, flush=True)
    os._exit(2)
