"""Verdicts on the teachers' traces, at the start of a run and in ``megatron-dypo check``."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict

from megatron_dypo import __version__
from megatron_dypo.config.grading import BUILT_IN_VERIFIERS, GradingConfig
from megatron_dypo.config.tree import Config
from megatron_dypo.data.dataset import PromptDataset
from megatron_dypo.data.row_check.verdicts import Verify, wrong_traces
from megatron_dypo.data.statistics import TeacherStatistics, teacher_statistics
from megatron_dypo.data.teacher_table import accuracy_text
from megatron_dypo.data.teachers import draw_trace
from megatron_dypo.data.tokenizer.open import Tokenizer
from megatron_dypo.grading.pairs import pair_of
from megatron_dypo.grading.verify import Verifier
from megatron_dypo.loop.setup.code_digest import digest_of_module, digest_of_program
from megatron_dypo.metrics.findings import Findings
from megatron_dypo.metrics.versions import installed_versions
from megatron_dypo.objective.recipes.base import Objective
from megatron_dypo.types import Prompt, Tokens

JUDGES = ("math-verify", "latex2sympy2-extended", "sympy")
"""Distributions that decide verdicts of the built-in verifiers."""


def judge_teachers(
    config: Config,
    dataset: PromptDataset,
    verifier: Verifier,
    tokenizer: Tokenizer,
    found: Findings,
    *,
    limit_per_teacher: int | None,
    show_progress: bool,
) -> list[TeacherStatistics]:
    """Judge traces of each teacher, and note the teachers with wrong ones. Raises ValueError as ``wrong_traces``."""
    if not dataset.teachers:
        return []
    verdicts = wrong_traces(
        dataset,
        judge_by(verifier),
        tokenizer=tokenizer,
        data=config.data,
        verifier_key=verifier_key(config.grading),
        limit_per_teacher=limit_per_teacher,
        seed=config.run.seed,
        show_progress=show_progress,
    )
    teachers = teacher_statistics(dataset, config.data, verdicts)
    for teacher in teachers:
        if teacher.num_wrong:
            judged = teacher.num_right + teacher.num_wrong
            advice = "left out" if config.data.drop_wrong_traces else "trained on, unless data.drop_wrong_traces=true"
            found.notes.append(
                f"teacher {teacher.teacher}: the verifier calls {teacher.num_wrong} of {judged} traces judged wrong; "
                f"right: {accuracy_text(teacher)}; wrong ones are {advice}"
            )
    return teachers


def judge_by(verifier: Verifier) -> Verify:
    """Return the function that ``wrong_traces`` calls: it asks a running verifier, and returns None for no verdict."""

    def judge(pairs: Sequence[tuple[Prompt, str]]) -> list[bool | None]:
        verdicts = verifier.verify([pair_of(prompt, response) for prompt, response in pairs])
        return [None if verdict.error is not None else verdict.is_correct for verdict in verdicts]

    return judge


def judged_trace_text(
    objective: Objective, decode: Callable[[Tokens], str], seed: int
) -> Callable[[Prompt], str | None] | None:
    """Return a function from a prompt to the text of the trace that is drawn for its visit, or None without a trace.

    Return None if ``objective`` needs no verdict on a trace.
    """
    if not objective.needs_trace_verdict():
        return None

    def text(prompt: Prompt) -> str | None:
        drawn = draw_trace(prompt, seed)
        return None if drawn is None else decode(drawn[1])

    return text


def verifier_key(cfg: GradingConfig) -> str:
    """Return, as text, everything that verdicts depend on besides the data: verifiers, their code, versions.

    The text is empty, and no verdict is kept, if the code of a verifier is not found. Installed packages that a
    verifier imports are not included: after a change of one, remove ``data_check`` in the run folder.
    """
    code = code_of_verifiers(cfg)
    if None in code.values():
        return ""
    own = {"version": __version__, "grading": digest_of_program("grading"), **installed_versions(JUDGES)}
    return json.dumps({"own": own, "grading": asdict(cfg), "code": code}, sort_keys=True, default=repr)


def code_of_verifiers(cfg: GradingConfig) -> dict[str, str | None]:
    """Return ``code of <module>`` → its digest for the verifiers that are not ours; None if it has no Python file."""
    names = [name for _, name in cfg.named_verifiers() if name not in BUILT_IN_VERIFIERS]
    modules = dict.fromkeys(name.partition(":")[0] for name in names)
    return {f"code of {module}": digest_of_module(module) for module in modules}
