"""The place and the format of a run's probes, for those who write and those who show them."""

from __future__ import annotations

FOLDER = "probe"
"""Folder in the run folder: ``step_N.json``, the results, and ``step_N.npz``, the scores they are computed from."""
FORMAT = 1
"""Version of the results' format."""
