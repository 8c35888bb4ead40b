import pytest
import torch

from megatron_dypo.objective.advantage import group_advantages


def test_advantages_are_centred_and_scaled_by_the_groups_deviation():
    reward_G = torch.tensor([1.0, 0.0, 0.0, 1.0], dtype=torch.float64)
    advantage_G = group_advantages(reward_G, epsilon=1e-6)
    expected = (reward_G - reward_G.mean()) / (torch.sqrt(((reward_G - 0.5) ** 2).sum() / 3) + 1e-6)
    torch.testing.assert_close(advantage_G, expected)
    assert advantage_G.sum().abs() < 1e-12


def test_without_the_deviation_they_are_only_centred():
    advantage_G = group_advantages(torch.tensor([3.0, 1.0]), normalize_std=False)
    assert advantage_G.tolist() == [1.0, -1.0]


def test_equal_rewards_carry_no_signal_even_where_the_mean_rounds():
    assert group_advantages(torch.full((7,), 0.1)).tolist() == [0.0] * 7


@pytest.mark.parametrize("reward", [torch.zeros(1), torch.zeros(2, 2)])
def test_anything_but_one_group_is_refused(reward):
    with pytest.raises(ValueError, match="one group of at least 2 rewards"):
        group_advantages(reward)
