"""Optional packages on a machine without a GPU."""

import dataclasses
import functools
import logging
import os
import subprocess
import sys

import pytest
import torch

from megatron_dypo.supported import CPU_CORES

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


def test_notices_to_programmers_are_left_out_and_warnings_are_not(caplog):
    from megatron_dypo.mcore import features

    features.shield_imports()
    logger = logging.getLogger("megatron.core.models.gpt.gpt_model")
    logger.warning("GPTModel IS DEPRECATED. %s", "Please reference the migration guide")
    logger.warning("a stage has no layers")
    assert caplog.messages == ["a stage has no layers"]


@pytest.mark.parametrize("version", ["0.16.9", "0.20.0"])
def test_another_version_of_megatron_is_refused_on_a_cpu(monkeypatch, version):
    import megatron.core

    from megatron_dypo.mcore.compat import cpu

    for known in (*CPU_CORES, "0.19.2+e44f404f"):
        cpu.require_known(known)
    monkeypatch.setattr(megatron.core, "__version__", version)
    message = rf"^megatron-core=={version}: on a CPU it must be one of 0.16.1, 0.17.1, 0.18.2, 0.19.2 .*: pip install"
    with pytest.raises(ValueError, match=message):
        cpu.install.__wrapped__()


@pytest.mark.parametrize("experts", [4, None])
def test_the_layers_of_every_core_get_our_router(experts):
    """Core 0.16 and 0.17 give a layer's experts as a ModuleSpec, later ones as a functools.partial."""
    from megatron_dypo.mcore import features, layer_specs
    from megatron_dypo.mcore.moe_router import BalancedRouter
    from megatron_dypo.models.experts import Experts
    from tests.support.architectures import QWEN2

    made = Experts(num_experts=4, per_token=2, ffn_hidden_size=20, normalized=True, moe_aux_loss_coef=0.0)
    arch = dataclasses.replace(QWEN2, family="qwen3_moe", experts=made) if experts else QWEN2
    mlp = layer_specs.layer_spec(arch, features.probe(), has_experts=experts is not None).submodules.mlp
    inner = mlp.keywords["submodules"] if isinstance(mlp, functools.partial) else mlp.submodules
    assert (getattr(inner, "router", None) is BalancedRouter) == (experts is not None)


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
