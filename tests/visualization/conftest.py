"""The tiny detector, its data and its run, of tests/evaluation/."""

from tests.evaluation.conftest import *  # noqa: F403
