"""At which of its steps a program is killed (dying.py), where there are too many to try all."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

EVERY = int(os.environ.get("SNAPFS_TEST_EVERY", "4"))  # 1: all of them, as scripts/soak-backup


def some_steps(rarer: int = 1) -> Iterator[int]:
    """Every `EVERY`th step, from one of the first on, drawn anew each time.

    Says which, for who has to look into a failure.  The caller ends it.  `rarer`: only one in so
    many of those, where each takes long, unless all are wanted.
    """
    every = EVERY * rarer if EVERY > 1 else 1
    step = random.randint(1, every)
    while True:
        print("killed at step", step)
        yield step
        step += every
