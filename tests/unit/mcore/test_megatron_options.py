"""The ``megatron`` mappings of a config: which names and values the installed Megatron takes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_dypo.config.model import ModelConfig, ParallelConfig
from megatron_dypo.config.reading.load import load_config
from megatron_dypo.config.training import OptimizerConfig
from megatron_dypo.mcore.features import Features
from megatron_dypo.mcore.model import transformer_config
from megatron_dypo.mcore.optimizer import optimizer_config
from megatron_dypo.mcore.options.check import option_problems, require_options
from megatron_dypo.mcore.options.denied import MODEL, OPTIMIZER, PARALLEL, Rows
from megatron_dypo.mcore.options.named import data_parallel_config
from megatron_dypo.mcore.options.reading import Mapped, read_options
from megatron_dypo.models.experts import Experts
from tests.support.architectures import QWEN2 as ARCH

PLAIN = Features(transformer_engine=False, grad_accumulation_fusion=False)
SHARDED = {"distributed": True, "precision_aware": True}
EXPERTS = Experts(num_experts=4, per_token=2, ffn_hidden_size=20, normalized=True, moe_aux_loss_coef=0.25)
MOE = dataclasses.replace(ARCH, family="qwen3_moe", experts=EXPERTS)
KINDS: dict[str, tuple[type, Rows]] = {
    "model.megatron": (TransformerConfig, MODEL),
    "parallel.megatron": (DistributedDataParallelConfig, PARALLEL),
    "optimizer.megatron": (MegatronOptimizerConfig, OPTIMIZER),
}


def model_of(**options: Any) -> TransformerConfig:
    return transformer_config(ARCH, ModelConfig(hf_path="x", megatron=options), ParallelConfig(), PLAIN)


def refusal_of(key: str, options: dict[str, Any]) -> str:
    kind, denied = KINDS[key]
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the message is what the tests compare
        read_options(kind, Mapped(key, options, denied))
    return str(caught.value)


def test_values_of_every_type_reach_megatrons_configs() -> None:
    config = model_of(
        attention_backend="flash",
        deterministic_mode=True,
        moe_router_dtype="fp32",
        offload_modules=["core_attn"],
        cp_comm_type="a2a",
        moe_deepep_num_sms=24,
    )
    assert config.attention_backend is AttnBackend.flash
    assert (config.deterministic_mode, config.moe_router_dtype, config.moe_deepep_num_sms) == (True, "fp32", 24)
    assert (config.offload_modules, config.cp_comm_type) == (["core_attn"], "a2a")
    optimizer = optimizer_config(OptimizerConfig(megatron={"exp_avg_dtype": "float32"}), dtype="float32")
    assert optimizer.exp_avg_dtype is torch.float32
    ddp = data_parallel_config(ModelConfig(hf_path="x"), ParallelConfig(megatron={"bucket_size": 7}))
    assert ddp.bucket_size == 7
    assert ddp.grad_reduce_in_fp32


@pytest.mark.parametrize(
    ("key", "options", "line"),
    [
        ("model.megatron", {"hidden_size": 64},
         "model.megatron.hidden_size=64: cannot be set here: config.json of model.hf_path gives it"),
        ("model.megatron", {"tensor_model_parallel_size": 2},
         "model.megatron.tensor_model_parallel_size=2: cannot be set here: use parallel.tensor"),
        ("model.megatron", {"params_dtype": "float32"},
         "model.megatron.params_dtype='float32': cannot be set here: use model.dtype"),
        ("model.megatron", {"cuda_graph_impl": "local"},
         "model.megatron.cuda_graph_impl='local': cannot be set here: a CUDA graph has one shape, and microbatches are "
         "packed with sequences of any length"),
        ("optimizer.megatron", {"lr": 1e-3}, "optimizer.megatron.lr=0.001: cannot be set here: use optimizer.lr"),
        ("parallel.megatron", {"average_in_collective": True},
         "parallel.megatron.average_in_collective=True: cannot be set here: gradients are summed: each term of the "
         "loss is divided once, by its global count"),
        ("model.megatron", {"moe_enable_deepep": True},
         "model.megatron.moe_enable_deepep=True: cannot be set here: use parallel.expert_dispatcher"),
        ("model.megatron", {"no_sync_func": "f"},
         "model.megatron.no_sync_func='f': must be an object of Python, which a config cannot hold or null"),
        ("model.megatron", {"min_offloaded_tensor_size": "many"},
         "model.megatron.min_offloaded_tensor_size='many': must be an integer"),
        ("model.megatron", {"deterministic_mode": 1}, "model.megatron.deterministic_mode=1: must be true or false"),
        ("model.megatron", {"min_offloaded_tensor_size": True},
         "model.megatron.min_offloaded_tensor_size=True: must be an integer"),
        ("model.megatron", {"min_offloaded_tensor_size": None},
         "model.megatron.min_offloaded_tensor_size=None: must be an integer"),
        ("model.megatron", {"attention_backend": "fast"},
         "model.megatron.attention_backend='fast': must be one of flash, fused, unfused, local, auto"),
        ("model.megatron", {"moe_router_dtype": "fp16"},
         "model.megatron.moe_router_dtype='fp16': must be one of fp32, fp64 or null"),
        ("optimizer.megatron", {"exp_avg_dtype": "half_of_it"},
         "optimizer.megatron.exp_avg_dtype='half_of_it': must be a type of torch, such as bfloat16"),
        ("parallel.megatron", {"bucket_size": 1.5}, "parallel.megatron.bucket_size=1.5: must be an integer or null"),
        ("model.megatron", {"offload_modules": "core_attn"},
         "model.megatron.offload_modules='core_attn': must be a list of values that are each a text or null"),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_set_is_refused_in_one_line(key: str, options: dict[str, Any], line: str) -> None:
    assert refusal_of(key, options) == line


@pytest.mark.parametrize(
    ("key", "name", "near"),
    [
        ("model.megatron", "attention_backends", "model.megatron.attention_backend"),
        ("model.megatron", "min_offload_tensor_size", "model.megatron.min_offloaded_tensor_size"),
        ("optimizer.megatron", "exp_avg_dtyp", "optimizer.megatron.exp_avg_dtype"),
        ("parallel.megatron", "buckets_size", "parallel.megatron.bucket_size"),
    ],
)
def test_a_misspelt_name_is_refused_with_the_nearest_one(key: str, name: str, near: str) -> None:
    problem = refusal_of(key, {name: 1})
    assert problem.startswith(f"{key}.{name}=1: {KINDS[key][0].__name__} of megatron-core ")
    assert problem.endswith(f" has no such field; did you mean {near}?")


def test_every_problem_has_a_line() -> None:
    assert (
        len(refusal_of("model.megatron", {"hidden_size": 1, "nonsense": 2, "deterministic_mode": 3}).splitlines()) == 3
    )


def test_values_that_megatron_refuses_together_are_named_in_one_line() -> None:
    with pytest.raises(ValueError, match="cpu_offloading_num_layers") as caught:
        model_of(cpu_offloading=True, cpu_offloading_num_layers=-1)
    line = str(caught.value)
    assert line.startswith("model.megatron={'cpu_offloading': True, 'cpu_offloading_num_layers': -1}: megatron-core ")
    assert " refuses this: " in line
    assert "\n" not in line


def test_fields_of_the_installed_version_are_known_and_not_a_list_of_ours() -> None:
    @dataclasses.dataclass
    class NextConfig:
        new_mode: Literal["a", "b"] = "a"
        new_sizes: tuple[int, int] | None = None

    globals()["NextConfig"] = NextConfig
    read = read_options(NextConfig, Mapped("model.megatron", {"new_mode": "b", "new_sizes": [1, 2]}, MODEL))
    assert read == {"new_mode": "b", "new_sizes": (1, 2)}
    with pytest.raises(ValueError, match=r"new_sizes=\[1\]: must be "):
        read_options(NextConfig, Mapped("model.megatron", {"new_sizes": [1]}, MODEL))


def set_here(kind: type, optimizer: OptimizerConfig = OptimizerConfig()) -> dict[str, Any]:  # noqa: B008
    """Return the values that this package gives to one of Megatron's configs."""
    found: dict[str, Any] = {}
    with pytest.MonkeyPatch.context() as patch:
        for module in ("model", "optimizer", "options.named"):
            patch.setattr(f"megatron_dypo.mcore.{module}.make", lambda *_, **values: found.update(values))
        if kind is TransformerConfig:
            model_of()
        elif kind is DistributedDataParallelConfig:
            data_parallel_config(ModelConfig(hf_path="x"), ParallelConfig(), overlap_grad_reduce=True)
        else:
            optimizer_config(optimizer, dtype="float32")
    return found


@pytest.mark.parametrize("key", list(KINDS))
def test_what_this_package_sets_is_denied_or_may_be_overridden_on_purpose(key: str) -> None:
    """A field that the package sets and that nobody decided about would be overridden silently."""
    on_purpose = {
        # Fusions and precisions that change speed or rounding, not meaning.
        "bias_activation_fusion", "bias_dropout_fusion", "masked_softmax_fusion", "apply_rope_fusion",
        "gradient_accumulation_fusion", "attention_softmax_in_fp32", "grad_reduce_in_fp32",
        "moe_router_dtype", "moe_permute_fusion",
    }  # fmt: skip
    for name in set_here(KINDS[key][0]).keys() - on_purpose:
        assert "cannot be set here" in refusal_of(key, {name: 1}), name


def test_a_config_file_is_checked_before_anything_starts(tmp_path: Path) -> None:
    path = tmp_path / "dypo.yaml"
    path.write_text("model: {hf_path: m, megatron: {hiden_size: 3}}\nparallel: {megatron: {bucket_size: a}}\n"
                    "data: {prompts: [p]}\n")  # fmt: skip
    config = load_config(path, ["optimizer.megatron.lr=1", "optimizer.megatron.pin_cpu_grads=false"])
    problems = option_problems(config)
    assert len(problems) == 3
    assert problems[0].startswith("model.megatron.hiden_size=3: TransformerConfig of megatron-core")
    assert problems[1:] == [
        "parallel.megatron.bucket_size='a': must be an integer or null",
        "optimizer.megatron.lr=1: cannot be set here: use optimizer.lr",
    ]
    with pytest.raises(ValueError, match="hiden_size"):
        require_options(config, ARCH, PLAIN)


@pytest.mark.parametrize(
    ("parallel", "optimizer", "line"),
    [
        ({"expert": 2, "expert_dispatcher": "deepep"}, {}, "parallel.expert_dispatcher=deepep: needs a GPU"),
        ({}, {"algorithm": "muon"}, "optimizer.algorithm=muon: needs the package emerging_optimizers"),
        (
            {},
            {"distributed": True, "precision_aware": True},
            "optimizer.precision_aware=true: needs Transformer Engine",
        ),
        (
            {},
            {"distributed": True, "precision_aware": True, "cpu_offload": 0.5},
            "optimizer.cpu_offload=0.5: needs a GPU",
        ),
    ],
)
def test_a_named_option_that_the_machine_lacks_is_refused(
    parallel: dict[str, Any], optimizer: dict[str, Any], line: str
) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        PLAIN.require(ParallelConfig(**parallel), OptimizerConfig(**optimizer))
    whole = Features(transformer_engine=True, grad_accumulation_fusion=True, on_gpu=True,
                     packages=frozenset({"deep_ep", "emerging_optimizers"}), megatron="0.18.2")  # fmt: skip
    whole.require(ParallelConfig(**parallel), OptimizerConfig(**optimizer))


def test_muon_is_refused_where_megatron_cannot_run_it() -> None:
    features = dataclasses.replace(PLAIN, packages=frozenset({"emerging_optimizers"}), megatron="0.16.1")
    line = "optimizer.algorithm=muon: needs megatron-core 0.17 or newer, found 0.16.1"
    with pytest.raises(ValueError, match=f"^{line}"):
        features.require(ParallelConfig(), OptimizerConfig(algorithm="muon"))


@pytest.mark.parametrize(
    ("kind", "values", "line"),
    [
        (OptimizerConfig, {"algorithm": "muon", "distributed": True}, "algorithm=muon: needs distributed=false"),
        (OptimizerConfig, {"overlap_param_gather": True, "distributed": True}, "overlap_param_gather=true: needs"),
        (OptimizerConfig, {"precision_aware": True}, "precision_aware=true: needs distributed=true"),
        (OptimizerConfig, {"cpu_offload": 0.5, "distributed": True}, "cpu_offload=0.5: needs precision_aware=true"),
        (OptimizerConfig, {"cpu_offload": 1.5}, "cpu_offload=1.5: must be from 0 to 1"),
        (
            ParallelConfig,
            {"expert_dispatcher": "hybridep"},
            "expert_dispatcher=hybridep: needs expert × expert_tensor > 1",
        ),
    ],
)
def test_a_named_option_needs_its_partners(kind: Any, values: dict[str, Any], line: str) -> None:
    with pytest.raises(ValueError, match=f"^{line}"):
        kind(**values)


def test_named_options_set_megatrons_fields() -> None:
    for name in ("deepep", "hybridep"):
        parallel = ParallelConfig(expert=2, expert_dispatcher=name)
        config = transformer_config(MOE, ModelConfig(hf_path="x", dtype="bfloat16"), parallel, PLAIN)
        assert (config.moe_token_dispatcher_type, config.moe_flex_dispatcher_backend) == ("flex", name)
    model = ModelConfig(hf_path="x", recompute="selective", recompute_modules=("core_attn", "layernorm"))
    assert transformer_config(ARCH, model, ParallelConfig(), PLAIN).recompute_modules == ["core_attn", "layernorm"]
    optimizer = OptimizerConfig(distributed=True, precision_aware=True, cpu_offload=0.5)
    given = set_here(MegatronOptimizerConfig, optimizer)  # without Transformer Engine Megatron refuses them
    assert (given["optimizer_cpu_offload"], given["optimizer_offload_fraction"]) == (True, 0.5)
    assert given["use_precision_aware_optimizer"]


def test_recompute_modules_that_the_installed_version_lacks_are_refused() -> None:
    model = ModelConfig(hf_path="x", recompute="selective", recompute_modules=("core_atn",))
    with pytest.raises(ValueError, match=r"^model\.recompute_modules=\['core_atn'\]: megatron-core .*Allowed modules"):
        transformer_config(ARCH, model, ParallelConfig(), PLAIN)


def test_replay_needs_experts_and_a_router_that_takes_a_choice(tmp_path: Path) -> None:
    path = tmp_path / "dypo.yaml"
    path.write_text("model: {hf_path: m}\nobjective: {replay: rollout}\ndata: {prompts: [p]}\n")
    require_options(load_config(path), MOE, PLAIN)
    with pytest.raises(ValueError, match=r"objective\.replay=rollout: the qwen2 model has no experts"):
        require_options(load_config(path), ARCH, PLAIN)
    fused = load_config(path, ["model.megatron.moe_router_fusion=true"])
    with pytest.raises(ValueError, match=r"moe_router_fusion=true: must be false with objective\.replay"):
        require_options(fused, MOE, PLAIN)
    require_options(load_config(path, ["objective.replay=off", "model.megatron.moe_router_fusion=true"]), MOE, PLAIN)
