"""The place and the format of a run's probes, for those who write and those who show them."""

from __future__ import annotations

from collections.abc import Mapping

FOLDER = "probe"
"""Folder in the run folder: ``step_N.json``, the results, and ``step_N.npz``, the scores they are computed from."""
FORMAT = 1
"""Version of the results' format."""


def describe_cost(cost: Mapping[str, float]) -> str:
    """Return a result's ``cost`` in words: seconds of each part, and the trajectories that it bought."""
    parts = {name: cost[f"{name}_seconds"] for name in ("rollout", "score", "estimate")}
    return (
        f"{sum(parts.values()):.3g} s: {parts['rollout']:.3g} s for rollouts, {parts['score']:.3g} s for scores, "
        f"{parts['estimate']:.3g} s for estimates; {cost['trajectories']:,} trajectories with "
        f"{cost['response_tokens']:,} response tokens"
    )
