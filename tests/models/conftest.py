"""What the tests of models share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", autouse=True)
def pack_small_layers() -> Iterator[None]:
    """On a CPU the layers of tiny models are packed as those of real ones are."""
    from mmcli.models import packed

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(packed, "LEAST_WEIGHTS", 0)
        # Patches of 2 x 2.
        patched.setattr(packed, "LEAST_PATCH", 4)
        yield
