"""Template arguments and stop ids in the configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from megatron_dypo.config.reading.load import dump_config, load_config, override_lines, parse_config
from megatron_dypo.config.tree import Config


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text("model: {hf_path: m}\ndata: {prompts: [p.jsonl]}\n")
    return file


def _parse(config: Config) -> Config:
    return parse_config(yaml.safe_load(dump_config(config)), where="dumped")


def test_template_arguments_and_stop_ids_survive_a_dump(path: Path) -> None:
    config = load_config(
        path, ["data.chat_template_args={enable_thinking: false, tools: [a]}", "rollout.stop_token_ids=[3, 4]"]
    )
    assert config.data.chat_template_args == {"enable_thinking": False, "tools": ["a"]}
    assert config.rollout.stop_token_ids == (3, 4)
    assert _parse(config) == config


def test_one_template_argument_is_set_by_a_dotted_override(path: Path) -> None:
    config = load_config(path, ["data.chat_template_args.enable_thinking=false"])
    assert config.data.chat_template_args == {"enable_thinking": False}
    lines = override_lines(load_config(path), config)
    assert lines == ["data.chat_template_args.enable_thinking=false"]
    assert load_config(path, lines) == config


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.chat_template_args=[a]", r"data\.chat_template_args=\['a'\]"),
        ("data.chat_template_args=x", r"data\.chat_template_args='x'"),
        ("data.chat_template_args={1: a}", r"data\.chat_template_args"),
        ("rollout.stop_token_ids=[a]", r"rollout\.stop_token_ids\.0='a'"),
        ("rollout.stop_token_ids=[-1]", r"rollout\.stop_token_ids=\[-1\]: token ids are not negative"),
        ("rollout.stop_token_ids=5", r"rollout\.stop_token_ids=5"),
    ],
)
def test_a_value_of_another_form_is_named(path: Path, override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_config(path, [override])


def test_template_arguments_need_a_template(path: Path) -> None:
    with pytest.raises(ValueError, match=r"chat_template_args=\{'a': 1\}: needs chat_template=true"):
        load_config(path, ["data.chat_template=false", "data.chat_template_args={a: 1}"])
