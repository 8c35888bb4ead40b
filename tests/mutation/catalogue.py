"""The rooms that are mutated: the files of each, the number of mutants, and the tests that should kill them.

A file's tests are those under ``tests/unit`` that import it, or those of its room where none does; ``also`` adds files
that reach it through others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class Room:
    """One part of the package."""

    files: tuple[str, ...]
    """Globs of files. A glob that matches nothing is ignored, since files are renamed."""
    count: int
    """Mutants drawn from all files of the room, in addition to those written by hand."""
    also: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    """File → tests to run first: they kill most mutants."""
    without: tuple[str, ...] = ()
    """Tests that are too slow for the few mutants of these files that they kill."""


_LOSS = (
    "tests/unit/objective/test_loss.py",
    "tests/unit/objective/test_loss_of_sequences.py",
    "tests/unit/objective/test_extreme_ratios.py",
    "tests/unit/objective/test_own_objectives.py",
)
_OBJECTIVES = (
    "tests/unit/objective/test_own_objectives.py",
    "tests/unit/objective/test_recipes.py",
    "tests/unit/objective/test_laws_of_objectives.py",
    "tests/unit/objective/test_literal_objectives.py",
)
_ANSWERS = (
    "tests/unit/grading/test_answers.py",
    "tests/unit/grading/test_answer_formats.py",
    "tests/unit/grading/test_gold_answers.py",
    "tests/unit/grading/test_answer_laws.py",
)
_VERIFIERS = (
    "tests/unit/grading/test_verifier_batches.py",
    "tests/unit/grading/test_verify.py",
    "tests/unit/grading/test_verifier_processes.py",
)
_STEPS = ("tests/dist/test_after_steps.py", "tests/dist/test_bad_updates.py", "tests/dist/test_multi_step.py")

ROOMS = {
    "objective": Room(
        files=("megatron_dypo/objective/**/*.py", "megatron_dypo/config/objective.py"),
        count=140,
        also={
            **{f"megatron_dypo/objective/{name}.py": _LOSS for name in ("importance", "sequences", "ratios", "moves")},
            **{f"megatron_dypo/objective/recipes/{n}.py": _OBJECTIVES for n in ("dypo", "grpo", "sft", "sft_then_rl",
                "base")},
            "megatron_dypo/objective/token_weights.py": _OBJECTIVES,
            "megatron_dypo/objective/advantage.py": _OBJECTIVES,
            "megatron_dypo/objective/projection.py": ("tests/unit/objective/test_fused_logprobs.py",),
            "megatron_dypo/objective/loss.py": _LOSS,
            "megatron_dypo/config/objective.py": ("tests/unit/config/test_config_objective.py",
                "tests/unit/objective/test_laws_of_objectives.py"),
        },
        without=("tests/unit/loop/test_tally.py",),
    ),
    "batching": Room(
        files=("megatron_dypo/batching/**/*.py",),
        count=90,
        also={"megatron_dypo/batching/exchange.py": ("tests/dist/test_exchange.py",)},
        without=("tests/unit/mcore/test_fp8.py", "tests/unit/mcore/test_context_attention.py"),
    ),
    "grading": Room(
        files=("megatron_dypo/grading/**/*.py",),
        count=60,
        also={
            **{f"megatron_dypo/grading/answers/{name}.py": _ANSWERS for name in ("splitting", "units", "unmarked",
                "extract")},
            "megatron_dypo/grading/choice.py": _ANSWERS,
            **{f"megatron_dypo/grading/workers/{name}.py": _VERIFIERS for name in ("judging", "pool", "error_log",
                "process", "worker")},
            "megatron_dypo/grading/workers/calling.py": ("tests/unit/grading/test_verifier_rows.py",),
            "megatron_dypo/grading/command.py": ("tests/unit/grading/test_grade_command.py",),
            "megatron_dypo/grading/pair_file.py": ("tests/unit/grading/test_grade_command.py",),
        },
        without=("tests/unit/test_readme.py", "tests/unit/examples/test_other_examples.py"),
    ),
    "data": Room(
        files=("megatron_dypo/data/**/*.py",),
        count=60,
        also={
            "megatron_dypo/data/row_check/bad_rows.py": ("tests/unit/data/test_opening_prompts.py",),
            "megatron_dypo/data/tokenizer/chat.py": ("tests/unit/data/test_chat_families.py",
                "tests/unit/data/test_prompts.py"),
            "megatron_dypo/data/row_check/cache.py": ("tests/unit/data/test_opening_prompts.py",),
            "megatron_dypo/data/dataset.py": ("tests/unit/data/test_opening_prompts.py",),
            "megatron_dypo/data/files.py": ("tests/unit/data/test_row_ends.py", "tests/unit/data/test_prompt_files.py",
                "tests/unit/data/test_opening_prompts.py"),
            "megatron_dypo/data/fingerprints.py": ("tests/unit/data/test_opening_prompts.py",),
            "megatron_dypo/data/tokenizer/folder.py": ("tests/unit/data/test_template_settings.py",
                "tests/unit/data/test_tokenizers.py", "tests/unit/data/test_tokenizer_files.py"),
            "megatron_dypo/data/parquet_files.py": ("tests/unit/data/test_prompt_files.py",
                "tests/unit/data/test_row_values.py"),
            "megatron_dypo/data/row_check/check.py": ("tests/unit/data/test_opening_prompts.py",
                "tests/unit/data/test_trace_verdicts.py"),
            "megatron_dypo/data/source.py": ("tests/unit/data/test_row_values.py",),
            "megatron_dypo/data/statistics.py": ("tests/unit/data/test_opening_prompts.py",),
            "megatron_dypo/data/tokenizer/template_worker.py": ("tests/unit/data/test_template_variables.py",
                "tests/unit/data/test_tokenizers.py"),
            "megatron_dypo/data/tokenising.py": ("tests/unit/data/test_prompts.py",),
            "megatron_dypo/data/tokenizer/files.py": ("tests/unit/data/test_tokenizer_files.py",),
            "megatron_dypo/data/tokenizer/kinds.py": ("tests/unit/data/test_tokenizers.py",
                "tests/unit/data/test_tokenizer_files.py"),
            "megatron_dypo/data/tokenizer/open.py": ("tests/unit/data/test_tokenizers.py",
                "tests/unit/data/test_tokenizer_files.py"),
            "megatron_dypo/data/traces.py": ("tests/unit/data/test_trace_targets.py",
                "tests/unit/data/test_prompts.py"),
            "megatron_dypo/data/values.py": ("tests/unit/data/test_rows.py",),
        },
        without=(
            "tests/unit/data/test_tokenizer_fuzz.py",
            "tests/unit/data/test_real_configs.py",
            "tests/unit/data/test_data_guide.py",
            "tests/unit/examples/test_other_examples.py",
            "tests/unit/examples/test_quickstart_task.py",
        ),
    ),
    "rollout": Room(
        files=("megatron_dypo/rollout/**/*.py",),
        count=60,
        also={
            "megatron_dypo/rollout/counts.py": ("tests/unit/rollout/test_client_counts.py",
                "tests/unit/rollout/test_failed_attempts.py"),
            "megatron_dypo/rollout/keys.py": ("tests/unit/rollout/test_direct_hosts.py",),
            "megatron_dypo/rollout/server/node.py": ("tests/unit/rollout/test_serve.py",),
        },
        without=("tests/unit/loop/test_collecting.py", "tests/unit/refit/test_choose_transport.py"),
    ),
    "metrics": Room(
        files=("megatron_dypo/loop/books/tally.py", "megatron_dypo/loop/books/step_metrics.py",
            "megatron_dypo/metrics/writer.py", "megatron_dypo/metrics/sinks.py", "megatron_dypo/metrics/names.py",
            "megatron_dypo/loop/books/ledger.py"),
        count=50,
        without=("tests/unit/test_readme.py", "tests/unit/loop/test_evaluate.py"),
    ),
    "loop": Room(
        files=("megatron_dypo/loop/**/*.py", "megatron_dypo/metrics/samples.py",
            "megatron_dypo/processes/stop_requests.py", "megatron_dypo/ending.py"),
        count=60,
        also={
            **{f"megatron_dypo/loop/{name}.py": _STEPS
                for name in ("train", "updater", "logprobs", "update", "megatron_policy")},
            **{f"megatron_dypo/loop/bad_steps/{name}.py":
                ("tests/dist/test_bad_updates.py", "tests/dist/test_spoilt_weights.py")
                for name in ("not_finite", "roll_back")},
            "megatron_dypo/loop/setup/build.py": ("tests/unit/loop/test_build.py", "tests/dist/test_open_run.py",
                *_STEPS),
            "megatron_dypo/loop/collect.py": ("tests/unit/loop/test_collecting_accounts.py",
                "tests/unit/loop/test_collecting.py"),
            "megatron_dypo/loop/books/admission.py": ("tests/unit/loop/test_collecting_accounts.py",
                "tests/unit/loop/test_collecting.py"),
            "megatron_dypo/loop/books/outcomes.py": ("tests/unit/loop/test_outcomes.py",),
            "megatron_dypo/ending.py": ("tests/unit/test_ending.py",),
        },
        without=(
            *("tests/unit/mcore/test_save_failure.py", "tests/unit/grading/test_own_verifier_page.py"),
            *("tests/unit/launch/test_launcher_of_ranks.py", "tests/unit/test_readme.py",
                "tests/unit/models/test_hf_io.py"),
        ),
    ),
}  # fmt: skip


def files_of(room: Room, root: Path) -> list[str]:
    """Return the room's files under ``root``, sorted by name."""
    found = {str(path.relative_to(root)) for pattern in room.files for path in root.glob(pattern)}
    return sorted(path for path in found if Path(path).name != "__init__.py")


def tests_of(room: Room, path: str, root: Path) -> list[str]:
    """Return the test files for ``path``: those that ``also`` names, and those that import it, the shortest first."""
    module = path.removesuffix(".py").replace("/", ".")
    package, _, name = module.rpartition(".")
    wanted = (f"from {module} import", f"import {module}", f"from {package} import {name}")
    tests = sorted((root / "tests/unit").rglob("test_*.py"), key=lambda test: test.stat().st_size)
    found = [str(test.relative_to(root)) for test in tests if any(words in test.read_text() for words in wanted)]
    if not found and path not in room.also:  # reached through others of its package
        found = [str(test.relative_to(root)) for test in tests if test.parent.name == Path(path).parent.name]
    also = [test for test in room.also.get(path, ()) if (root / test.partition("::")[0]).is_file()]
    return [test for test in dict.fromkeys([*also, *found]) if test not in room.without]
