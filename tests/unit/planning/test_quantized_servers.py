"""Servers of an FP8 model in the plan, against the bytes that a conversion writes."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.quantized.folder import quantize_hf
from megatron_dypo.models.quantized.names import Quantization
from megatron_dypo.planning.parameters import served_bytes, whole_model
from megatron_dypo.planning.serving import decode_step_s, make_server, server_footprint
from megatron_dypo.planning.step import REFIT_S, refit_time
from tests.support.hf_models import make_hf_model
from tests.support.planning_cases import from_file

KINDS: tuple[Quantization, ...] = ("fp8_block", "fp8_channel")
SIZES = {"hidden_size": 192, "intermediate_size": 320, "head_dim": 24, "num_hidden_layers": 2}
"""Sizes that are no multiples of 128, so that blocks are cut off."""


@pytest.mark.parametrize("model", ["qwen2", "qwen3_moe"])
def test_a_servers_bytes_are_those_of_the_folder_that_a_conversion_writes(model, tmp_path):
    plain = make_hf_model(model, tmp_path / "plain", dtype=torch.bfloat16, **SIZES)
    arch = load_architecture(plain)
    for kind in KINDS:
        quantize_hf(plain, tmp_path / kind, kind, show_progress=False)
    for kind, folder in [("none", plain), *((kind, tmp_path / kind) for kind in KINDS)]:
        written = load_file(folder / "model.safetensors").values()
        assert served_bytes(arch, 2, kind).total == sum(tensor.nbytes for tensor in written), kind


@pytest.mark.parametrize("name", ["llama3_70b", "qwen3_235b_a22b"])
def test_a_server_that_is_not_quantised_holds_the_parameters_in_the_models_type(name):
    arch = from_file(name).arch
    counts, held = whole_model(arch), served_bytes(arch, 2, "none")
    assert (held.dense, held.experts) == (2 * counts.dense, 2 * counts.experts)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["llama3_70b", "qwen3_235b_a22b"])
def test_what_quantisation_frees_of_a_server_is_kv_cache(name, kind):
    plain, narrow = (server_footprint(from_file(name, f"refit.quantize={k}")) for k in ("none", kind))
    assert 0.5 * plain["weights"] < narrow["weights"] < 0.55 * plain["weights"]
    assert narrow["KV cache"] - plain["KV cache"] == pytest.approx(plain["weights"] - narrow["weights"])


@pytest.mark.parametrize("name", ["llama3_70b", "qwen3_235b_a22b"])
def test_decoding_few_requests_gains_what_it_no_longer_reads(name):
    """The speed is less than doubled: the KV cache, all-reduces and the overhead of a step stay the same."""
    settings = [from_file(name, f"refit.quantize={kind}") for kind in ("none", "fp8_block")]
    plain, narrow = (decode_step_s(setting, make_server(setting), 4) for setting in settings)
    assert narrow < plain < 2 * narrow


def test_a_refit_moves_the_bytes_that_a_server_holds():
    plain, narrow = (refit_time(from_file("llama3_70b", f"refit.quantize={kind}")) for kind in ("none", "fp8_block"))
    arch = from_file("llama3_70b").arch
    share = served_bytes(arch, 2, "fp8_block").total / served_bytes(arch, 2, "none").total
    assert (narrow - REFIT_S) / (plain - REFIT_S) == pytest.approx(share)
