"""The tiny study: its tasks and splits, the choice of learning rates, the budget, and the configs of its cells."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from model import write_model, write_tokenizer
from scipy import stats
from tiny_study import additions, questions, sorting
from tiny_study.budget import budget, budget_table, cell_seconds, hours, steps_with_rollouts
from tiny_study.inputs import TASKS, TOKENS, data_path, start_path
from tiny_study.over_steps import interval
from tiny_study.page import NOT_RUN, current_page, render_page
from tiny_study.plan import Plan, read_plan
from tiny_study.records import take_records
from tiny_study.results import read_results
from tiny_study.specs import DIVERGED, arm_name, chosen_rates, final_spec, results_path, tuning_spec

from megatron_dypo.check.survey import survey
from megatron_dypo.config.reading.load import dump_config, flow_yaml, load_config
from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.eval.prompts import response_seed
from megatron_dypo.eval.records import read_records, records_path
from megatron_dypo.grading.exact import verify_exact
from megatron_dypo.grading.math import verify_math
from megatron_dypo.metrics.samples import SampleLog, eval_folder, sample_row
from megatron_dypo.objective.recipes.registry import OBJECTIVES, build_objective
from megatron_dypo.study.cells import Cell, Failure
from megatron_dypo.study.compare import open_comparison
from megatron_dypo.types import GradedGroup, Prompt, Rollout, Treatment, Verdict
from tests.support.study.fake_study import write_plan

ROOT = Path(__file__).parents[3]
FOLDER = ROOT / "examples" / "tiny_study"
STUDY, SMOLLM2, AUTO = (read_plan(FOLDER / f"{name}.yaml") for name in ("study", "smollm2", "auto"))
PLANS = {"study": STUDY, "smollm2": SMOLLM2, "auto": AUTO}
CHOSEN = dict.fromkeys(STUDY.methods, 1e-3)
NEEDS_A_TEACHER_MODEL = {"opd"}


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.fixture(scope="module", params=TASKS)
def drawn(request: pytest.FixtureRequest) -> tuple[str, Mapping[str, list[dict[str, Any]]]]:
    return request.param, TASKS[request.param].draw_rows(1)


def text_of(row: Mapping[str, Any]) -> str:
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else prompt[0]["content"]


def problem_of(row: Mapping[str, Any]) -> str:
    """Return the problem without its phrasing: the numbers in order, or the word."""
    numbers = re.findall(r"\d+", text_of(row))
    return "+".join(numbers) if numbers else re.findall(r"(\w+)=", text_of(row))[0]


def test_no_problem_is_in_two_sets_or_twice_in_one(drawn: Any) -> None:
    _, sets = drawn
    problems = [problem_of(row) for rows in sets.values() for row in rows]
    assert len(set(problems)) == len(problems) > 1000


def test_the_same_seed_draws_the_same_sets_and_another_one_others(drawn: Any) -> None:
    name, sets = drawn
    assert TASKS[name].draw_rows(1) == sets
    assert TASKS[name].draw_rows(2)["heldout"] != sets["heldout"]


def test_longer_problems_are_longer_than_those_of_training_and_all_that_is_measured_besides(drawn: Any) -> None:
    _, sets = drawn
    length = {name: [max(map(len, problem_of(row).split("+"))) for row in rows] for name, rows in sets.items()}
    longest = max(max(lengths) for name, lengths in length.items() if name not in ("longer", "warmup"))
    assert min(length["longer"]) == longest + 1


def test_the_other_phrasing_is_in_no_set_that_methods_train_or_choose_on(drawn: Any) -> None:
    name, sets = drawn
    other = {"additions": "add ", "sorting": "order of ", "questions": "Please compute the sum of "}[name]
    assert all(text_of(row).startswith(other) for row in sets["phrasing"])
    for kind in ("train", "validation", "heldout", "longer"):
        assert not any(text_of(row).startswith(other) for row in sets[kind])
    if "warmup" in sets:  # where the policy learns to read it, on easy problems
        phrased = [row for row in sets["warmup"] if text_of(row).startswith(other)]
        assert 0 < len(phrased) < len(sets["warmup"]) / 4
        easy = {row["source"] for row in sets["warmup"]}
        assert easy < {row["source"] for row in sets["phrasing"]}


def test_answers_are_right_and_two_styles_of_teachers_mostly_are(drawn: Any) -> None:
    name, sets = drawn
    verify = verify_math if name == "questions" else verify_exact
    rows = [row for kind in ("train", "heldout", "longer") for row in sets[kind][:100]]
    for row in rows:
        problem = problem_of(row)
        expected = str(sum(map(int, problem.split("+")))) if "+" in problem else "".join(sorted(problem))
        assert row["answer"] == expected
    for teacher in TASKS[name].teachers:
        right = sum(verify(row["traces"][teacher], row["answer"]) for row in rows) / len(rows)
        assert 0.8 < right <= 1


def test_the_optional_teacher_is_wrong_on_the_way_and_right_in_the_end() -> None:
    for module, teacher in ((additions, "forgetful"), (sorting, "clumsy")):
        rows = module.draw_rows(1)["train"][:300]
        assert all(verify_exact(row["traces"][teacher], str(row["answer"])) for row in rows)
    assert additions.add_forgetfully(additions.Addition(478, 964)) == "8+4=12,7+6=13,4+9=13####1442"
    assert sorting.insert_clumsily("dbca") == "d,db,cbd,bacd####abcd"


def test_teachers_of_sorting_write_what_the_page_says_and_err_only_where_it_says() -> None:
    assert sorting.insert_letters("dbca") == "d,bd,bcd,abcd####abcd"
    assert sorting.rank_letters("dbca") == "4,2,3,1####abcd"
    for row in sorting.draw_rows(1)["train"][:1000]:
        word = problem_of(row)
        assert verify_exact(row["traces"]["insertion"], row["answer"]) is not ({"i", "j"} <= set(word))
        assert verify_exact(row["traces"]["ranks"], row["answer"]) is not ({"k", "l"} <= set(word))


def test_words_that_do_not_exist_are_an_error() -> None:
    with pytest.raises(ValueError, match="found only 16 words of 1 letters"):
        sorting.draw_words({1: 17}, questions.random.Random(1))


@pytest.mark.parametrize("name", ["additions", "sorting"])
def test_the_models_tokenizer_reads_every_prompt_and_trace_and_all_fit(name: str, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, TOKENS)
    tokenizer = load_tokenizer(tmp_path)
    config = load_config(STUDY.config, [f"{key}={flow_yaml(value)}" for key, value in STUDY.overrides.items()])
    for rows in TASKS[name].draw_rows(1).values():
        for row in rows[:150]:
            prompt = tokenizer.encode(text_of(row))
            assert tokenizer.decode(prompt) == text_of(row)
            assert len(prompt) <= config.data.max_prompt_tokens
            for trace in row["traces"].values():
                ids = tokenizer.encode(trace)
                assert tokenizer.decode(ids) == trace
                assert len(ids) + 1 <= min(config.data.max_trace_tokens, config.rollout.max_new_tokens)


def open_content(content: Mapping[str, Any], folder: Path) -> tuple[Cell, ...]:
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump(dict(content), sort_keys=False))
    return open_comparison(path).cells


@pytest.fixture(scope="module")
def cells_of(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, list[Cell]]:
    """Return name of a plan → the cells of all its comparisons."""
    folder, found = tmp_path_factory.mktemp("specs"), dict[str, list[Cell]]()
    for name, plan in PLANS.items():
        rates = dict.fromkeys(plan.methods, 1e-3)
        contents = [final_spec(plan, task, rates) for task in plan.tasks]
        contents += [tuning_spec(plan, task) for task in plan.tasks] if plan.is_tuned else []
        found[name] = [cell for content in contents for cell in open_content(content, folder)]
    return found


@pytest.mark.parametrize("name", PLANS)
def test_every_cell_has_a_config_that_its_objective_takes_and_as_many_rollouts_as_any_other(
    name: str, cells_of: Mapping[str, list[Cell]]
) -> None:
    cells = cells_of[name]
    for cell in cells:
        build_objective(cell.config.objective)
    steps, rollouts = {cell.config.run.steps for cell in cells}, {cell.config.rollout for cell in cells}
    batching = {cell.config.batching for cell in cells}
    assert (len(steps), len(rollouts), len(batching)) == (1, 1, 1)
    (batch,) = batching
    assert batch.max_collect_rounds == 1
    assert batch.prompts_per_update == next(iter(rollouts)).prompts_per_round


def test_the_study_has_every_objective_a_copy_of_dypo_and_every_ablation_of_the_other_example() -> None:
    objectives = {own["objective.name"] for own in STUDY.methods.values()}
    assert objectives == OBJECTIVES.keys() - NEEDS_A_TEACHER_MODEL
    assert STUDY.copies == {"dypo_again": "dypo"}
    others = yaml.safe_load((ROOT / "examples/ablation/ablation.yaml").read_text())["methods"]
    entered_as_methods = {"sft", "sft_and_rl", "dypo", "rl"}
    assert STUDY.ablations.keys() == others.keys() - entered_as_methods
    depend_on_steps = {"no_gate", "reference_refreshed"}
    for name in STUDY.ablations.keys() - depend_on_steps:
        assert STUDY.ablations[name] == others[name]
    assert STUDY.ablations["no_gate"] == {"objective.rl_only_steps": STUDY.steps}
    assert len(STUDY.seeds) >= 5
    assert set(SMOLLM2.methods) == {"dypo", "grpo", "sft", "sft_then_rl"}
    assert len(SMOLLM2.seeds) == 3
    assert (AUTO.overrides, AUTO.steps, AUTO.seeds) == (STUDY.overrides, STUDY.steps, STUDY.seeds)
    assert AUTO.learning_rates == (read_results(STUDY)["tasks"]["additions"]["rates"]["dypo"],)


@pytest.mark.parametrize("task", STUDY.tasks)
def test_check_finds_nothing_wrong_with_a_cell_of_each_method(task: str, tmp_path: Path) -> None:
    plan = dataclasses.replace(STUDY, out=str(tmp_path), seeds=(1,), ablations={}, tables={})
    for kind, rows in TASKS[task].draw_rows(1).items():
        path = data_path(tmp_path / task, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows[:10]))
    write_model(start_path(tmp_path / task, TASKS[task]), 1, TOKENS)  # in place of the warm start
    cells = {cell.arm.method: cell for cell in open_content(final_spec(plan, task, CHOSEN), tmp_path)}
    assert cells.keys() == {*plan.methods, *plan.copies}
    # The tasks differ in their data, which every method reads alike.
    for method in cells if task == "additions" else ["dypo"]:
        assert survey(cells[method].config).problems == [], method


def write_tuning(plan: Plan, accuracy: Mapping[str, float], missing: Mapping[str, str]) -> None:
    path = results_path(plan, "additions", "tuning")
    path.parent.mkdir(parents=True)
    estimates = [{"row": name, "column": "validation", "mean": mean} for name, mean in accuracy.items()]
    path.write_text(json.dumps({"tables": [{"estimates": estimates}], "missing": missing}))


@pytest.fixture
def fake(tmp_path: Path) -> Plan:
    return read_plan(write_plan(tmp_path))


def accuracies(dypo: list[float], grpo: list[float]) -> dict[str, float]:
    """Return the accuracies of two methods with the rates 0.001, 0.01 and 0.1."""
    rates = (0.001, 0.01, 0.1)
    pairs = (("dypo", dypo), ("grpo", grpo))
    return {arm_name(method, rate): mean for method, means in pairs for rate, mean in zip(rates, means, strict=False)}


def diverged() -> str:
    return Failure(stage="training", status=13, cause="not_finite", message="gradients are not finite").text()


def test_the_rate_with_the_highest_accuracy_is_chosen_and_of_two_that_tie_the_smaller(fake: Plan) -> None:
    write_tuning(fake, accuracies([0.1, 0.2, 0.3], [0.4, 0.4, 0.1]), {})
    assert chosen_rates(fake, "additions") == {"dypo": 0.1, "grpo": 0.001}
    final = final_spec(fake, "additions", chosen_rates(fake, "additions"))["methods"]
    assert {name: own["optimizer.lr"] for name, own in final.items()} == {"dypo": 0.1, "grpo": 0.001, "dypo_again": 0.1}


def test_a_rate_that_diverges_is_not_chosen_and_one_that_failed_otherwise_is_an_error(fake: Plan) -> None:
    assert diverged().startswith(DIVERGED)
    write_tuning(fake, accuracies([0.1, 0.2], [0.4, 0.5]), {"dypo.lr0.1 seed 100": diverged()})
    assert chosen_rates(fake, "additions") == {"dypo": 0.01, "grpo": 0.01}
    path = results_path(fake, "additions", "tuning")
    path.write_text(path.read_text().replace(diverged(), "not run yet"))
    with pytest.raises(ValueError, match=r"1 runs are missing; the first: dypo.lr0.1 seed 100: not run yet"):
        chosen_rates(fake, "additions")


def test_a_method_that_diverges_with_every_rate_has_no_choice(fake: Plan) -> None:
    write_tuning(fake, accuracies([0.1, 0.2, 0.3], []), {})
    with pytest.raises(ValueError, match="grpo: diverged with every learning rate"):
        chosen_rates(fake, "additions")


@pytest.mark.parametrize("name", PLANS)
def test_the_budget_counts_the_cells_of_the_comparisons_and_fits(name: str, cells_of: Mapping[str, list[Cell]]) -> None:
    plan, cells = PLANS[name], cells_of[name]
    seconds = plan.seconds.inputs * len(plan.tasks)
    for cell in cells:
        sampled = sum(map(build_objective(cell.config.objective).needs_rollouts, range(plan.steps)))
        of_traces = plan.steps - sampled
        probed = 5 * 16 * 2 / 16 if cell.arm.method == "alpha_auto" else 0  # probes, prompts, repeats; groups of a step
        seconds += plan.seconds.cell + plan.seconds.step * (sampled + probed) + plan.seconds.step_of_traces * of_traces
    assert sum(line.cells for line in budget(plan)) == len(cells) + len(plan.tasks)
    assert hours(plan) == pytest.approx(seconds / 3600)
    assert hours(plan) <= plan.hours == 6
    assert budget_table(plan) in (FOLDER / "README.md").read_text()


def test_steps_that_learn_from_traces_alone_cost_less() -> None:
    assert steps_with_rollouts(STUDY, STUDY.methods["sft"]) == 0
    assert steps_with_rollouts(STUDY, STUDY.methods["sft_then_rl"]) == STUDY.steps - 8
    assert steps_with_rollouts(STUDY, STUDY.methods["dypo"]) == STUDY.steps
    assert cell_seconds(STUDY, STUDY.methods["sft"]) < cell_seconds(STUDY, STUDY.methods["dypo"])


@pytest.mark.parametrize("name", PLANS)
def test_the_committed_page_is_rendered_from_the_plan_and_the_committed_results(name: str) -> None:
    for path, text in current_page(PLANS[name]).items():
        assert (ROOT / path).read_text() == text, "run: python examples/tiny_study/run.py PLAN --page"


def test_a_page_with_results_links_to_the_explanation_that_is_written_by_hand() -> None:
    assert STUDY.explanation is not None
    assert (ROOT / STUDY.explanation).is_file()
    link, results = "](results_explained.md)", read_results(STUDY)
    assert link in render_page(STUDY, results)
    assert link not in render_page(STUDY, None)
    assert link not in render_page(dataclasses.replace(STUDY, explanation=None), results)


def test_an_interval_over_seeds_is_students_and_needs_two_of_them() -> None:
    values = [0.2, 0.3, 0.25, 0.4, 0.31]
    low, high = stats.t.interval(0.95, 4, loc=np.mean(values), scale=stats.sem(values))
    assert interval(values) == f"{np.mean(values):.3f} [{low:.3f}, {high:.3f}]"
    assert interval([0.2]) == "0.200"
    assert interval([]) == "–"


def test_a_page_without_results_says_so_and_has_no_figure_of_a_result(fake: Plan) -> None:
    page = render_page(fake, None)
    assert NOT_RUN in page
    assert not re.search(r"±|▲|▼|≈|\[\d|## Results|svg", page)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": [1, 100]}, "tuning_seed=100: must not be among seeds"),
        ({"tasks": ["additon"]}, "additions"),
        ({"copies": {"again": "dipo"}}, "dypo"),
        ({"baseline": "gpro"}, "grpo"),
        ({"ablations": {"dypo": {}}}, "dypo: stands twice"),
        ({"step": 3}, "steps"),
        ({"learning_rates": []}, "learning_rates"),
    ],
)
def test_a_wrong_plan_is_an_error_that_names_key_and_rule(
    changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        read_plan(write_plan(tmp_path, **changes))


def test_records_are_the_responses_of_the_last_evaluation_with_their_verdicts(tmp_path: Path) -> None:
    changes = [f"run.dir={tmp_path}/run", "run.steps=20", "run.seed=7", "eval.sets.heldout.path=heldout.jsonl"]
    config = load_config("examples/quickstart/dypo.yaml", changes)
    (tmp_path / "config.yaml").write_text(dump_config(config))
    with pytest.raises(ValueError, match=r"step_000020.jsonl: no such file"):
        take_records(tmp_path)
    log = SampleLog(tmp_path / "run", folder=eval_folder("heldout"))
    for step, answers in ((0, ["1"]), (20, ["5", "6", None])):
        log.write(step, [sample_row(step, graded(f"p{i}", answer), Treatment.DROP) for i, answer in enumerate(answers)])
    assert take_records(tmp_path) == {"heldout": 3}
    records = read_records(records_path(tmp_path / "eval", "heldout"))
    assert [(one.item, one.response, one.correct) for one in records] == [
        ("p0", "####5", True),
        ("p1", "####6", False),
        ("p2", "####", None),
    ]
    assert [one.seed for one in records] == [response_seed(7, f"p{i}", 0) for i in range(3)]
    assert [one.truncated for one in records] == [False, False, True]


def graded(name: str, answer: str | None) -> GradedGroup:
    """Return one response to a prompt whose answer is 5; None: it was cut off, and the verifier failed on it."""
    tokens = np.array([1, 2], np.int32)
    prompt = Prompt(prompt_id=name, visit=0, order=0, tokens=tokens, text="2+3=", answer="5", source="sums")
    rollout = Rollout(
        tokens=tokens,
        logp=np.zeros(2, np.float32),
        policy_version=20,
        finish="length" if answer is None else "stop",
        text=f"####{answer or ''}",
    )
    verdict = Verdict(is_correct=answer == "5", reward=float(answer == "5"), error="broke" if answer is None else None)
    return GradedGroup(prompt=prompt, rollouts=(rollout,), verdicts=(verdict,), tier=None)
