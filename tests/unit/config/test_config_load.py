import dataclasses
import json
import subprocess
import sys

import pytest
import yaml

from megatron_dypo.config.reading.load import changed_lines, dump_config, load_config, override_lines
from megatron_dypo.config.tree import Config

MINIMAL = {"model": {"hf_path": "m"}, "data": {"prompts": ["p.jsonl"]}}


@pytest.fixture
def write(tmp_path):
    def write(tree):
        path = tmp_path / "config.yaml"
        path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
        return path

    return write


def test_defaults_are_the_papers(write):
    config = load_config(write(MINIMAL))
    objective = config.objective
    assert (objective.alpha, objective.gamma, objective.beta_gal) == (0.5, 1.0, 1.0)
    assert (config.rollout.group_size, config.rollout.max_new_tokens, config.optimizer.lr) == (8, 8192, 1e-6)
    assert config.eval.temperature == 0.6


def test_overrides_win_over_the_file_and_are_yaml(write):
    path = write({**MINIMAL, "optimizer": {"lr": 1e-3}})
    config = load_config(path, ["optimizer.lr=2e-6", "data.teachers=[a, b]", "objective.dual_clip=null"])
    assert config.optimizer.lr == 2e-6
    assert config.data.teachers == ("a", "b")


def test_resolved_config_reads_back_to_itself(write):
    config = load_config(write(MINIMAL), ["parallel.tensor=2", "objective.dual_clip=3"])
    assert load_config(write(dump_config(config))) == config


@pytest.mark.parametrize("character", ["\x85", "\u2028", "\u2029", "é"])
def test_a_line_break_of_unicode_in_a_key_is_read_back(write, character):
    arguments = json.dumps({character: f"a{character}b"})
    config = load_config(write(MINIMAL), [f"data.chat_template_args={arguments}"])
    again = load_config(write(dump_config(config)))
    assert again.data.chat_template_args == {character: f"a{character}b"} == config.data.chat_template_args


def test_changed_lines_name_old_and_new_value(write):
    before = dump_config(load_config(write(MINIMAL)))
    after = dump_config(load_config(write(MINIMAL), ["optimizer.lr=1e-5", "data.prompts=[a, b]"]))
    assert changed_lines(before, after) == ["data.prompts: ['p.jsonl'] → ['a', 'b']", "optimizer.lr: 1e-06 → 1e-05"]
    assert changed_lines(before, before) == []
    assert changed_lines("run: {old: 1}", "run: {dir: null}") == ["run.old: 1 → absent", "run.dir: absent → None"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.learning_rate=1", "optimizer.learning_rate: unknown key"),
        ("objective.alhpa=0.3", "did you mean objective.alpha?"),
        ("objective.alpha=1.5", "objective.alpha=1.5: must be in [0, 1]"),
        ("rollout.group_size=eight", "rollout.group_size='eight'"),
        ("parallel.sequence=true", "sequence=true: needs tensor > 1"),
        ("optimizer=3", "optimizer=3: must be a mapping"),
        ("objective.length_normalization=mean", "objective.length_normalization='mean'"),
        ("rollout.servers.prot=1", "rollout.servers.prot: unknown key; did you mean rollout.servers.port?"),
        ("model.hf_path=", "model.hf_path=None"),
        ("rollout.servers.router=http://r:1", "router='http://r:1': needs urls"),
        ("alpha", "must have the form section.key=value"),
    ],
)
def test_bad_input_names_field_value_and_rule(write, override, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the message is compared below
        load_config(write(MINIMAL), [override])
    assert message in str(error.value)


def test_missing_sections_and_files_are_named(write, tmp_path):
    with pytest.raises(ValueError, match=r"model: is required"):
        load_config(write({"data": {"prompts": ["p"]}}))
    with pytest.raises(ValueError, match=r"no such config file"):
        load_config(tmp_path / "absent.yaml")


def test_override_lines_turn_one_config_into_the_other(write):
    changes = ["optimizer.lr=5e-7", "data.teachers=[a b, 'null']", "model.recompute=full", "objective.importance.cap=2"]
    before, after = load_config(write(MINIMAL)), load_config(write(MINIMAL), [*changes, "parallel.num_processes=null"])
    lines = override_lines(before, after)
    assert len(lines) == len(changes)
    assert all("\n" not in line for line in lines)
    assert load_config(write(MINIMAL), lines) == after
    assert override_lines(after, after) == []


def test_every_field_is_documented():
    import ast
    import inspect

    import megatron_dypo.config.tree as module

    tree = ast.parse(inspect.getsource(module))
    assert all(ast.get_docstring(node) for node in tree.body if isinstance(node, ast.ClassDef))
    assert dataclasses.is_dataclass(Config)


def test_importing_the_config_loads_nothing_heavy():
    code = "import sys, megatron_dypo.config.reading.load, megatron_dypo.cli\n"
    code += "print([m for m in ('torch', 'megatron', 'sglang', 'transformers') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_an_asynchronous_run_must_correct_for_older_weights(write):
    path = write({**MINIMAL, "rollout": {"mode": "async"}})
    with pytest.raises(ValueError, match=r"rollout\.mode=async: samples come from older weights"):
        load_config(path)
    load_config(path, ["objective.importance.cap=2.0"])
    load_config(path, ["old_logp.source=server"])


def test_servers_that_are_never_idle_cannot_give_their_memory_back(write):
    overrides = ["rollout.mode=async", "objective.importance.cap=2.0", "refit.offload_servers=true"]
    with pytest.raises(ValueError, match=r"refit\.offload_servers=true: needs rollout\.mode=sync"):
        load_config(write(MINIMAL), overrides)


def test_an_error_names_the_override_that_made_it_and_else_the_file(write):
    path = write({**MINIMAL, "run": {"steps": 0}})
    with pytest.raises(ValueError, match="override") as caught:
        load_config(path, ["optimizer.lr=1.0", "optimizer.lr=-1"])
    assert str(caught.value).splitlines() == [
        f"{path}: run.steps=0: must be positive",
        "override 'optimizer.lr=-1': optimizer.lr=-1.0: must be positive",
    ]
    with pytest.raises(ValueError, match=r"^override 'optimizer\.lrr=1': optimizer\.lrr: unknown key"):
        load_config(path, ["optimizer.lrr=1"])
