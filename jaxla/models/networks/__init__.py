"""The networks, image in, logits out. Each file is one; `models/build.py` finds it by the `FAMILY` it ends in."""
