"""The import of Megatron-Bridge where it, or what it needs, is not there; and the norms of its models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from megatron_dypo.mcore.bridged.package import TRIED, import_bridge, note_version
from megatron_dypo.mcore.zero_centered import ZeroCenteredLayerNorm, ZeroCenteredRMSNorm
from tests.support.bridged_models import NEEDS_BRIDGE


def test_without_the_package_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "megatron.bridge", None)
    message = "^model.family=bridge: needs the package megatron-bridge, which is not installed"
    with pytest.raises(ValueError, match=message) as caught:
        import_bridge()
    assert "docs/hf_models.md says how to install it" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_requirement_of_the_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import megatron

    folder = tmp_path / "megatron/bridge"
    folder.mkdir(parents=True)
    (folder / "__init__.py").write_text("import a_package_that_nobody_has\n")
    monkeypatch.setattr(megatron, "__path__", [str(folder.parent), *megatron.__path__])
    monkeypatch.delitem(sys.modules, "megatron.bridge", raising=False)
    with pytest.raises(ValueError, match=r"cannot be imported \(No module named 'a_package_that_nobody_has'\)"):
        import_bridge()
    sys.modules.pop("megatron.bridge", None)


def test_a_release_that_was_not_tried_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    for version in (TRIED, "0.99.0", "0.99.0"):
        note_version(version)
    (record,) = caplog.records
    assert record.getMessage() == f"megatron-bridge 0.99.0: only {TRIED} was tried with model.family=bridge"


def test_the_pinned_release_is_the_one_that_was_tried() -> None:
    pins = (Path(__file__).parents[3] / "requirements" / "megatron_bridge.txt").read_text()
    assert f"megatron-bridge=={TRIED} " in pins


@NEEDS_BRIDGE
def test_megatron_is_not_told_that_transformer_engine_is_there() -> None:
    import_bridge()
    from megatron.core.extensions import transformer_engine

    assert not transformer_engine.HAVE_TE


@pytest.mark.parametrize("kind", [ZeroCenteredLayerNorm, ZeroCenteredRMSNorm])
def test_a_zero_centered_norm_multiplies_by_one_more_than_its_weight(kind: type[torch.nn.Module]) -> None:
    torch.manual_seed(0)
    hidden, norm = torch.randn(5, 8, dtype=torch.float64), kind(8, eps=1e-5).double()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_(0, 0.3)
    centred = hidden - hidden.mean(-1, keepdim=True) if kind is ZeroCenteredLayerNorm else hidden
    expected = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * (1 + next(norm.parameters()))
    if isinstance(norm, ZeroCenteredLayerNorm):
        expected = expected + norm.bias
    torch.testing.assert_close(norm(hidden), expected)
