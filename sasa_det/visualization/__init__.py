"""Plots, a run's report, and the explorer's page."""
