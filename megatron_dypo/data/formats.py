"""The columns of well-known kinds of prompt files: ``data.format`` and ``data.fields`` → :class:`Columns`."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_dypo.config.data import DataFieldsConfig


@dataclass(frozen=True, kw_only=True)
class Columns:
    """The resolved names of the columns of a prompt file; '' and () if there is no such column."""

    prompt: str = "prompt"
    answer: str = "answer"
    source: str = ""
    traces: tuple[str, ...] = ()
    id: str = ""
    verifier: str = ""
    trace_checks: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """Every name, each once."""
        singles = (self.prompt, self.answer, self.source, self.id, self.verifier)
        return tuple(dict.fromkeys(name for name in (*singles, *self.traces, *self.trace_checks) if name))


FORMATS: Mapping[str, Columns] = {
    "plain": Columns(source="source", traces=("traces",), id="id", verifier="verifier"),
    # examples/data_preprocess of verl; `target` is from LUFFY. No id: `extra_info.index` restarts in each set, and in
    # DAPO's data it repeats.
    "verl": Columns(answer="reward_model.ground_truth", source="data_source", traces=("target",)),
    # docs/en/get_started/usage.md of slime.
    "slime": Columns(answer="label", source="metadata.source_name", traces=("traces",)),
    # The data card of OpenR1-Math-220k. Its traces were cut at a length limit where is_reasoning_complete is false.
    "openr1": Columns(
        prompt="problem",
        source="source",
        traces=("generations",),
        trace_checks=("correctness_math_verify", "is_reasoning_complete"),
    ),
    # The data card of DeepMath-103K.
    "deepmath": Columns(
        prompt="question", answer="final_answer", traces=("r1_solution_1", "r1_solution_2", "r1_solution_3")
    ),
}
"""``data.format`` → the columns of such files."""


def columns_of(format_name: str, fields: DataFieldsConfig) -> Columns:
    """Return the columns of ``format_name``, replaced by those that ``fields`` names."""
    given = {}
    for option in dataclasses.fields(fields):
        value = getattr(fields, option.name)
        if value is None:
            continue
        if option.name in ("traces", "trace_checks"):
            value = tuple(name for name in ((value,) if isinstance(value, str) else value) if name)
        given[option.name] = value
    return dataclasses.replace(FORMATS[format_name], **given)
