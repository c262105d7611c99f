"""A moment of `make stress`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import ROOT


@pytest.mark.slow
def test_the_pools_stand_being_attacked() -> None:
    """Real time: 16 seconds of attacks, and what each scenario's end takes."""
    script = Path(__file__).parent / "stress.py"
    result = subprocess.run(
        [sys.executable, str(script), "--seconds", "16"],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert result.returncode == 0, result.stdout + result.stderr
