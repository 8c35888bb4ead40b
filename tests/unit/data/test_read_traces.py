"""Each form of the column of traces is read as teacher name → text."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_dypo.data.traces import read_traces
from megatron_dypo.data.values import Broken

SYSTEM, USER, ANSWER = (
    {"role": role, "content": content}
    for role, content in (("system", "Be brief."), ("user", "1 + 1?"), ("assistant", "2"))
)


@pytest.mark.parametrize("before", [[], [USER], [SYSTEM, USER], [SYSTEM, USER, USER]], ids=len)
def test_the_last_message_of_a_chat_is_the_trace_whatever_comes_before_it(before: list[Any]) -> None:
    found, num_failed = read_traces("traces", {"r1": [*before, ANSWER]}, [])
    assert (found, num_failed) == ({"r1": "2"}, 0)


@pytest.mark.parametrize("chat", [[USER, ANSWER, USER], [ANSWER, USER, ANSWER], [ANSWER, USER], [SYSTEM, USER]])
def test_a_chat_that_does_not_end_with_its_only_answer_is_refused(chat: list[Any]) -> None:
    with pytest.raises(Broken, match="a chat must end with its only message of the assistant"):
        read_traces("traces", {"r1": chat}, [])
