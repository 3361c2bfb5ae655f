"""Measuring: equality of functions, paired timing in fresh processes, statistics, verdicts."""
