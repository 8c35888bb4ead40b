"""Optional packages on a machine without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")


@pytest.mark.parametrize("error", ["RuntimeError", "OSError", "ImportError"])
def test_transformer_engine_without_a_gpu_does_not_break_megatron(tmp_path, error):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text(f"raise {error}('no CUDA driver')")
    code = (
        "from megatron_dypo.mcore import features; features.shield_imports(); import megatron.core; "
        "print(features.probe())"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "layers: torch" in result.stdout
    assert "transformer_engine is installed but cannot be used here" in result.stderr


def test_fp8_is_refused_without_a_gpu():
    from megatron_dypo.config.fp8 import Fp8Config
    from megatron_dypo.mcore import features

    message = r"^model.fp8.recipe=tensorwise: needs a GPU: this machine has none$"
    with pytest.raises(ValueError, match=message):
        features.require_fp8(Fp8Config(recipe="tensorwise"), features.probe())


def test_another_version_of_megatron_is_refused_on_a_cpu(monkeypatch):
    import megatron.core

    from megatron_dypo.mcore.compat import cpu

    monkeypatch.setattr(megatron.core, "__version__", "0.16.9")
    with pytest.raises(ValueError, match=r"megatron-core==0.16.9: on a CPU only 0.16.1 is supported"):
        cpu.install.__wrapped__()


@pytest.mark.parametrize(("content", "is_used"), [("", True), ("raise ImportError('undefined symbol')", False)])
def test_fused_weight_gradients_are_used_if_their_module_can_be_loaded(content, is_used, tmp_path, monkeypatch, caplog):
    from megatron_dypo.mcore import features
    from megatron_dypo.parallel import device

    name = "fused_weight_gradient_mlp_cuda"
    (tmp_path / f"{name}.py").write_text(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(device, "on_gpu", lambda: True)
    monkeypatch.setattr(device, "compute_capability", lambda: (9, 0))
    assert features.probe().grad_accumulation_fusion is is_used
    told = "fused_weight_gradient_mlp_cuda is installed but cannot be loaded (undefined symbol); it is left out"
    assert caplog.messages == ([] if is_used else [told])
