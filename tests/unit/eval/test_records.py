"""Records: no written record is lost, and records of another setting are not mixed in."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_dypo.eval.records import Record, RecordFile, read_records, records_path, setting_path

SETTING = {"model": "models/tiny", "temperature": 0.6, "files": [{"sha256": "ab"}]}
ONE = Record(
    set="aime",
    item="aime:1",
    sample=0,
    seed=5,
    source="aime",
    correct=True,
    truncated=False,
    num_tokens=3,
    response="so \\boxed{7}\n… \ud800",
    answer="7",
)
TWO = replace(ONE, sample=1, correct=None, answer=None, error="late")


def opened(out: Path, **changes: object) -> RecordFile:
    return RecordFile(out, "aime", {**SETTING, **changes})


def test_records_come_back_as_they_were_written(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.append([ONE])
        file.append([TWO])
    with opened(tmp_path) as again:
        assert again.records == [ONE, TWO]
    lines = records_path(tmp_path, "aime").read_text().splitlines()
    assert list(json.loads(lines[0])) == [
        *(
            "set",
            "item",
            "sample",
            "seed",
            "source",
            "correct",
            "truncated",
            "num_tokens",
            "response",
            "answer",
            "error",
        )
    ]


def test_a_torn_last_line_is_dropped_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with opened(tmp_path) as file:
        file.append([ONE, TWO])
    path = records_path(tmp_path, "aime")
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    assert read_records(path) == [ONE]
    with opened(tmp_path) as again:
        assert again.records == [ONE]
        again.append([TWO])
    assert "the last line was cut off" in caplog.text
    assert path.read_bytes() == whole


@pytest.mark.parametrize(
    ("changes", "field"),
    [({"temperature": 0.0}, "temperature was 0.6, now 0.0"), ({"top_k": 3}, "top_k was None, now 3")],
)
def test_records_of_another_setting_are_refused(tmp_path: Path, changes: dict[str, object], field: str) -> None:
    with opened(tmp_path) as file:
        file.append([ONE])
    with pytest.raises(ValueError, match=field), opened(tmp_path, **changes):
        pass
    with opened(tmp_path) as same:
        assert same.records == [ONE]


def test_a_setting_without_a_record_gives_way(tmp_path: Path) -> None:
    with opened(tmp_path):
        pass
    with opened(tmp_path, temperature=0.0) as file:
        file.append([ONE])
    assert json.loads(setting_path(tmp_path, "aime").read_text())["temperature"] == 0.0


def test_records_without_their_setting_are_refused(tmp_path: Path) -> None:
    with opened(tmp_path) as file:
        file.append([ONE])
    setting_path(tmp_path, "aime").unlink()
    with pytest.raises(ValueError, match=r"aime.setting.json: cannot be read"), opened(tmp_path):
        pass


def test_two_evaluations_cannot_write_to_one_file(tmp_path: Path) -> None:
    with opened(tmp_path), pytest.raises(ValueError, match="another process writes to it"), opened(tmp_path):
        pass
    with opened(tmp_path):
        pass


@pytest.mark.parametrize(
    ("line", "rule"),
    [
        ("nonsense", "not a JSON object"),
        ("[1]", "must be an object with set, item"),
        (json.dumps({**vars(ONE), "sample": "0"}), "sample='0': must be int"),
        (json.dumps({**vars(ONE), "sample": True}), "sample=True: must be int"),
        (json.dumps({**vars(ONE), "correct": 1}), "correct=1: must be bool or null"),
        (json.dumps(vars(ONE)), "item='aime:1', sample=0: has a record already"),
    ],
)
def test_a_line_that_is_no_record_is_named(tmp_path: Path, line: str, rule: str) -> None:
    path = records_path(tmp_path, "aime")
    with opened(tmp_path) as file:
        file.append([ONE])
    with path.open("a") as file_:
        file_.write(line + "\n")
    with pytest.raises(ValueError, match=rf"aime.jsonl:2: .*{rule}"):
        read_records(path)


def test_a_set_whose_name_has_a_slash_is_a_file_of_the_folder(tmp_path: Path) -> None:
    assert records_path(tmp_path, "a/b").parent == tmp_path
