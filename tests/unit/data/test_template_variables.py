"""The names that a chat template reads from outside."""

from __future__ import annotations

import jinja2
import pytest

from megatron_dypo.data.tokenizer.template_worker import variables


def test_variables_are_those_that_a_template_reads_and_nobody_defines() -> None:
    assert variables("{% set a = b %}{{ a }}{{ messages | tojson }}{{ strftime_now('%Y') }}") == ["b", "messages"]
    assert variables("{{ f }}{{ c }}{{ e }}{{ a }}{{ d }}{{ b }}{{ g }}") == list("abcdefg")


def test_a_template_that_does_not_compile_has_no_variables() -> None:
    with pytest.raises(jinja2.TemplateError, match="no_such_filter"):
        variables("{{ a | no_such_filter }}")
