"""Opening prompt files with a tokenizer: each row is rendered and counted once, and the result is kept."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import signal
import tracemalloc
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.data.formats import columns_of
from megatron_dypo.data.prompts import PromptDataset, PromptStream, compare_fingerprints, open_prompts
from megatron_dypo.data.row_check import check
from megatron_dypo.data.row_check.bad_rows import settle_bad_rows
from megatron_dypo.data.row_check.processes import check_rows
from megatron_dypo.data.source import RowSource
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from megatron_dypo.ending import Cause, cause_of
from tests.support.tiny_tokenizers import variant

# Like Mistral's, this template has no system role.
NO_SYSTEM = """{% for message in messages %}{% if message['role'] == 'system' %}
{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}
<|im_start|>{{ message['content'] }}<|im_end|>{% endfor %}"""
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
ROWS: list[dict[str, Any]] = [
    {"prompt": f"What is {i} + 1?", "answer": i + 1, "traces": {"r1": "so " * i + f"{i + 1}", "qwen/235B": f"{i + 1}"}}
    for i in range(48)
]


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


def _write(path: Path, rows: list) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows))
    return path


def _open(paths: Path | list[Path], tokenizer: Tokenizer, cache_dir: Path | None = None, **data: Any) -> PromptDataset:
    return open_prompts(
        [paths] if isinstance(paths, Path) else paths, DataConfig(**data), tokenizer, cache_dir=cache_dir
    )


class CountingTokenizer:
    """A tokenizer that counts what it renders and encodes."""

    def __init__(self, inner: Tokenizer) -> None:
        self._inner = inner
        self.num_rendered = 0
        self.num_encoded = 0

    def render(self, *arguments: Any) -> list[int]:
        self.num_rendered += 1
        return self._inner.render(*arguments)

    def encode(self, text: str) -> list[int]:
        self.num_encoded += 1
        return self._inner.encode(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)


class ActingTokenizer(CountingTokenizer):
    """A tokenizer that acts on the checking process before it renders."""

    def __init__(self, inner: Tokenizer, action: Callable[[], None]) -> None:
        super().__init__(inner)
        self._action = action

    def render(self, *arguments: Any) -> list[int]:
        assert multiprocessing.parent_process() is not None
        self._action()
        return super().render(*arguments)

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self._inner, self._action)


def ask_to_stop() -> None:
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP):
        os.kill(os.getpid(), number)


def die() -> None:
    os._exit(9)


def test_a_role_that_the_template_refuses_is_found_at_opening(bpe_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(variant(bpe_folder, tmp_path / "t", chat_template=NO_SYSTEM))
    path = _write(tmp_path / "x.jsonl", [ROWS[0], {"prompt": SYSTEM, "answer": "1"}])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: prompt: .*Only user and assistant roles are supported!"):
        _open(path, tokenizer)


def test_messages_without_a_template_are_found_at_opening(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", [ROWS[0], {"prompt": SYSTEM, "answer": "1"}])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: prompt: .*chat_template=false"):
        _open(path, tokenizer, chat_template=False)


@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "{{ bos_token }}\n \n"])
def test_a_prompt_that_renders_to_nothing_is_found(bpe_folder: Path, tmp_path: Path, start: str) -> None:
    # This template leaves out roles that it does not know.
    template = start + "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"
    tokenizer = load_tokenizer(variant(bpe_folder, tmp_path / "t", chat_template=template))
    path = _write(tmp_path / "x.jsonl", [ROWS[0], {"prompt": SYSTEM[:1], "answer": "1"}])
    with pytest.raises(ValueError, match=r"x\.jsonl:2: prompt: renders to nothing but special tokens"):
        _open(path, tokenizer)


@pytest.mark.parametrize(
    ("trace", "problem"),
    [
        ("<|im_end|>", "has nothing but stop tokens"),
        ("<|im_end|>\n<|im_end|>\n", "has nothing but stop tokens"),
        ("one<|im_end|>two", "goes on after a stop token"),
    ],
)
def test_a_trace_that_no_rollout_could_be_is_found(
    tokenizer: Tokenizer, tmp_path: Path, trace: str, problem: str
) -> None:
    path = _write(tmp_path / "x.jsonl", [ROWS[0], {**ROWS[1], "traces": {"a/b": trace}}])
    with pytest.raises(ValueError, match=rf"x\.jsonl:2: the trace of 'a/b': {problem}"):
        _open(path, tokenizer)


def test_counts_are_those_of_the_tokenised_rows(tokenizer: Tokenizer, tmp_path: Path) -> None:
    dataset = _open(_write(tmp_path / "x.jsonl", ROWS), tokenizer)
    prompts, _ = PromptStream(dataset, tokenizer, DataConfig(shuffle=False), 1).take(0, 48)
    for row, prompt in enumerate(prompts):
        assert dataset.prompt_tokens(row) == len(prompt.tokens)
        counts = {name: dataset.checked.trace_tokens[i] for name, i in dataset.trace_indices(row).items()}
        assert counts == {name: len(trace) for name, trace in prompt.traces.items()}


def test_prompts_that_are_all_too_long_are_an_error_at_opening(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", ROWS)
    with pytest.raises(
        ValueError, match=r"^48 of 48 prompts are longer than data\.max_prompt_tokens=1: the shortest has"
    ):
        _open(path, tokenizer, max_prompt_tokens=1)


@pytest.mark.parametrize("field", ["traces", "source", "id", "verifier", "trace_checks"])
def test_a_column_that_the_config_names_and_no_row_has_is_an_error(
    tokenizer: Tokenizer, tmp_path: Path, field: str
) -> None:
    path = _write(tmp_path / "x.jsonl", ROWS)
    data = DataConfig(fields=DataFieldsConfig(**{field: "tracez"}))
    with pytest.raises(ValueError, match=rf"data\.fields\.{field}=tracez: no row of the prompt files has such a field"):
        open_prompts([path], data, tokenizer, cache_dir=tmp_path / "run")
    with pytest.raises(ValueError, match=rf"data\.fields\.{field}=tracez: no row"):
        open_prompts([path], data, tokenizer, cache_dir=tmp_path / "run")
    # One row with a null is enough. An evaluation set needs none.
    assert len(open_prompts([path], data, tokenizer, held_out=True)) == 48
    _write(path, [*ROWS, {**ROWS[0], "tracez": None}])
    assert len(open_prompts([path], data, tokenizer, cache_dir=tmp_path / "run")) == 49


def test_the_traces_of_a_held_out_set_are_not_read(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", [ROWS[0], {**ROWS[1], "traces": 3}])
    dataset = open_prompts([path], DataConfig(), tokenizer, held_out=True)
    assert (len(dataset), dataset.teachers) == (2, frozenset())


def test_traces_that_are_too_long_or_fail_a_check_are_said(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{**row, "is_right": {"r1": number > 3, "qwen/235B": True}} for number, row in enumerate(ROWS)]
    fields = DataFieldsConfig(trace_checks="is_right")
    _open(_write(tmp_path / "x.jsonl", rows), tokenizer, fields=fields, max_trace_tokens=30)
    assert "4 traces failed a check of data.fields.trace_checks" in caplog.text
    assert "of 92 teachers' traces are longer than data.max_trace_tokens=30" in caplog.text


def test_some_prompts_too_long_are_counted_and_stay_draws(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = _write(tmp_path / "x.jsonl", [*ROWS[:5], {"prompt": "long " * 400, "answer": "1"}, *ROWS[5:9]])
    with caplog.at_level(logging.WARNING):
        dataset = _open(path, tokenizer, max_prompt_tokens=100)
    assert "1 of 10 prompts are longer than data.max_prompt_tokens=100" in caplog.text
    assert (dataset.num_too_long, len(dataset)) == (1, 10)
    stream = PromptStream(dataset, tokenizer, DataConfig(max_prompt_tokens=100), 3)
    prompts, drops = stream.take(0, 30)
    assert sorted([*drops.too_long, *(prompt.order for prompt in prompts)]) == list(range(30))
    assert [position // 10 for position in drops.too_long] == [0, 1, 2]
    sharded = [stream.take(0, 30, shard, 4)[1] for shard in range(4)]
    assert sum(sharded, start=type(drops)()) == drops


def test_positions_of_long_prompts_come_in_order(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{"prompt": "long " * 400, "answer": str(i)} if i % 2 else ROWS[i] for i in range(20)]
    data = DataConfig(max_prompt_tokens=100)
    dataset = _open(_write(tmp_path / "x.jsonl", rows), tokenizer, max_prompt_tokens=100)
    _, drops = PromptStream(dataset, tokenizer, data, 1).take(5, 50)
    assert list(drops.too_long) == sorted(drops.too_long)
    assert len(set(drops.too_long)) == 25


@pytest.mark.parametrize("change", ["append", "replace", "delete"])
def test_a_file_that_changes_while_it_is_checked_is_an_error(tokenizer: Tokenizer, tmp_path: Path, change: str) -> None:
    path = _write(tmp_path / "x.jsonl", ROWS)

    class Changing(CountingTokenizer):
        def encode(self, text: str) -> list[int]:
            if self.num_encoded == 10 and change == "append":
                with path.open("a") as file:
                    file.write(json.dumps(ROWS[0]) + "\n")
            elif self.num_encoded == 10 and change == "replace":
                _write(tmp_path / "y.jsonl", ROWS).replace(path)
            elif self.num_encoded == 10:
                path.unlink()
            return super().encode(text)

    changing: Any = Changing(tokenizer)
    with pytest.raises(
        ValueError, match=r"x\.jsonl: (the file has changed|the file was replaced|cannot be read any more)"
    ):
        open_prompts([path], DataConfig(), changing, cache_dir=tmp_path / "run")
    assert not (tmp_path / "run" / "data_check").exists()


def test_a_prompt_known_to_be_too_long_is_never_tokenised_again(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [{**ROWS[0], "traces": {"r1": "x y " * 50}}, {"prompt": "long " * 400, "answer": "1"}]
    path = _write(tmp_path / "x.jsonl", rows)
    counting = CountingTokenizer(tokenizer)
    data = DataConfig(max_prompt_tokens=100, max_trace_tokens=20)
    dataset = open_prompts([path], data, counting)
    assert counting.num_rendered == 2
    encoded = counting.num_encoded
    prompts, drops = PromptStream(dataset, counting, data, 1).take(0, 10)
    assert (len(prompts), drops.prompts, drops.traces) == (5, 5, 5)
    assert counting.num_rendered == 2 + 5, "only the prompt that fits"
    assert counting.num_encoded == encoded, "the trace is known to be too long"


def test_a_second_opening_reads_what_the_first_found(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", ROWS)
    first = _open(path, tokenizer, tmp_path / "run")
    assert first.check_file is not None
    assert [file.suffix for file in (tmp_path / "run" / "data_check").iterdir()] == [".npz"]
    # The result for a row does not depend on limits, teachers and shuffling.
    data = DataConfig(max_prompt_tokens=50, teachers=("r1",), shuffle=False)
    counting: Any = CountingTokenizer(tokenizer)
    second = open_prompts([path], data, counting, cache_dir=tmp_path / "run")
    assert (counting.num_rendered, counting.num_encoded) == (0, 0)
    _assert_same(first.checked, second.checked)
    with pytest.raises(ValueError, match="48 of 48 prompts"):
        _open(path, tokenizer, tmp_path / "run", max_prompt_tokens=1)


@pytest.mark.parametrize("change", ["content", "name", "fields", "template", "chat_template", "stop ids", "row"])
def test_another_content_or_template_is_checked_anew(bpe_folder: Path, tmp_path: Path, change: str) -> None:
    folder = variant(bpe_folder, tmp_path / "t")
    path = _write(tmp_path / "x.jsonl", ROWS)
    data: dict[str, Any] = {}
    before = _open(path, load_tokenizer(folder), tmp_path / "run").check_file
    if change == "content":
        _write(path, ROWS[:-1])
    elif change == "name":
        path = path.rename(tmp_path / "y.jsonl")
    elif change == "fields":
        data["fields"] = DataFieldsConfig(source="prompt")
    elif change == "template":
        template = "<|im_start|>{{ messages[0].content }}"
        folder = variant(folder, tmp_path / "t2", chat_template=template)
    elif change == "chat_template":
        data["chat_template"] = False
    elif change == "stop ids":
        (folder / "generation_config.json").write_text('{"eos_token_id": [3]}')
    else:
        data["keep_row"] = True
    dataset = _open(path, load_tokenizer(folder), tmp_path / "run", **data)
    assert dataset.check_file != before
    fresh = _open(path, load_tokenizer(folder), None, **data)
    _assert_same(dataset.checked, fresh.checked)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 cut", b"PK\x05\x06" + bytes(18), None])
def test_a_damaged_result_is_said_and_made_anew(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes | None
) -> None:
    path = _write(tmp_path / "x.jsonl", ROWS)
    first = _open(path, tokenizer, tmp_path / "run")
    assert first.check_file is not None
    whole = first.check_file.read_bytes()
    first.check_file.write_bytes(whole[: len(whole) // 2] if damage is None else damage)
    again = _open(path, tokenizer, tmp_path / "run")
    assert f"{first.check_file} cannot be read" in caplog.text
    _assert_same(first.checked, again.checked)
    assert first.check_file.read_bytes() == whole


def test_several_processes_find_what_one_finds(tokenizer: Tokenizer, tmp_path: Path) -> None:
    rows = [
        *ROWS,
        "{not JSON}\n",
        {**ROWS[3], "id": "x.jsonl:2"},
        {"prompt": SYSTEM, "answer": {"a": 1}, "verifier": "v"},
    ]
    paths = [_write(tmp_path / "x.jsonl", rows), tmp_path / "y.parquet"]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:20]), paths[1], row_group_size=6)
    data = DataConfig()
    source = RowSource(paths, columns_of("plain", data.fields), keep_row=False)
    one = check_rows(source, tokenizer, data, num_processes=1)
    two = check_rows(source, tokenizer, data, num_processes=2)
    _assert_same(one, two)
    assert list(one.problems) == [48, 49]
    assert one.problems[49] == (f"id='x.jsonl:2': is the id of {paths[0]}:2 too",)


def _two_parts(tmp_path: Path) -> RowSource:
    path = tmp_path / "y.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS[:4]), path, row_group_size=2)
    return RowSource([path], columns_of("plain", DataFieldsConfig()), keep_row=False)


def test_signals_that_ask_the_run_to_stop_do_not_break_the_check(tokenizer: Tokenizer, tmp_path: Path) -> None:
    acting: Any = ActingTokenizer(tokenizer, ask_to_stop)
    source = _two_parts(tmp_path)
    checked = check_rows(source, acting, DataConfig(), num_processes=2)
    _assert_same(checked, check_rows(source, tokenizer, DataConfig()))
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_process_of_the_check_that_dies_is_said(tokenizer: Tokenizer, tmp_path: Path) -> None:
    acting: Any = ActingTokenizer(tokenizer, die)
    with pytest.raises(RuntimeError, match="a process that checked rows of the prompt files died"):
        check_rows(_two_parts(tmp_path), acting, DataConfig(), num_processes=2)


def test_a_damaged_row_group_ends_the_check_in_processes_too(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "x.parquet"
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist(ROWS), path, row_group_size=6, compression="none", write_page_checksum=True
    )
    content = path.read_bytes()
    at = content.index(b"What is 7")
    path.write_bytes(content[:at] + b"w" + content[at + 1 :])
    data = DataConfig()
    source = RowSource([path], columns_of("plain", data.fields), keep_row=False)
    for num_processes in (1, 2):
        with pytest.raises(ValueError, match=r"x\.parquet: row group 1 \(rows 7 to 12\) cannot be read") as caught:
            check_rows(source, tokenizer, data, num_processes=num_processes)
        assert cause_of(caught.value) is Cause.BAD_INPUT


def test_skipped_rows_are_counted_listed_and_no_part_of_the_data(
    tokenizer: Tokenizer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [
        ROWS[0],
        "{cut\n",
        ROWS[1],
        {**ROWS[2], "id": "x.jsonl:1"},
        {**ROWS[3], "answer": None, "prompt": ""},
        ROWS[4],
    ]
    path = _write(tmp_path / "x.jsonl", rows)
    dataset = _open(path, tokenizer, tmp_path / "run", on_bad_row="skip")
    assert [row.answer for row in dataset] == ["1", "2", "5"]
    assert f"3 of 6 rows are bad and left out; listed in {tmp_path / 'run' / 'bad_rows.jsonl'}" in caplog.text
    listed = [json.loads(line) for line in (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"], len(row["problems"])) for row in listed] == [
        (str(path), 2, 1),
        (str(path), 4, 1),
        (str(path), 5, 2),
    ]
    # Opening again reads the result, and drops nothing else.
    again = _open(path, tokenizer, tmp_path / "run", on_bad_row="skip")
    assert [row.prompt_id for row in again] == [row.prompt_id for row in dataset]
    stream = PromptStream(dataset, tokenizer, DataConfig(), 1)
    assert {prompt.answer for prompt in stream.take(0, 3)[0]} == {"1", "2", "5"}


def test_the_list_of_bad_rows_keeps_those_of_other_files(tokenizer: Tokenizer, tmp_path: Path) -> None:
    bad = {"prompt": "p"}
    train, held_out = (_write(tmp_path / name / "x.jsonl", [ROWS[0], bad]) for name in ("train", "test"))
    for path in (train, held_out, train):
        _open(path, tokenizer, tmp_path / "run", on_bad_row="skip")
    listed = (tmp_path / "run" / "bad_rows.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["file"] for line in listed) == sorted([str(train), str(held_out)])
    _write(train, [ROWS[0]])
    _write(held_out, [ROWS[0]])
    for path in (train, held_out):
        _open(path, tokenizer, tmp_path / "run", on_bad_row="skip")
    assert not (tmp_path / "run" / "bad_rows.jsonl").exists()


def test_the_list_of_bad_rows_makes_the_folder_that_it_lies_in(tmp_path: Path) -> None:
    source = RowSource([_write(tmp_path / "x.jsonl", ROWS)], columns_of("plain", DataFieldsConfig()), keep_row=False)
    settle_bad_rows({1: ["is bad"]}, source, "skip", tmp_path / "runs" / "first")
    assert json.loads((tmp_path / "runs" / "first" / "bad_rows.jsonl").read_text())["line"] == 2


def test_bad_rows_alone_are_an_error_even_where_they_are_skipped(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = _write(tmp_path / "x.jsonl", [{"prompt": "p"}, "oops\n"])
    with pytest.raises(ValueError, match="each of the 2 rows in the prompt files is bad"):
        _open(path, tokenizer, tmp_path / "run", on_bad_row="skip")


def test_fingerprints_tell_which_file_differs_in_what(tokenizer: Tokenizer, tmp_path: Path) -> None:
    a, b = _write(tmp_path / "a.jsonl", ROWS[:5]), _write(tmp_path / "b.jsonl", ROWS[5:9])
    old = _open([a, b], tokenizer).fingerprint()
    assert json.loads(json.dumps(old)) == old
    assert [(file["name"], file["rows"], file["skipped"]) for file in old] == [("a.jsonl", 5, 0), ("b.jsonl", 4, 0)]
    assert old[0]["bytes"] == a.stat().st_size
    assert compare_fingerprints(old, _open([a, b], tokenizer).fingerprint()) == []
    assert compare_fingerprints(old, _open([b, a], tokenizer).fingerprint()) == [
        "data.prompts: the files were a.jsonl, b.jsonl, in this order; now b.jsonl, a.jsonl"
    ]
    assert compare_fingerprints(old, _open([a], tokenizer).fingerprint()) == ["data.prompts: b.jsonl is gone"]
    _write(b, ROWS[5:10])
    _write(a, [*ROWS[:4], ROWS[20]])
    assert compare_fingerprints(old, _open([a, b], tokenizer).fingerprint()) == [
        "a.jsonl: has the same number of rows (5) with another content",
        "b.jsonl: had 4 rows, has 5",
    ]
    _write(a, [*ROWS[:4], {"prompt": "p"}])
    skipping = _open([a, b], tokenizer, on_bad_row="skip").fingerprint()
    assert compare_fingerprints(old, skipping)[1] == "a.jsonl: 0 bad rows skipped before, 1 now"


def test_the_same_files_with_other_skipped_rows_differ(tokenizer: Tokenizer, bpe_folder: Path, tmp_path: Path) -> None:
    refusing = load_tokenizer(variant(bpe_folder, tmp_path / "t", chat_template=NO_SYSTEM))
    short = [{"role": "user", "content": "Hi"}]
    path = _write(tmp_path / "x.jsonl", [ROWS[0], {"prompt": SYSTEM, "answer": "1"}, {"prompt": short, "answer": "1"}])
    old = _open(path, refusing, on_bad_row="skip").fingerprint()
    new = [{**old[0], "skipped_sha256": "0"}]
    assert compare_fingerprints(old, new) == ["x.jsonl: other rows are bad and skipped than before"]
    assert compare_fingerprints(old, _open(path, tokenizer).fingerprint()) == [
        "x.jsonl: 1 bad row skipped before, 0 now"
    ]


def _assert_same(a: Any, b: Any) -> None:
    assert vars(a).keys() == vars(b).keys()
    for name, value in vars(a).items():
        other = getattr(b, name)
        if isinstance(value, np.ndarray):
            assert value.dtype == other.dtype
            assert value.tolist() == other.tolist(), name
        else:
            assert value == other, name


class _Ids:
    """Rows whose ids are numbers."""

    columns = columns_of("plain", DataFieldsConfig())

    def __init__(self, ids: Sequence[int]) -> None:
        self._ids = ids

    def row(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(prompt_id=str(self._ids[index]))

    def place(self, index: int) -> str:
        return f"row {index}"


@settings(max_examples=200, deadline=None, database=None, derandomize=True)
@given(st.lists(st.integers(0, 6), max_size=12), st.sets(st.integers(0, 11)))
def test_all_but_the_first_row_of_an_id_are_bad(ids: list[int], bad: set[int]) -> None:
    bad = {row for row in bad if row < len(ids)}
    expected, first_of = {}, dict[int, int]()
    for row, one in enumerate(ids):
        if row not in bad and first_of.setdefault(one, row) != row:
            expected[row] = f"is the id of row {first_of[one]} too"
    # Two ids may have one digest.
    found = check._repeated_ids(np.array([one % 5 for one in ids], np.uint64), bad, _Ids(ids))  # type: ignore[arg-type]
    assert found.keys() == expected.keys()
    for row, (problem,) in found.items():
        assert problem.endswith(expected[row])


def test_the_search_for_repeated_ids_makes_no_object_for_each_row() -> None:
    digests = np.random.default_rng(0).permutation(500_000).astype(np.uint64)
    tracemalloc.start()
    try:
        assert check._repeated_ids(digests, set(), _Ids(())) == {}  # type: ignore[arg-type]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 40 * len(digests)
