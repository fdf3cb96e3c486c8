"""The experiments that claims of this repository name: one module each, with ``EXPERIMENT`` in it."""
