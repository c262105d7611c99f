"""A moment of `make stress`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_pools_stand_being_shot_at() -> None:
    """Real time: 16 seconds."""
    script = Path(__file__).parent / "stress.py"
    result = subprocess.run(
        [sys.executable, str(script), "--seconds", "16"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stdout + result.stderr
