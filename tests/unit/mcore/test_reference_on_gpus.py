"""The swap of the reference on a GPU, by a stand-in that records copies and waits."""

from __future__ import annotations

import pytest
import torch

from megatron_dypo.mcore.reference import ReferencePolicy
from tests.support.recording_cuda import RecordingCuda


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> RecordingCuda:
    cuda = RecordingCuda()
    cuda.stand_in(monkeypatch)
    return cuda


def test_a_swap_waits_for_the_gpu_once_at_each_end(cuda: RecordingCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    chunk = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    monkeypatch.setattr("megatron_dypo.mcore.reference.named_global_weights", lambda _: chunk.named_parameters())
    monkeypatch.setattr("megatron_dypo.mcore.reference.forget_quantized_weights", lambda _: None)
    frozen = [parameter.detach().clone() for parameter in chunk.parameters()]
    reference = ReferencePolicy([chunk])
    with torch.no_grad():
        for parameter in chunk.parameters():
            parameter.add_(1.0)
    policy = [parameter.detach().clone() for parameter in chunk.parameters()]
    cuda.records.clear()
    with reference.swapped_in():
        assert all(torch.equal(one, other) for one, other in zip(chunk.parameters(), frozen, strict=True))
        assert len(cuda.of("synchronize")) == 1
    assert all(torch.equal(one, other) for one, other in zip(chunk.parameters(), policy, strict=True))
    assert len(cuda.of("synchronize")) == 2
    assert len(cuda.of("copy that the CPU does not wait for")) == 4 * len(policy)
    assert not cuda.of("copy")
