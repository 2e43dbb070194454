from __future__ import annotations

import sys
from pathlib import Path

# Tiny checkpoints are built there.
sys.path.append(str(Path(__file__).resolve().parent.parent / "models"))
