"""The interpreter's lock: without it, the package says that it is not proven there."""

from __future__ import annotations

import subprocess
import sys

import pytest


pytestmark = pytest.mark.usefixtures("measured")

IMPORT = """
import sys
import psycopg2, zope.component  # what the package needs first: it, too, may turn the lock on
sys._is_gil_enabled = lambda: {lock}
import zpgpool, zpgpool.wsgi
import importlib
importlib.import_module("zpgpool")
"""


@pytest.mark.parametrize(("lock", "times"), [(False, 1), (True, 0)])
def test_without_the_lock_a_warning_says_once_that_it_is_not_proven(lock: bool, times: int) -> None:
    command = [sys.executable, "-W", "always::RuntimeWarning", "-c", IMPORT.format(lock=lock)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stderr.count("RuntimeWarning: zpgpool is not proven on a free-threaded Python") == times
    assert result.stderr.count("Warning") == times, result.stderr
