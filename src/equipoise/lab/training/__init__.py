"""The trainer: its loop, ranks, evaluation, and what it reports on the way."""
