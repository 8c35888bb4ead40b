"""A server that samples from another policy than the trainer's gets no weights."""

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


def test_an_attention_factor_that_sglang_passes_over_is_refused():
    served = architecture_from_hf({**smallest("qwen2"), "rope_scaling": YARN}, where="")
    check_server(server(), served)
    other = architecture_from_hf({**smallest("qwen2"), "rope_scaling": {**YARN, "attention_factor": 1.0}}, where="")
    with pytest.raises(ServerError, match=r"^http://a:1: attention_factor=1 of the yarn scaling: SGLang ignores it"):
        check_server(server(), other)
