"""Summaries, curves and statistics of run records and inspections."""
