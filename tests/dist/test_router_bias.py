"""The bias of a router of DeepSeek-V3's type is loaded in fp32, kept by training, and saved and exported unchanged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support.dist.spawn import run_ranks
from tests.support.dist.training import start
from tests.support.hf_models import make_hf_model

AXES: dict[str, Any] = {"expert": 2}


def rank_train(path: str, out_dir: str) -> list[tuple[str, str, bool]]:
    """Train two updates in bf16 and export; return (name, type, whether a gradient trains it) of each bias."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.chunks import named_global_parameters, named_global_weights
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.models.export import export_hf
    from megatron_dypo.parallel.groups import close

    parallel = ParallelConfig(**AXES)
    layout = start_megatron(parallel)
    session = start(path, layout, parallel, dtype="bfloat16")
    session.train(1, 3)
    weights = list(named_global_weights(session.chunks))
    trained = {name for name, _ in named_global_parameters(session.chunks)}
    export_hf(weights, session.arch, layout, out_dir=out_dir, reference_hf_path=path)
    close(layout)
    return [(name, str(bias.dtype), name in trained) for name, bias in weights if name.endswith("expert_bias")]


@pytest.mark.parametrize("kind", ["deepseek_v3", "glm4_moe"])
def test_a_bias_is_kept_bit_for_bit_while_the_weights_are_trained(tmp_path: Path, kind: str) -> None:
    source = make_hf_model(kind, tmp_path / "hf", dtype=torch.bfloat16)
    for seen in run_ranks(2, rank_train, str(source), str(tmp_path / "out")):
        assert seen == [
            (f"decoder.layers.{layer}.mlp.router.expert_bias", "torch.float32", False) for layer in (1, 2, 3)
        ]
    before = load_file(source / "model.safetensors")
    after = {
        name: tensor for file in (tmp_path / "out").glob("*.safetensors") for name, tensor in load_file(file).items()
    }
    biases = [name for name in before if name.endswith("e_score_correction_bias")]
    assert len(biases) == 3
    for name in biases:
        assert before[name].dtype == after[name].dtype == torch.float32
        assert torch.equal(before[name], after[name])
        assert not torch.equal(before[name], before[name].bfloat16().float()), "bf16 would change it"
    gate = "model.layers.1.mlp.gate.weight"
    assert not torch.equal(before[gate], after[gate])
