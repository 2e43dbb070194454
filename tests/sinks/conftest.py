from __future__ import annotations

from pathlib import Path

import pytest

from tests.sinks.rows import OUTPUTS


@pytest.fixture(params=OUTPUTS, ids=[f"{f}-{'folder' if o.endswith('/') else 'file'}" for o, f in OUTPUTS])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    """(output, format), for every kind of output."""
    out, format_name = request.param
    return f"{tmp_path}/{out}", format_name
