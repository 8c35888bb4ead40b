"""The mesh of a server by SGLang's flags, and the meshes on which it does not serve a model."""

from __future__ import annotations

import re

import pytest

from megatron_dypo.refit.plan.flags import mesh_of_flags
from megatron_dypo.refit.plan.server_mesh import ServerMesh, check_server_mesh, check_serving
from tests.support.architectures import make_arch


@pytest.mark.parametrize(
    ("flags", "mesh"),
    [
        ((), ServerMesh(tensor=8)),
        (("--attn-dp-size", "2"), ServerMesh(tensor=8, attention_data=2)),
        (("--attention-data-parallel-size=4",), ServerMesh(tensor=8, attention_data=4)),
        (("--attn-dp-size", "2", "--attn-dp-size", "8"), ServerMesh(tensor=8, attention_data=8)),
        (("--enable-dp-attention", "--dp-size", "4"), ServerMesh(tensor=8, attention_data=4)),
        (("--data-parallel-size 2", "--enable-dp-attention"), ServerMesh(tensor=8, attention_data=2)),
        (("--dp-size", "4"), ServerMesh(tensor=8)),
        (("--enable-dp-attention",), ServerMesh(tensor=8)),
        (
            ("--attn-dp-size=4", "--enable-dp-lm-head"),
            ServerMesh(tensor=8, attention_data=4, output_by_attention=True),
        ),
        (("--enable-dp-lm-head",), ServerMesh(tensor=8)),
        (("--moe-dense-tp-size", "1"), ServerMesh(tensor=8, whole_dense=True)),
        (("--moe-dense-tp-size", "8"), ServerMesh(tensor=8)),
        (("--ep-size", "2"), ServerMesh(tensor=8, expert=2)),
        (("--moe-a2a-backend", "deepep"), ServerMesh(tensor=8, expert=8, whole_shared=True)),
        (("--moe-a2a-backend", "none"), ServerMesh(tensor=8)),
    ],
)
def test_flags_give_the_mesh(flags: tuple[str, ...], mesh: ServerMesh) -> None:
    assert mesh_of_flags(8, flags) == mesh


def test_what_is_whole_anyway_makes_no_other_mesh() -> None:
    assert mesh_of_flags(1, ("--moe-dense-tp-size", "1", "--moe-a2a-backend", "deepep")) == ServerMesh(tensor=1)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--attn-dp-size", "x"), "rollout.servers.extra_args: --attn-dp-size x: must be positive"),
        (("--attn-dp-size=0",), "rollout.servers.extra_args: --attn-dp-size 0: must be positive"),
        (("--attn-dp-size",), "rollout.servers.extra_args: --attn-dp-size True: must be positive"),
        (("--attn-dp-size", "3"), "server attn_dp_size=3: does not divide server tensor=8"),
    ],
)
def test_sizes_that_are_none_are_refused_by_flag(flags: tuple[str, ...], words: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(words)}$"):
        mesh_of_flags(8, flags)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_families_whose_attention_sglang_splits_over_all_ranks_have_one_copy(family: str) -> None:
    rule = f"server attn_dp_size=2: must be 1 for a {family} model: SGLang splits its attention over all ranks"
    with pytest.raises(ValueError, match=f"^{rule}"):
        check_serving(make_arch(family), ServerMesh(tensor=2, attention_data=2))
    check_serving(make_arch(family), ServerMesh(tensor=2))


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "deepseek_v3", "glm4_moe", "gpt_oss"])
def test_other_families_may_have_copies(family: str) -> None:
    check_serving(make_arch(family), ServerMesh(tensor=2, attention_data=2))


def test_a_model_without_experts_has_no_whole_mlps() -> None:
    with pytest.raises(ValueError, match=r"^server moe_dense_tp_size=1: must be left out for a qwen3 model: SGLang"):
        check_serving(make_arch("qwen3"), ServerMesh(tensor=2, whole_dense=True))
    check_serving(make_arch("glm4_moe"), ServerMesh(tensor=2, whole_dense=True))


def test_ranks_of_a_copy_share_an_output_layer_only_if_it_needs_no_padding() -> None:
    """SGLang gathers equal parts of the vocabulary, and the ranks have padded ones."""
    mesh = ServerMesh(tensor=4, attention_data=2, output_by_attention=True)
    rule = r"^server enable_dp_lm_head=true: needs a vocabulary .* for 2 ranks; vocab_size=131, padded 192$"
    with pytest.raises(ValueError, match=rule):
        check_serving(make_arch("qwen3", vocab_size=131), mesh)
    check_serving(make_arch("qwen3", vocab_size=256), mesh)
    check_serving(make_arch("qwen3", vocab_size=131), ServerMesh(tensor=2, attention_data=2, output_by_attention=True))


def test_only_the_ranks_of_a_copy_must_share_the_heads() -> None:
    """Twelve heads do not split over eight ranks; over four they do."""
    arch = make_arch(
        "qwen3", num_attention_heads=12, num_key_value_heads=4, ffn_hidden_size=64, hidden_size=96, head_dim=8
    )
    with pytest.raises(ValueError, match=r"^server tensor=8: does not divide num_attention_heads=12$"):
        check_server_mesh(arch, ServerMesh(tensor=8))
    check_server_mesh(arch, ServerMesh(tensor=8, attention_data=2))
    with pytest.raises(ValueError, match=r"^server tensor / attn_dp_size=8: does not divide num_attention_heads=12$"):
        check_server_mesh(arch, ServerMesh(tensor=16, attention_data=2))
    with pytest.raises(ValueError, match=r"^server tensor=128: does not divide intermediate_size=64$"):
        check_server_mesh(arch, ServerMesh(tensor=128, attention_data=32))
