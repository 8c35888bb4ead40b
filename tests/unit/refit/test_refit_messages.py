"""Both ends cut a link into the same messages, whose parts make up every transfer once."""

from __future__ import annotations

import base64
import io
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.refit.control_message import ControlMessage, PlanInputs, from_named_tensors, to_payload
from megatron_dypo.refit.plan.refit_plan import Mesh, ServerMesh, Transfer
from megatron_dypo.refit.transports.messages import as_bytes, cut, part_of
from tests.support.architectures import make_arch

DTYPES = {"a": torch.float32, "b": torch.bfloat16, "c": torch.float8_e4m3fn}


def transfer(name: str, rows: int, cols: int) -> Transfer:
    return Transfer(
        source=0,
        server=0,
        server_rank=0,
        source_name="s",
        source_row=0,
        source_col=0,
        served_name=name,
        served_row=0,
        served_col=0,
        rows=rows,
        cols=cols,
        hf_name="h",
        hf_row=0,
        hf_col=0,
    )


transfers = st.lists(
    st.builds(transfer, st.sampled_from(sorted(DTYPES)), st.integers(1, 3000), st.integers(1, 257)), max_size=12
)


@settings(deadline=None, max_examples=30)
@given(transfers, st.sampled_from([2048, 100_000, 1 << 20]))
def test_parts_make_up_every_transfer_once_and_messages_keep_the_limit(sent, limit):
    messages = list(cut(sent, DTYPES, limit))
    parts = [part for message in messages for part in message.parts]
    assert [part.index for part in parts] == list(range(len(parts)))
    assert all(message.num_bytes <= limit for message in messages)
    rows = [(id(part.transfer), row) for part in parts for row in range(part.first_row, part.first_row + part.rows)]
    assert rows == [(id(one), row) for one in sent for row in range(one.rows)]
    for message in messages:
        payload, expected = torch.zeros(message.num_bytes, dtype=torch.uint8), []
        for number, part in enumerate(message.parts):
            values = torch.full((part.rows, part.transfer.cols), number % 7 + 1).to(DTYPES[part.transfer.served_name])
            part_of(payload, part, values.dtype).copy_(values)
            expected.append(values)
        for part, values in zip(message.parts, expected, strict=True):
            assert torch.equal(as_bytes(part_of(payload, part, values.dtype)), as_bytes(values))


def test_a_row_that_fits_in_no_message_is_refused():
    with pytest.raises(ValueError, match="limit=64: a row of a has 68 bytes"):
        list(cut([transfer("a", 1, 17)], DTYPES, 64))


def globals_of(pickled: bytes) -> set[tuple[str, str]]:
    """Unpickle, and return the names that the pickle asked for."""
    asked = set()

    class Unpickler(pickle.Unpickler):
        def find_class(self, module: str, name: str) -> Any:
            asked.add((module, name))
            return super().find_class(module, name)

    Unpickler(io.BytesIO(pickled)).load()
    return asked


def test_a_control_message_arrives_as_it_was_sent_and_pickles_to_nothing_but_plain_data():
    plan = PlanInputs(
        arch=make_arch("qwen3_moe"),
        source=Mesh(tensor=2, pipeline=2, first_stage_layers=1),
        servers=(ServerMesh(tensor=4, expert=2), ServerMesh(tensor=1)),
        quantization="fp8_block",
        element_size=4,
    )
    message = ControlMessage(
        plan=plan,
        server=1,
        server_rank=0,
        transport="local",
        store_host="::1",
        store_port=1,
        connection="c",
        slot_bytes=4096,
        most_links=1,
        refit=3,
        version=7,
        verify="full",
        timeout_s=1.5,
    )
    raw = base64.b64decode(to_payload(message))
    assert from_named_tensors(pickle.loads(raw)) == message
    assert globals_of(raw) == {("torch", "Tensor")}
