"""Plots, the report of a run, and the explorer's page."""
