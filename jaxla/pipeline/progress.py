"""How far the work on cases has come."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable

from tqdm import tqdm

log = logging.getLogger(__name__)


def track(items: Iterable, label: str) -> Iterable:
    """A progress bar on a terminal; elsewhere a line at each quarter."""
    items = list(items)
    if sys.stdout.isatty():
        yield from tqdm(items, label, leave=False, file=sys.stdout, unit="case")
        return
    for number, item in enumerate(items, start=1):
        yield item
        if number % max(1, len(items) // 4) == 0 or number == len(items):
            log.info("%s: %d of %d cases", label, number, len(items))
