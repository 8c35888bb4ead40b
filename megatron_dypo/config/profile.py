"""The section ``profile`` of the configuration tree: which steps and ranks are profiled, and by which tool."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_dypo.checks import require


@dataclass(frozen=True, kw_only=True)
class ProfileConfig:
    """Profiles of single steps (docs/profiling.md). A profiled step is slower than the others."""

    steps: tuple[int, ...] = ()
    """Steps to profile, such as ``[3, 4]``. The first steps are slower than later ones. Empty: none."""
    ranks: tuple[int, ...] = (0,)
    """Ranks that are profiled."""
    tool: Literal["torch", "nsys"] = "torch"
    """``torch``: PyTorch's profiler; each profiled rank writes ``<run.dir>/profile/step_3_rank_0.json.gz`` for
    Perfetto. ``nsys``: NVTX ranges and the beginning and end of a capture, for a run that is started under
    ``nsys profile --capture-range=cudaProfilerApi``."""
    memory_snapshot: bool = False
    """On GPUs, record every allocation. A rank that runs out of memory then writes
    ``<run.dir>/profile/out_of_memory_rank_0.pickle`` for pytorch.org/memory_viz."""

    def __post_init__(self) -> None:
        require(all(step > 0 for step in self.steps), f"steps={list(self.steps)}", "steps are counted from 1")
        require(all(rank >= 0 for rank in self.ranks), f"ranks={list(self.ranks)}", "ranks are counted from 0")
        require(bool(self.ranks) or not self.steps, "ranks=[]", "name the ranks that profile the steps")
