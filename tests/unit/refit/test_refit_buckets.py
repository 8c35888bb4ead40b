"""Flattened buckets against a receiver that cuts them up as SGLang's ``FlattenedTensorBucket.empty`` does."""

import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_dypo.refit.transports.buckets import fill_buckets

DTYPES = (torch.float32, torch.bfloat16, torch.uint8)


def receive(bucket):
    offset = 0
    for name, dtype_name, shape in zip(bucket.names, bucket.dtypes, bucket.shapes, strict=True):
        dtype = getattr(torch, dtype_name)
        assert offset % dtype.itemsize == 0, "the receiver refuses unaligned tensors"
        size = torch.Size(shape).numel() * dtype.itemsize
        yield name, bucket.payload[offset : offset + size].view(dtype).reshape(shape).clone()
        offset += size
    assert offset == bucket.payload.numel()


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7), st.sampled_from(DTYPES)), max_size=12),
    limit=st.integers(4, 200).map(lambda n: n * 4),
)
def test_what_is_received_is_what_was_sent(shapes, limit):
    sent = [(f"t{i}", (torch.arange(a * b).reshape(a, b) + i).to(dtype)) for i, (a, b, dtype) in enumerate(shapes)]
    received, sizes = [], []
    for bucket in fill_buckets(iter(sent), limit):
        received += receive(bucket)
        sizes.append((len(bucket.names), bucket.payload.numel()))
    assert [name for name, _ in received] == [name for name, _ in sent]
    assert all(torch.equal(a, b) and a.dtype == b.dtype for (_, a), (_, b) in zip(received, sent, strict=True))
    assert all(num_bytes <= limit for count, num_bytes in sizes if count > 1)


def test_transposed_tensors_are_sent_in_logical_order():
    tensor = torch.arange(6.0).reshape(2, 3).t()
    for limit in (1024, 8):
        ((_, received),) = [pair for bucket in fill_buckets([("t", tensor)], limit) for pair in receive(bucket)]
        assert torch.equal(received, tensor)


@pytest.mark.parametrize("limit", [8, 100, 4096])
def test_tensors_that_sglang_fuses_are_in_one_bucket(limit):
    """Its loader drops one that comes without the other."""
    prefix = "model.layers.{}.self_attn."
    modules = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj"]
    sent = [
        (f"{prefix.format(layer)}{module}.weight", torch.full((3, 4), 10.0 * layer + i))
        for layer in range(3)
        for i, module in enumerate(modules)
    ]
    received = {}
    for bucket in fill_buckets(iter(sent), limit):
        received.update(receive(bucket))
        for layer in range(3):
            fused = {f"{prefix.format(layer)}{name}.weight" for name in ("q_a_proj", "kv_a_proj_with_mqa")}
            assert len(fused & set(bucket.names)) in (0, 2)
    assert received.keys() == dict(sent).keys()
    assert all(torch.equal(received[name], tensor) for name, tensor in sent)


def test_a_down_projection_of_keys_alone_is_sent_too():
    sent = [("model.layers.0.self_attn.kv_a_proj_with_mqa.weight", torch.ones(2, 2)), ("t", torch.zeros(2))]
    received = [pair for bucket in fill_buckets(iter(sent), 1024) for pair in receive(bucket)]
    assert sorted(name for name, _ in received) == sorted(name for name, _ in sent)


def test_buckets_fill_up_before_a_new_one_begins():
    tensors = [(str(i), torch.zeros(25)) for i in range(10)]  # 100 bytes each
    assert [len(bucket.names) for bucket in fill_buckets(tensors, 300)] == [3, 3, 3, 1]


@pytest.mark.parametrize("limit", [64, 4096])
def test_at_most_one_tensor_is_held_beside_the_bucket(limit):
    alive: list[weakref.ref[torch.Tensor]] = []

    def tensors():
        for i in range(8):
            gc.collect()
            assert sum(ref() is not None for ref in alive) <= 1
            tensor = torch.zeros(20)
            alive.append(weakref.ref(tensor))
            yield str(i), tensor

    assert sum(len(bucket.names) for bucket in fill_buckets(tensors(), limit)) == 8
