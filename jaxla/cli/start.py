"""The start of a command, before it imports JAX and Matplotlib: how they are set up, and signals during imports."""

from __future__ import annotations

import os
import signal

# Settings of JAX that change results or stop computations that are right -> the value that commands use, and how a user
# may also spell it.
FIXED_SETTINGS = {
    "JAX_ENABLE_X64": ("0", "false", "f", "no", "n", "off"),
    "JAX_NUMPY_RANK_PROMOTION": ("allow",),
    "JAX_NUMPY_DTYPE_PROMOTION": ("standard",),
}


def start_command() -> None:
    """Let Ctrl-C end the process at once, and ignore environment variables that would break or change a command.

    `jaxla.cli.process.run_command` handles Ctrl-C from then on.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored, as behind nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.environ["MPLBACKEND"] = "agg"  # a notebook's backend may not be installed here; commands only write files
    for name, (value, *synonyms) in FIXED_SETTINGS.items():
        given = os.environ.get(name, "").lower()
        if given not in ("", value, *synonyms):
            print(f"{name}={given}: ignored; commands use {name}={value}", flush=True)
        os.environ[name] = value
