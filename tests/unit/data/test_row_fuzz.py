"""Opening a prompt file with any content works, or raises a ValueError that names the file."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_dypo.config.data import DataConfig
from megatron_dypo.data.formats import FORMATS, Columns
from megatron_dypo.data.prompts import PromptDataset, PromptStream, open_prompts
from megatron_dypo.data.rows import BadRow, parse_row
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer

GOOD = {"prompt": "What is 1 + 1?", "answer": "2", "traces": {"r1": "It is 2."}}
PLAIN = FORMATS["plain"]

texts = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", " ", "\0", "\ud83d", "user", "assistant", "system", "<|im_end|>", "<think>\n", "[1]", '{"a": 1}', "9" * 50]
)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | texts
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(texts | st.sampled_from(["role", "content"]), inner, max_size=4)
    ),
    max_leaves=10,
)
names = sorted({name.split(".")[0] for columns in FORMATS.values() for name in columns.names})
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant", "system"]) | texts, "content": values}),
    max_size=3,
)
records = st.dictionaries(st.sampled_from(names) | texts, values | messages, max_size=8) | st.fixed_dictionaries(
    {"prompt": texts | messages, "answer": values}, optional={"traces": values, "id": values, "source": values}
)


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def _check_row(record: object, columns: Columns) -> None:
    problems: tuple[str, ...] = ()
    try:
        row = parse_row(record, columns, default_id="f:1", default_source="f", keep_row=True)
    except BadRow as bad:
        problems = bad.problems
    else:
        for part in (row.prompt_id, row.prompt, row.answer, row.source, dict(row.traces), row.verifier):
            json.dumps(part, ensure_ascii=False).encode()
        return
    assert problems
    assert all(problem.isascii() or problem.isprintable() for problem in problems)
    "".join(problems).encode()


def _open_and_draw(path: Path, tokenizer: Tokenizer, **data: Any) -> None:
    """Open a file; if it opens, draw every row of it."""
    config = DataConfig(max_prompt_tokens=10**6, **data)
    text = ""
    try:
        dataset = open_prompts([path], config, tokenizer)
    except ValueError as error:
        text = str(error)
    if text:
        assert str(path) in text
        text.encode()
        return
    prompts, drops = PromptStream(dataset, tokenizer, config, 1).take(0, len(dataset))
    assert len(prompts) + drops.prompts == len(dataset)
    for prompt in prompts:
        parts = [prompt.text, prompt.answer, prompt.source, prompt.prompt_id, list(prompt.traces)]
        json.dumps(parts, ensure_ascii=False).encode()
        assert len(prompt.tokens)
        assert all(trace[-1] == tokenizer.eos_id for trace in prompt.traces.values())
    dataset.close()


def _rows_law(record: object, name: str) -> None:
    _check_row(record, FORMATS[name])


@settings(max_examples=300, deadline=None, derandomize=True)
@given(record=records | values, name=st.sampled_from(sorted(FORMATS)))
def test_any_record_is_a_row_or_a_bad_row(record: object, name: str) -> None:
    _rows_law(record, name)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
@given(rows=st.lists(records, min_size=1, max_size=4), skip=st.booleans())
def test_any_json_lines_open_or_name_the_file(folder: Path, tokenizer: Tokenizer, rows: list, skip: bool) -> None:
    path = folder / "x.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [GOOD, *rows]))
    _open_and_draw(path, tokenizer, on_bad_row="skip" if skip else "error")


@settings(max_examples=60, deadline=None, derandomize=True)
@given(content=st.binary(max_size=80) | texts.map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_any_bytes_open_or_name_the_file(folder: Path, tokenizer: Tokenizer, content: bytes) -> None:
    for name in ("x.jsonl", "x.parquet"):
        path = folder / name
        path.write_bytes(content)
        _open_and_draw(path, tokenizer)


def _damage(folder: Path, tokenizer: Tokenizer, count: int, seed: int) -> None:
    draw = random.Random(seed)
    rows = [{**GOOD, "id": f"u{i}", "traces": [("r1", f"It is {i}.")], "n": i} for i in range(30)]
    schema = pyarrow.schema(
        {
            "prompt": pyarrow.string(),
            "answer": pyarrow.string(),
            "id": pyarrow.string(),
            "traces": pyarrow.map_(pyarrow.string(), pyarrow.string()),
            "n": pyarrow.int64(),
        }
    )
    clean = {}
    for name, compression in (("plain", "none"), ("packed", "snappy")):
        path = folder / f"{name}.parquet"
        table = pyarrow.Table.from_pylist(rows, schema=schema)
        pyarrow.parquet.write_table(table, path, row_group_size=10, compression=compression)
        clean[path] = path.read_bytes()
    clean[folder / "damaged.jsonl"] = "".join(json.dumps({**GOOD, "id": i}) + "\n" for i in range(30)).encode()
    for path, whole in clean.items():
        for _ in range(count):
            content = bytearray(whole)
            if draw.random() < 0.3:
                del content[draw.randrange(len(content)) :]
            else:
                content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
            path.write_bytes(bytes(content))
            _open_and_draw(path, tokenizer, keep_row=True)


def test_damaged_files_open_or_name_the_file(folder: Path, tokenizer: Tokenizer) -> None:
    _damage(folder, tokenizer, 40, seed=0)


@pytest.mark.slow
def test_many_damaged_files_open_or_name_the_file(folder: Path, tokenizer: Tokenizer) -> None:
    _damage(folder, tokenizer, 3000, seed=1)


@pytest.mark.slow
@settings(max_examples=4_000, deadline=None)
@given(record=records | values, name=st.sampled_from(sorted(FORMATS)))
def test_very_many_records_are_rows_or_bad_rows(record: object, name: str) -> None:
    _rows_law(record, name)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(rows=st.lists(st.dictionaries(st.sampled_from(names), scalars, min_size=1), min_size=1, max_size=4))
def test_any_table_opens_or_names_the_file(folder: Path, rows: list) -> None:
    path = folder / "table.parquet"
    try:
        table = pyarrow.Table.from_pylist([GOOD | row for row in rows])
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError, ValueError, TypeError):
        return  # Arrow has no type for a column of these
    pyarrow.parquet.write_table(table, path)
    text, num_rows = str(path), len(rows)
    try:
        num_rows = len(PromptDataset([path]))
    except ValueError as error:
        text = str(error)
    assert str(path) in text
    assert num_rows == len(rows)
