"""The page of a study in docs/: its plan, and its committed results or the words that it has not been run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from whole_job.stages import ROOT, write_json

from megatron_dypo.config.reading.load import flow_yaml
from megatron_dypo.fs import replace_file
from tiny_study.budget import budget_table, config_of, probed_groups
from tiny_study.figures import figures_of
from tiny_study.inputs import TASKS
from tiny_study.plan import SETS, Plan
from tiny_study.results import Results, read_results
from tiny_study.specs import arm_name

NOT_RUN = "**This study has not been run yet.** The page has no result: only what is fixed in advance."


def render_files(plan: Plan, results: Results | None) -> dict[Path, str]:
    """Return the page and its figures: path relative to the root → content."""
    figures = figures_of(results) if results is not None else {}
    files = {plan.source.parent / name: text for name, text in figures.items()}
    return {Path(plan.page): render_page(plan, results), **files}


def write_page(plan: Plan, results: Results | None) -> None:
    """Write results (if there are any), figures and page, each whole or not at all."""
    if results is not None:
        write_json(ROOT / plan.source, results)
    for path, text in render_files(plan, results).items():
        (ROOT / path).parent.mkdir(parents=True, exist_ok=True)
        replace_file(ROOT / path, text)
        print(ROOT / path)


def render_page(plan: Plan, results: Results | None) -> str:
    """Return the page as Markdown."""
    parts = [f"# {plan.title}", _status(plan, results), *_fixed(plan)]
    for task, found in results["tasks"].items() if results is not None else ():
        parts += _task_results(plan, task, found)
    return "\n\n".join(parts) + "\n"


def _status(plan: Plan, results: Results | None) -> str:
    run = f"`{plan.command}` runs it and writes this page."
    if results is None or not results["tasks"]:
        return f"{NOT_RUN} {run}"
    missing = [f"{label}: {why}" for found in results["tasks"].values() for label, why in found["missing"].items()]
    unseen = [f"{task}: not run" for task in plan.tasks if task not in results["tasks"]]
    lack = f" Missing: {'; '.join([*unseen, *missing])}." if missing or unseen else " No run is missing."
    return f"Run at commit {results['commit']} ({results['machine']}).{lack} {run}{_explanation(plan)}"


def _explanation(plan: Plan) -> str:
    """Return a sentence with the link to the page that explains the results; nothing if there is none."""
    if plan.explanation is None:
        return ""
    return f" [What the probe explains]({Path(plan.explanation).name}) measures the paper's assumptions on these runs."


def _fixed(plan: Plan) -> Iterable[str]:
    """Yield the part of the page that a result does not change."""
    config = config_of(plan, {})
    prompts, group = config.rollout.prompts_per_round, config.rollout.group_size
    rates = ", ".join(f"{rate:g}" for rate in plan.learning_rates)
    yield "## Fixed in advance"
    yield "\n".join(
        [
            f"- **Model**: {_models(plan)} This is not a model of 7 billion parameters, and says nothing about one.",
            f"- **Base config** of every run: `{plan.config}` with {_words(plan.overrides)}.",
            f"- **Budget of rollouts**: {plan.steps} steps × {prompts} prompts × {group} rollouts = "
            f"{plan.steps * prompts * group:,} for every method that samples in each step. A step collects one round, "
            "however many of its prompts are Easy, so that no objective gets more rollouts than another. Only if a "
            "whole round has nothing to learn from is another one drawn. `sft` samples nothing: it gets "
            f"{prompts} traces in each step. `sft_then_rl` samples nothing in its first phase, and a method with a "
            "buffer of traces nothing in the steps that learn from it. The tables say how many rollouts each used.",
            _tuning_words(plan, rates),
            f"- **Final runs**: seeds {', '.join(map(str, plan.seeds))}. The sets are `heldout` (the training "
            "distribution), `longer` (longer numbers or words than those of training) and `phrasing` (another "
            "wording of the question). One response to each prompt, temperature "
            f"{config.eval.temperature:g}, after the last step. No set shares a problem with another.",
            f"- **Tests**: every method against `{plan.baseline}`, with p by Holm over the table; a difference of "
            f"{plan.smallest_difference:g} matters. [Comparisons](comparison.md) has the statistics.",
            *(f"- {note}" for note in plan.notes),
            *(f"- **Check of the tests**: `{name}` is `{own}` entered again." for name, own in plan.copies.items()),
            f"- **Time**: planned for at most {plan.hours:g} hours on two idle cores, from estimated times:",
        ]
    )
    yield budget_table(plan)
    yield _overrides_table("method", plan.methods)
    if plan.ablations:
        yield f"Ablations of `{plan.baseline}`, on `{plan.tasks[0]}`, with its learning rate:"
        yield _overrides_table("ablation", plan.ablations)
    for name, own in {**plan.methods, **plan.ablations}.items():
        if probed := probed_groups(plan, own) * group:
            yield f"The probes of `{name}` sample {probed:,} rollouts more, which no table counts."


def _models(plan: Plan) -> str:
    if any(TASKS[task].is_pretrained for task in plan.tasks):
        return "SmolLM2-135M-Instruct, pretrained."
    return "the quickstart's, of a million parameters, after a warm start by supervised training on easy problems."


def _tuning_words(plan: Plan, rates: str) -> str:
    if not plan.is_tuned:
        return f"- **Learning rate**: {rates} for every method. None was tuned."
    return (
        f"- **Tuning**: every method gets the same grid of learning rates ({rates}) with seed {plan.tuning_seed}. The "
        "one with the highest accuracy on the set `validation` is taken, the smaller one of two that tie; a run that "
        "diverges is behind all others. Nothing else is tuned for any method."
    )


def _words(overrides: Mapping[str, Any]) -> str:
    return ", ".join(f"`{key}: {flow_yaml(value)}`" for key, value in overrides.items()) or "no change"


def _overrides_table(kind: str, methods: Mapping[str, Mapping[str, Any]]) -> str:
    rows = [f"| `{name}` | {_words(own)} |" for name, own in methods.items()]
    return "\n".join([f"| {kind} | settings |", "|---|---|", *rows])


def _task_results(plan: Plan, task: str, found: Results) -> Iterable[str]:
    """Yield the results of one task."""
    yield f"## Results: {task}"
    if found["tuning"]:
        yield "Accuracy on `validation`, with the chosen learning rate in bold:"
        yield _tuning_table(plan, found)
        yield _edge_words(plan, found)
    start = ", ".join(f"{name} {100 * found['start'][name]:.1f}" for name in SETS if name in found["start"])
    yield f"Before the first step, in percent: {start or 'no run is done'}."
    for text in found["texts"].values():
        yield text.strip()
    yield "Rollouts that a run sampled for training, mean over the seeds:"
    used = [f"| {name} | {count:,.0f} |" for name, count in found["rollouts"].items()]
    yield "\n".join(["| method | rollouts |", "|---|---:|", *used])
    if found["curves"]:
        yield f"![Tiers, η, entropy and gradient norm over the steps]({Path(plan.page).stem}/{task}.svg)"


def _tuning_table(plan: Plan, found: Results) -> str:
    header = ["method", *(f"{rate:g}" for rate in plan.learning_rates)]
    lines = [f"| {' | '.join(header)} |", "|---|" + "---:|" * len(plan.learning_rates)]
    for method in plan.methods:
        words = []
        for rate in plan.learning_rates:
            mean = found["tuning"].get(arm_name(method, rate))
            text = "diverged" if mean is None else f"{100 * mean:.1f}"
            words.append(f"**{text}**" if found["rates"][method] == rate else text)
        lines.append(f"| {method} | {' | '.join(words)} |")
    return "\n".join(lines)


def _edge_words(plan: Plan, found: Results) -> str:
    ends = min(plan.learning_rates), max(plan.learning_rates)
    at_end = [f"`{method}`" for method in plan.methods if found["rates"][method] in ends]
    if not at_end:
        return "No method has a rate at an end of the grid."
    names = f"{len(at_end)} of {len(plan.methods)} methods have a rate at an end of the grid ({', '.join(at_end)})"
    return f"{names}. For these a wider grid might have found a better one."


def current_page(plan: Plan) -> dict[Path, str]:
    """Return the files of the page as the committed results have them."""
    return render_files(plan, read_results(plan))
