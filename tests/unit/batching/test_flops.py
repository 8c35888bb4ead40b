import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from megatron_dypo.models.architecture import architecture_from_hf
from megatron_dypo.models.experts import Experts
from megatron_dypo.models.flops import SequenceCost, sequence_cost
from tests.support.hf_models import KINDS, SIZES, import_transformers


def tiny(kind):
    """Return transformers' model and the package's description of it."""
    transformers = import_transformers()
    config_class, extra = KINDS[kind]
    config = getattr(transformers, config_class)(**{**SIZES, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    return model, architecture_from_hf(config.to_dict(), where=kind)


@pytest.mark.parametrize("kind", ["llama", "qwen3"])
@pytest.mark.parametrize("num_tokens", [40, 400])
def test_forward_flops_are_those_that_a_model_executes(kind, num_tokens):
    model, arch = tiny(kind)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.ones(1, num_tokens, dtype=torch.long), use_cache=False)
    cost = sequence_cost(arch)
    # transformers computes the masked half of the scores too.
    forward = cost.linear * num_tokens / 3 + 2 * cost.quadratic * num_tokens**2 / 3 + cost.response * num_tokens / 4
    assert forward == pytest.approx(counter.get_total_flops(), rel=1e-3)


def test_recomputation_repeats_the_forward_pass_of_what_it_names():
    _, arch = tiny("llama")
    plain, selective, full = (sequence_cost(arch, kind) for kind in ("none", "selective", "full"))
    assert selective == dataclasses.replace(plain, quadratic=plain.quadratic * 4 / 3)
    assert full == dataclasses.replace(selective, linear=plain.linear * 4 / 3)


def test_cost_is_linear_quadratic_and_per_response_token():
    cost = SequenceCost(linear=2.0, quadratic=0.5, response=10.0)
    assert cost(4, 3) == 2 * 4 + 0.5 * 16 + 10 * 3


def test_a_window_costs_the_pairs_of_tokens_that_see_each_other():
    cost = SequenceCost(linear=0.0, quadratic=0.0, response=0.0, windowed=1.0, window=4)
    for num_tokens in (1, 3, 4, 5, 50):
        pairs = sum(min(token + 1, 4) for token in range(num_tokens))
        # L²/2 stands for L · (L + 1) / 2, and here for the first tokens alone.
        assert cost(num_tokens, 0) / 2 == pairs - min(num_tokens, 4) / 2
    assert cost(4, 0) == SequenceCost(linear=0.0, quadratic=1.0, response=0.0)(4, 0)


def test_of_experts_those_count_that_a_token_visits():
    _, arch = tiny("qwen3")
    experts = Experts(
        num_experts=8, per_token=2, ffn_hidden_size=arch.ffn_hidden_size, normalized=True, moe_aux_loss_coef=0
    )
    sparse, dense = sequence_cost(dataclasses.replace(arch, experts=experts)), sequence_cost(arch)
    one_mlp = 2 * 3 * arch.num_layers * 3 * arch.hidden_size * arch.ffn_hidden_size
    router = 2 * 3 * arch.num_layers * arch.hidden_size * 8
    assert sparse.linear == dense.linear + one_mlp + router
