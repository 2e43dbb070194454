"""docs/models.md says what the tables say."""

from __future__ import annotations

from pathlib import Path

from mmcli.models.dual_encoder import DUAL_ENCODERS
from mmcli.models.encoder import ENCODERS
from mmcli.models.reference import reference

PAGE = Path(__file__).parents[2] / "docs" / "models.md"


def test_the_page_is_current() -> None:
    assert PAGE.read_text() == reference(), "run: python -m mmcli.models.reference > docs/models.md"


def test_every_type_is_named_once() -> None:
    first_cells = [line.split("|")[1] for line in reference().splitlines() if line.startswith("| ")]
    named = [kind.strip() for cell in first_cells for kind in cell.split(",")]
    for kind in [*DUAL_ENCODERS, *ENCODERS]:
        assert named.count(kind) == 1, kind
