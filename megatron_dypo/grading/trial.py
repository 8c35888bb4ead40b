"""Trials of verifiers before a run: whether they can be imported, and whether they accept the gold answers of rows."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from megatron_dypo.config.grading import GradingConfig
from megatron_dypo.grading.naming import verifier_of
from megatron_dypo.grading.pairs import pair_of
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.grading.workers.results import shown
from megatron_dypo.types import Prompt, Verdict

_FORMS = ("\\boxed{%s}", "<answer>%s</answer>", "#### %s", "The answer is %s.", "%s")
"""How responses state an answer; one of them is what a verifier expects."""


def check_importable(
    cfg: GradingConfig, *, deadline_s: float = 60.0, named_by: Mapping[str, str] | None = None
) -> None:
    """Import every verifier that the config names, in a separate process; ``named_by`` is as in :class:`Verifier`.

    Raises ValueError with a line (key, value, reason) for each verifier that cannot be imported within ``deadline_s``.
    """
    with Verifier(replace(cfg, workers=1), start_deadline_s=deadline_s, named_by=named_by):
        pass


def try_verifier(verifier: Verifier, cfg: GradingConfig, prompts: Sequence[Prompt]) -> list[str]:
    """Return what is wrong with the verifiers of ``prompts``, judged by the prompts' own gold answers.

    A verifier should accept a response that states the gold answer, in one of the usual forms, and refuse an empty
    one. Where the answer is an object nobody knows what states it: there only errors and the empty response count.

    Args:
        verifier: running.
        cfg: the one that ``verifier`` was made with.
    """
    problems = []
    for prompt in prompts:
        forms = _statements(prompt.answer)
        *stated, empty = verifier.verify([pair_of(prompt, response) for response in [*forms, ""]])
        if problem := _problem(prompt.answer, forms, stated, empty):
            problems.append(f"prompt {prompt.prompt_id}, {_name(cfg, prompt)}: {problem}")
    return problems


def _statements(answer: Any) -> list[str]:
    text = answer if isinstance(answer, str) else json.dumps(answer, default=repr, ensure_ascii=False)
    return [form.replace("%s", text) for form in _FORMS]


def _problem(answer: Any, forms: list[str], stated: list[Verdict], empty: Verdict) -> str | None:
    if all(verdict.error is not None for verdict in stated):
        return f"no verdict on the row's own answer {shown(answer)}: {stated[0].error}"
    if empty.error is None and empty.is_correct:
        return "it accepts an empty response: every rollout would be correct, every prompt Easy"
    is_text = isinstance(answer, str | int | float)
    if is_text and not any(verdict.is_correct and verdict.error is None for verdict in stated):
        return (
            f"it refuses the row's own answer {shown(answer)}, however it is stated: "
            f"{', '.join(shown(form) for form in forms)}"
        )
    return None


def _name(cfg: GradingConfig, prompt: Prompt) -> str:
    try:
        return f"verifier {verifier_of(cfg, own=prompt.verifier, source=prompt.source)}"
    except ValueError:  # the problem says it
        return f"verifier {prompt.verifier}"
