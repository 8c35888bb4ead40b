"""Optional packages on a machine without a GPU."""

import os
import subprocess
import sys

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="what happens where there is no GPU")


def test_transformer_engine_without_a_gpu_does_not_break_megatron(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise RuntimeError('no CUDA driver')")
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
    assert "transformer_engine is installed but of no use here" in result.stderr


def test_another_version_of_megatron_is_refused_on_a_cpu(monkeypatch):
    import megatron.core

    from megatron_dypo.mcore import cpu

    monkeypatch.setattr(megatron.core, "__version__", "0.16.9")
    with pytest.raises(ValueError, match=r"megatron-core==0.16.9: on a CPU only 0.16.1 is supported"):
        cpu.install.__wrapped__()
