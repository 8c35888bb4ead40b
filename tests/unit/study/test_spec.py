"""A mistake in the description of a comparison is reported before anything runs, with key, value and rule."""

from __future__ import annotations

import pytest

from megatron_dypo.ending import Cause
from megatron_dypo.study.compare import open_comparison
from megatron_dypo.study.spec import OUR_EVAL_COMMAND, OUR_TRAIN_COMMAND
from tests.support.check_cases import write_case
from tests.support.study.comparisons import compare, journal_lines, write_comparison


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sedes": [1]}, "sedes: unknown key; did you mean seeds?"),
        ({"baseline": "gpro"}, "baseline: 'gpro': no such method; did you mean grpo?"),
        ({"seeds": []}, "seeds=[]: name at least one"),
        ({"seeds": [1, 1]}, "seeds=[1, 1]: a seed stands twice"),
        ({"seeds": [-1]}, "run.seed=-1: must be in [0, 2^31)"),
        ({"seeds": ["one"]}, "seeds.0='one'"),
        ({"seeds": [True]}, "seeds.0=True"),
        ({"methods": {}}, "methods={}: name at least one"),
        ({"methods": {"../x": {}}, "baseline": "../x"}, "methods: '../x': a name is a part of a path"),
        ({"sets": {"all": ["mth"]}}, "sets.all: 'mth': no such evaluation set of config; did you mean math?"),
        ({"sets": {"a": ["math"], "b": ["math"]}}, "a set stands twice"),
        ({"tables": {"one": {"sets": ["logik"]}}}, "tables.one.sets: 'logik': no such evaluation set"),
        ({"tables": {"one": {"methods": ["sft"]}}}, "tables.one.methods: 'sft': no such method"),
        (
            {"tables": {"one": {"agianst": "previous"}}},
            "tables.one.agianst: unknown key; did you mean tables.one.against?",
        ),
        (
            {"methods": {"grpo": {"objective.nmae": "grpo"}}},
            "grpo: override 'objective.nmae=grpo': objective.nmae: unknown key",
        ),
        ({"methods": {"grpo": {"optimizer.lr": -1}}}, "optimizer.lr=-1"),
        ({"methods": {"grpo": {"run.seed": 3}}}, "grpo: run.seed: the comparison sets it"),
        ({"methods": {"grpo": {"objective": {"name": "grpo"}}}}, "grpo: objective: an override must have the form"),
        ({"methods": {"grpo": {"export.hf": False}}}, "export.hf=false: must be true"),
        ({"data": {"small": {"data.prompst": ["x"]}}}, "(small): override 'data.prompst=[x]'"),
        ({"smallest_difference": 2.0}, "smallest_difference=2.0: must be in (0, 1)"),
        ({"pass_at": 0}, "pass_at=0: must be positive"),
        ({"config": "absent.yaml"}, "absent.yaml: no such config file"),
        (
            {"methods": {"dypo": {}, "grpo": {"eval.sets": {"other": {"path": "x"}}}}},
            "grpo seed 1: eval: has other sets than dypo seed 1",
        ),
    ],
)
def test_a_mistake_is_named_before_anything_runs(changes, message, tmp_path):
    path = write_comparison(tmp_path, **changes)
    with pytest.raises(ValueError, match=r"comparison\.yaml") as error:
        open_comparison(path)
    assert message in str(error.value)
    assert journal_lines(tmp_path) == []


def test_given_servers_are_refused_where_our_command_would_evaluate_whatever_weights_they_have(tmp_path):
    urls = {"grpo": {"rollout.servers.urls": ["http://127.0.0.1:1"]}}
    with pytest.raises(ValueError, match=r"grpo: rollout\.servers\.urls=\['http://127.0.0.1:1'\]: must be empty"):
        open_comparison(write_comparison(tmp_path, methods=urls, eval_command=list(OUR_EVAL_COMMAND)))
    open_comparison(write_comparison(tmp_path, methods=urls))


def test_an_input_that_a_method_cannot_use_is_named_by_a_dry_run_and_before_a_run(tmp_path):
    methods = {"grpo": {}, "typo": {"objective.name": "gpro"}, "other": {"grading.verifier": "no_such:f"}}
    ours = {"train_command": list(OUR_TRAIN_COMMAND)}
    path = write_comparison(tmp_path, config=str(write_case(tmp_path / "case")), methods=methods, seeds=[1], **ours)
    with pytest.raises(ValueError, match=r"typo: objective\.name='gpro'") as error:
        open_comparison(path).describe()
    _, said = compare(path, status=Cause.BAD_INPUT.status)
    for text in (str(error.value), said):
        assert "typo: objective.name='gpro'" in text
        assert "other: grading.verifier='no_such:f': cannot import no_such" in text
    assert not (tmp_path / "out").exists()


def test_a_key_that_stands_twice_is_named_in_the_description_and_in_its_config(tmp_path):
    path = write_comparison(tmp_path)
    whole = path.read_text()
    path.write_text(whole.replace("methods:", "methods:\n  grpo: {}", 1))
    with pytest.raises(ValueError, match=r"comparison\.yaml.*'grpo' stands twice"):
        open_comparison(path)
    path.write_text(whole)
    config = tmp_path / "config.yaml"
    config.write_text(config.read_text().replace("  sets:", "  sets:\n    math: {path: other.jsonl}", 1))
    with pytest.raises(ValueError, match=r"config\.yaml.*'math' stands twice"):
        open_comparison(path)


def test_cells_are_all_methods_on_all_data_with_the_first_seed_then_with_the_next(tmp_path):
    data = {"small": {"data.prompts": ["small.jsonl"]}, "large": {"data.prompts": ["large.jsonl"]}}
    comparison = open_comparison(write_comparison(tmp_path, data=data))
    assert [(cell.arm.name, cell.seed) for cell in comparison.cells[:4]] == [
        (f"{method}@{name}", 1) for method in ("dypo", "grpo") for name in ("small", "large")
    ]
    assert [cell.number for cell in comparison.cells] == list(range(8))
    for cell in comparison.cells:
        assert cell.config.data.prompts == (f"{cell.arm.data}.jsonl",)
        assert (cell.config.run.seed, cell.config.objective.name) == (cell.seed, cell.arm.method)
    assert len({cell.config.run.dir for cell in comparison.cells}) == 8
