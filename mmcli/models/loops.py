"""Does a text run in a loop? Imports no torch: endpoints need it too."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# A loop: a block of at most so many tokens, so many times in a row, over so many tokens at least.
LOOP_BLOCK, LOOP_TIMES, LOOP_TOKENS = 8, 3, 4


def has_loop(tokens: Sequence[int]) -> bool:
    """Whether a block of 1 to 8 tokens comes three times or more in a row, over four tokens at least."""
    ids = np.asarray(tokens)
    for block in range(1, LOOP_BLOCK + 1):
        wanted = max(LOOP_TIMES * block, LOOP_TOKENS) - block
        if len(ids) < wanted + block:
            continue
        # A loop of that many tokens is a run of `wanted` tokens that equal those one block later.
        same = np.concatenate([[0], np.cumsum(ids[block:] == ids[:-block])])
        if (same[wanted:] - same[:-wanted] == wanted).any():
            return True
    return False
