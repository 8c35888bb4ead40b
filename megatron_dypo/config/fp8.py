"""FP8 training's part of the configuration tree; see :mod:`megatron_dypo.config.tree`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_dypo.checks import require, require_not_negative, require_positive

Recipe = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]

ROW_MULTIPLES: dict[Recipe, int] = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Tokens, and features of a linear layer on one rank, come in multiples of this.

The tokens are the inner dimension of a weight gradient's GEMM, whose FP8 operands want 16 (Megatron's ``get_fp8_align_size``)
or whole blocks of scales: 32 of MXFP8, 128 of the blockwise recipe (Transformer Engine's pages on both recipes; its code
lets other multiples of 16 pass in places, e.g. by gathering such rows in bf16).
"""


class Needs(NamedTuple):
    """Compute capabilities that run a recipe."""

    lowest: tuple[int, int]
    below: tuple[int, int] | None
    """The first one that is too high."""
    generation: str


CAPABILITIES: dict[Recipe, Needs] = {
    "delayed": Needs((8, 9), None, "Ada, Hopper or newer"),
    "tensorwise": Needs((8, 9), None, "Ada, Hopper or newer"),
    "blockwise": Needs((9, 0), None, "Hopper or newer"),
    "mxfp8": Needs((10, 0), (12, 0), "Blackwell"),
}
"""By Transformer Engine's ``pytorch/quantization.py``, ``_compute_*_support``."""


def missing_capability(recipe: Recipe, capability: tuple[int, int]) -> str | None:
    """What a GPU of this capability lacks to run a recipe; None: nothing.

    missing_capability("blockwise", (8, 0)) → "compute capability 9.0 or higher, found 8.0"
    """
    if recipe == "none":
        return None
    lowest, below, _ = CAPABILITIES[recipe]
    if lowest <= capability and (below is None or capability < below):
        return None
    limit = "" if below is None else f" and below {dotted(below)}"
    return f"compute capability {dotted(lowest)} or higher{limit}, found {dotted(capability)}"


def dotted(numbers: tuple[int, ...]) -> str:
    """(9, 0) → "9.0"."""
    return ".".join(map(str, numbers))


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """Linear layers of the transformer in FP8, by Transformer Engine; needs a GPU.

    Embedding, norms, attention's scores, router and output projection stay in bf16, and so does the fused log-prob. All
    forward passes of the policy (π_old, π_ref and the update's) go through the same layers, hence the same recipe.
    """

    recipe: Recipe = "none"
    """How tensors are scaled. ``tensorwise``: by their own largest value (Hopper, Ada, Blackwell); start with this one.
    ``delayed``: by that of past updates; until the first update the scales are 1, so that the log-probs scored before it are
    coarse. ``blockwise``: for each 1×128 activations and 128×128 weights (Hopper and newer, toolkit 12.9). ``mxfp8``: for each
    32 values (Blackwell). ``none``: no FP8."""
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    """``hybrid``: gradients in e5m2, the rest in e4m3. ``auto``: ``hybrid`` where a tensor has one scale, else ``e4m3``."""
    margin: int = 0
    """``delayed``: powers of two to stay below the largest FP8 value."""
    amax_history_len: int = 1024
    """``delayed``: passes that the largest value is remembered for."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """``delayed``: which of those values gives the scale."""
    first_layers_bf16: int = 0
    """Layers at the start of the model that stay in bf16."""
    last_layers_bf16: int = 0
    """Layers at its end that do."""
    param_gather: bool = False
    """Keep the weights of FP8 layers in FP8 alone, and gather them so (``mxfp8``: in bf16): no bf16 weights beside their FP8
    copies, half the traffic; the fp32 main parameters are the optimizer's. Servers then get weights rounded to FP8. Needs
    ``optimizer.distributed``."""

    def __post_init__(self) -> None:
        require_not_negative(self, "margin", "first_layers_bf16", "last_layers_bf16")
        require_positive(self, "amax_history_len")
        delayed = self.recipe == "delayed"
        require(delayed or not self.margin, f"margin={self.margin}", f"needs recipe=delayed, got {self.recipe}")
        for name in ("first_layers_bf16", "last_layers_bf16"):
            value = getattr(self, name)
            require(self.is_on or not value, f"{name}={value}", "needs an FP8 recipe: all layers are in bf16 without")
            require(
                not (delayed and value),
                f"{name}={value}",
                "needs recipe tensorwise, blockwise or mxfp8: delayed scaling updates the scales of all layers at once",
            )
        if self.param_gather:
            require(self.is_on, "param_gather=true", "needs an FP8 recipe")
            require(
                not delayed,
                "param_gather=true",
                "needs recipe tensorwise, blockwise or mxfp8: with delayed scaling the rounding of a weight depends on the "
                "passes before it, so that weights which gave way to the reference policy would not return bit by bit",
            )

    @property
    def is_on(self) -> bool:
        """Whether anything is in FP8."""
        return self.recipe != "none"

    @property
    def row_multiple(self) -> int:
        """What the recipe asks of the tokens that a rank holds of a packed row."""
        return ROW_MULTIPLES[self.recipe]

    @property
    def element_format(self) -> Literal["hybrid", "e4m3"]:
        """``format`` with ``auto`` resolved."""
        if self.format != "auto":
            return self.format
        return "e4m3" if self.recipe in ("blockwise", "mxfp8") else "hybrid"
