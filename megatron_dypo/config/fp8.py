"""The section ``model.fp8`` of the configuration tree: FP8 training, and which GPUs can run it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

from megatron_dypo.checks import require, require_not_negative, require_positive

Recipe = Literal["none", "delayed", "tensorwise", "blockwise", "mxfp8"]

ROW_MULTIPLES: dict[Recipe, int] = {"none": 1, "delayed": 16, "tensorwise": 16, "blockwise": 128, "mxfp8": 32}
"""Multiple that each recipe needs for the tokens of a microbatch on one rank, and for the features of a linear layer
there.

Tokens are the inner dimension of the GEMM of a weight gradient. Its FP8 operands need a multiple of 16 (Megatron's
``get_fp8_align_size``) or whole blocks of scales: 32 values for MXFP8, 128 for the blockwise recipe (pages of
Transformer Engine on both recipes). Transformer Engine lets other multiples of 16 pass in places, for example by
gathering in bf16.
"""


class Needs(NamedTuple):
    """The compute capabilities that run a recipe."""

    lowest: tuple[int, int]
    below: tuple[int, int] | None
    """First capability that is too high; None: there is no upper limit."""
    generation: str


CAPABILITIES: dict[Recipe, Needs] = {
    "delayed": Needs((8, 9), None, "Ada, Hopper or newer"),
    "tensorwise": Needs((8, 9), None, "Ada, Hopper or newer"),
    "blockwise": Needs((9, 0), None, "Hopper or newer"),
    "mxfp8": Needs((10, 0), (12, 0), "Blackwell"),
}
"""Source: Transformer Engine's ``pytorch/quantization.py``, ``_compute_*_support``."""


def missing_capability(recipe: Recipe, capability: tuple[int, int]) -> str | None:
    """Return the capability that a GPU lacks for a recipe; None if it lacks nothing.

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
    """Join numbers by dots: (9, 0) → "9.0"."""
    return ".".join(map(str, numbers))


@dataclass(frozen=True, kw_only=True)
class Fp8Config:
    """FP8 for the linear layers of the transformer, by Transformer Engine; needs a GPU.

    Embedding, norms, attention scores, router, output projection and the fused log-prob stay in bf16. All forward
    passes (for π_old, for π_ref and for the update) use the same layers and so the same recipe.
    """

    recipe: Recipe = "none"
    """How tensors are scaled. ``none``: no FP8. ``tensorwise``: one scale per tensor, from its own largest value
    (Ada, Hopper, Blackwell); start with this recipe. ``delayed``: one scale per tensor, from past updates; before
    the first update the scales are 1, so that the first log-probs are coarse. ``blockwise``: one scale per 1×128
    activations and per 128×128 weights (Hopper and newer, CUDA toolkit 12.9). ``mxfp8``: one scale per 32 values
    (Blackwell)."""
    format: Literal["auto", "hybrid", "e4m3"] = "auto"
    """``e4m3``: all tensors in e4m3. ``hybrid``: gradients in e5m2, the rest in e4m3. ``auto``: ``hybrid`` for the
    recipes with one scale per tensor, else ``e4m3``."""
    margin: int = 0
    """``delayed`` only: keep this many powers of two below the largest FP8 value."""
    amax_history_len: int = 1024
    """``delayed`` only: number of past passes whose largest values are kept."""
    amax_compute_algo: Literal["max", "most_recent"] = "max"
    """``delayed`` only: take the largest of those values, or the most recent one, for the scale."""
    first_layers_bf16: int = 0
    """Number of first layers that stay in bf16."""
    last_layers_bf16: int = 0
    """Number of last layers that stay in bf16."""
    param_gather: bool = False
    """Keep the weights of FP8 layers only in FP8, and gather them in FP8 (``mxfp8``: in bf16). This saves the bf16
    copy and half the traffic; the optimizer keeps the fp32 main parameters. Servers then get weights rounded to FP8.
    Needs ``optimizer.distributed``."""

    def __post_init__(self) -> None:
        require_not_negative(self, "margin", "first_layers_bf16", "last_layers_bf16")
        require_positive(self, "amax_history_len")
        delayed = self.recipe == "delayed"
        require(delayed or not self.margin, f"margin={self.margin}", f"needs recipe=delayed, got {self.recipe}")
        for name in ("first_layers_bf16", "last_layers_bf16"):
            value = getattr(self, name)
            require(
                self.is_on or not value, f"{name}={value}", "needs an FP8 recipe: without one all layers are in bf16"
            )
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
                "needs recipe tensorwise, blockwise or mxfp8: with delayed scaling the rounding of a weight depends on "
                "earlier passes, so that swapping the reference policy in and out would not restore the weights bit "
                "for bit",
            )

    @property
    def is_on(self) -> bool:
        """Whether a recipe is chosen."""
        return self.recipe != "none"

    @property
    def token_multiple(self) -> int:
        """Multiple to which the recipe needs the tokens of a microbatch on one rank padded."""
        return ROW_MULTIPLES[self.recipe]

    @property
    def element_format(self) -> Literal["hybrid", "e4m3"]:
        """The value of ``format`` with ``auto`` resolved."""
        if self.format != "auto":
            return self.format
        return "e4m3" if self.recipe in ("blockwise", "mxfp8") else "hybrid"
