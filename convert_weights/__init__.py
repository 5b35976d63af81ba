"""Convert released checkpoints into the weights of this package, and back."""

import sys

if getattr(sys, "argv", [])[:1] == ["-m"]:  # Python is about to run `python -m convert_weights`
    from jaxla.cli.start import start_command

    start_command()
