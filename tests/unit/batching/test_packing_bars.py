"""Padding and balance on the lengths that reasoning models write."""

import numpy as np
import pytest

from megatron_dypo.batching.bins import bins_balanced
from megatron_dypo.batching.pack import alignment, microbatch_length, num_microbatches, plan_microbatches
from megatron_dypo.models.architecture import architecture_from_hf
from megatron_dypo.models.flops import sequence_cost

REPLICAS, PROMPT = 8, 150
QWEN_7B = {
    "model_type": "qwen2", "num_hidden_layers": 28, "hidden_size": 3584, "num_attention_heads": 28,
    "num_key_value_heads": 4, "intermediate_size": 18944, "vocab_size": 152064, "max_position_embeddings": 32768,
}  # fmt: skip
QWEN_600M = {
    "model_type": "qwen3", "num_hidden_layers": 28, "hidden_size": 1024, "num_attention_heads": 16, "head_dim": 128,
    "num_key_value_heads": 8, "intermediate_size": 3072, "vocab_size": 151936, "max_position_embeddings": 40960,
}  # fmt: skip


def reasoning_lengths(seed, count=1024):
    """Draw log-normal lengths with a median of 1,800 tokens, truncated at 8,192."""
    drawn = np.random.default_rng(seed).lognormal(np.log(1800), 0.9, count)
    return np.clip(drawn, 200, 8192).astype(int).tolist()


@pytest.mark.parametrize("budget", [16_384, 32_768])
@pytest.mark.parametrize("config", [QWEN_7B, QWEN_600M], ids=["7B", "0.6B"])
@pytest.mark.parametrize("seed", range(3))
def test_padding_and_imbalance_are_small_on_reasoning_lengths(config, budget, seed):
    lengths, cost = reasoning_lengths(seed), sequence_cost(architecture_from_hf(config, where="test"))
    costs = [cost(n, n - PROMPT) for n in lengths]
    replicas = bins_balanced(costs, REPLICAS)
    held = [([lengths[i] for i in members], [costs[i] for i in members]) for members in replicas]
    count = max(num_microbatches(mine, budget=budget, costs=work) for mine, work in held)
    work_RM, positions = np.zeros((REPLICAS, count)), 0
    for replica, (mine, work) in enumerate(held):
        bins = plan_microbatches(mine, budget=budget, count=count, costs=work)
        work_RM[replica] = [sum(work[i] for i in members) for members in bins]
        positions += sum(microbatch_length(mine, [members], alignment(8, 1, 16)) for members in bins)

    assert 1 - sum(lengths) / positions <= 0.02
    assert work_RM.sum(1).max() / work_RM.sum(1).mean() - 1 <= 0.03
    # Microbatches of one replica, and the time lost if replicas wait for each other after each of them.
    assert (work_RM.max(1) / work_RM.mean(1)).max() - 1 <= 0.08
    assert work_RM.max(0).sum() / work_RM.mean(0).sum() - 1 <= 0.01
    assert count <= -(-max(sum(mine) for mine, _ in held) // budget) + 1
