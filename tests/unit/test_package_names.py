"""Every name and argument that this package uses of torch's device modules, NCCL and Transformer Engine exists in the
lowest and the highest supported version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from tests.support.package_uses import package_uses
from tests.support.sources import Sources
from tests.support.supported_names import ROOT, TORCH, oldest_torch, private_uses_of, problems, uses_of
from tests.support.te.run import VERSIONS, te_folder

INSTALLED = Sources(Path(torch.__file__).parents[1])

OF_TRANSFORMER_ENGINE = """
from transformer_engine.common.recipe import DelayedScaling, Float8BlockScaling, Float8CurrentScaling, Format
from transformer_engine.common.recipe import MXFP8BlockScaling
from transformer_engine.pytorch import (
    DotProductAttention, GroupedLinear, LayerNormLinear, Linear, RMSNorm, fp8_autocast, fp8_model_init
)
from transformer_engine.pytorch.optimizers import FusedAdam

DelayedScaling(
    margin=0, fp8_format=0, amax_history_len=1, amax_compute_algo="max", fp8_dpa=False, fp8_mha=False
)
Float8CurrentScaling(fp8_format=0)
Float8BlockScaling(fp8_format=0)
MXFP8BlockScaling(fp8_format=0)
fp8_model_init(enabled=True, recipe=None, preserve_high_precision_init_val=True)
fp8_autocast(enabled=True, fp8_recipe=None, fp8_group=None)
FusedAdam(params=[], lr=0, weight_decay=0, betas=(), eps=0, adam_w_mode=True)
"""
"""Names that Megatron uses for this package, with their arguments: the recipes of ``model.fp8``, layers, optimizer."""
EXACT_VALUES = "get_high_precision_init_val"
"""Method that Transformer Engine adds to quantised parameters; see ``mcore/fp8.py``."""


def test_names_of_torch_are_in_the_installed_version() -> None:
    assert problems(uses_of(*TORCH), INSTALLED.find) == []


def test_names_of_torch_are_in_the_oldest_supported_version() -> None:
    version, find = oldest_torch()
    (oldest,) = re.findall(r"^ *torch>=([\d.]+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    assert version.startswith(oldest)
    uses = [*uses_of(*TORCH), *private_uses_of("torch")]
    assert problems(iter(uses), find) == [], "tests/golden/render_torch_names.py lists the names of that version"


def test_the_uses_that_are_compared_have_nccls_constructor_and_the_private_names() -> None:
    arguments = {use.name: use.positional for _, use in uses_of(*TORCH)}
    assert arguments["torch.distributed.ProcessGroupNCCL"] == 4
    assert "torch.cuda.set_device" in arguments
    assert {"groups.NEW_GROUP", "groups.WORLD"} <= {name for name, _ in private_uses_of("torch")}


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("import torch\ntorch.cuda.synchronise()", "x:2: torch.cuda.synchronise does not exist"),
        ("import torch.distributed as dist\ndist.barrier(grp=1)", "x:2: torch.distributed.barrier takes no grp"),
        ("from torch.cuda import sync", "x:1: torch.cuda.sync does not exist"),
        (
            "import torch.distributed as d\nd.ProcessGroupNCCL(1, 2, 3, 4, 5)",
            "x:2: torch.distributed.ProcessGroupNCCL takes no argument 5",
        ),
    ],
)
def test_a_name_or_an_argument_that_does_not_exist_is_found(source: str, problem: str) -> None:
    uses = [("x", use) for use in package_uses(source, TORCH)]
    for find in (INSTALLED.find, oldest_torch()[1]):
        assert problems(iter(uses), find) == [problem]


@pytest.mark.parametrize("version", VERSIONS)
def test_names_of_transformer_engine_are_in_the_lowest_and_the_highest_version(version: str) -> None:
    sources = Sources(te_folder(version))
    through_megatron = (("Megatron", use) for use in package_uses(OF_TRANSFORMER_ENGINE, ("transformer_engine",)))
    for uses in (uses_of("transformer_engine"), private_uses_of("transformer_engine"), through_megatron):
        assert problems(uses, sources.find) == []
    base = te_folder(version) / "transformer_engine" / "pytorch" / "module" / "base.py"
    assert f".{EXACT_VALUES} = " in base.read_text(encoding="utf-8")


def test_the_versions_of_transformer_engine_are_those_of_the_extra() -> None:
    (lowest,) = re.findall(r"^te = transformer-engine.*>=([\d.]+)", (ROOT / "setup.cfg").read_text(), re.MULTILINE)
    pin = (ROOT / "requirements" / "te_lowest.txt").read_text()
    assert f"transformer-engine=={lowest}.0 " in pin
