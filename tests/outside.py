"""Data that is no part of the project: tests that want it are skipped where it is not given."""

import os
from pathlib import Path

VARIABLE = 'SASA_TEST_DATA'


def outside(name: str) -> Path:
    """Give the path of a data set in the folder that the environment names; it need not exist."""
    return Path(os.environ.get(VARIABLE) or os.devnull, name)


def why_not(name: str) -> str:
    """The reason of a skip."""
    return f'needs the data set {name} in the folder that {VARIABLE} names'
