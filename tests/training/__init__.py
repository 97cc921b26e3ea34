"""The training code: exact parts exactly, learning parts for a few steps; no downloads."""
