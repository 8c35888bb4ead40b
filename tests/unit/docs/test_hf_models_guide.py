"""docs/hf_models.md states defaults, scalings and messages correctly."""

import re
from pathlib import Path

import pytest

from megatron_dypo.models.architecture import FAMILIES, architecture_from_hf
from megatron_dypo.models.hf.defaults import DEFAULTS
from megatron_dypo.models.hf.rope_scaling import ROPE_SCALINGS
from tests.support.smallest_configs import smallest

ROOT = Path(__file__).parents[3]
GUIDE = (ROOT / "docs" / "hf_models.md").read_text(encoding="utf-8")


def cells(first: str) -> list[str]:
    (line,) = re.findall(rf"^\| {first} \|(.*)\|$", GUIDE, flags=re.MULTILINE)
    return [cell.strip() for cell in line.split("|")]


def test_the_table_of_defaults_is_that_of_the_code():
    assert tuple(cells("field")) == FAMILIES
    heads = [defaults.key_value_heads or "as many as query heads" for defaults in DEFAULTS.values()]
    assert cells("`num_key_value_heads`") == list(map(str, heads))
    channels = [defaults.head_dim or "hidden / heads" for defaults in DEFAULTS.values()]
    assert [cell.replace("not used", "hidden / heads") for cell in cells("`head_dim`")] == list(map(str, channels))
    read = [architecture_from_hf(smallest(family), where="") for family in FAMILIES]
    windows = [f"{arch.sliding_window:,}" if arch.sliding_window else "none" for arch in read]
    windows = [f"{a.windows.size}, on some layers" if a.windows else w for a, w in zip(read, windows, strict=True)]
    assert windows == [cell.replace("not used", "none") for cell in cells("`sliding_window`")]
    assert {float(cell) for cell in cells("`rms_norm_eps`")} == {arch.norm_epsilon for arch in read}
    assert {float(cell.replace(",", "")) for cell in cells("`rope_theta`")} == {arch.rope_theta for arch in read}


def test_every_scaling_has_its_line():
    assert re.findall(r"^\| `(\w+)` \| `(?:rope_theta|factor)`", GUIDE, flags=re.MULTILINE) == [
        "default",
        *ROPE_SCALINGS,
    ]


def test_the_message_that_is_shown_is_the_message():
    where = "models/Qwen3-8B/config.json"
    with pytest.raises(ValueError, match="rope_theta") as caught:
        architecture_from_hf({**smallest("qwen3"), "rope_theta": None}, where=where)
    assert str(caught.value) in GUIDE
