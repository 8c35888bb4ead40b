"""A server that samples from another policy than the trainer's gets no weights."""

import dataclasses
import json
from pathlib import Path

import pytest

from megatron_dypo.models.architecture import architecture_from_hf
from megatron_dypo.refit.answers import ServerError, ServerInfo
from megatron_dypo.refit.model_checks import check_server
from tests.support.smallest_configs import YARN, smallest


def server():
    return ServerInfo(
        url="http://a:1",
        sglang="0.5.23",
        model_path="/nowhere",
        model_type="qwen2",
        weight_version="0",
        tensor_parallel=1,
        pipeline_parallel=1,
        data_parallel=1,
        expert_parallel=1,
        custom_loaders=(),
    )


def test_a_server_of_experts_in_mxfp4_is_refused(tmp_path: Path) -> None:
    raw = smallest("gpt_oss")
    served = dataclasses.replace(server(), model_type="gpt_oss", model_path=str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps(raw))
    arch = architecture_from_hf(raw, where="")
    check_server(served, arch)
    (tmp_path / "config.json").write_text(json.dumps({**raw, "quantization_config": {"quant_method": "mxfp4"}}))
    with pytest.raises(
        ServerError, match=r"^http://a:1: serves .* with experts in MXFP4 .* convert the folder to bf16"
    ):
        check_server(served, arch)


def test_an_attention_factor_that_sglang_passes_over_is_refused():
    served = architecture_from_hf({**smallest("qwen2"), "rope_scaling": YARN}, where="")
    check_server(server(), served)
    other = architecture_from_hf({**smallest("qwen2"), "rope_scaling": {**YARN, "attention_factor": 1.0}}, where="")
    with pytest.raises(ServerError, match=r"^http://a:1: attention_factor=1 of the yarn scaling: SGLang ignores it"):
        check_server(server(), other)
