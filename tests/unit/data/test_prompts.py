"""The stream of prompts: order, shards, cursor, lengths; and its files."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_dypo.config.data import DataConfig, DataFieldsConfig
from megatron_dypo.data.prompts import PromptDataset, PromptStream, epoch_order
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer

NO_TOKENIZER: Any = None
ROWS: list[dict[str, Any]] = [
    {
        "prompt": f"What is {i} + 1?",
        "answer": i + 1,
        "traces": {"r1": f"{i} + 1 = {i + 1}", "terse": None if i % 3 else f"{i + 1}"},
    }
    for i in range(23)
]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list, row_group_size: int = 5) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=row_group_size)
    return path


@pytest.fixture(scope="module")
def tokenizer(bpe_folder: Path) -> Tokenizer:
    return load_tokenizer(bpe_folder)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PromptDataset]:
    folder = tmp_path_factory.mktemp("prompts")
    paths = [write_jsonl(folder / "a.jsonl", ROWS[:9]), write_parquet(folder / "b.parquet", ROWS[9:])]
    opened = PromptDataset(paths)
    yield opened
    opened.close()


def _stream(dataset: PromptDataset, tokenizer: Tokenizer, seed: int = 1, **changes: Any) -> PromptStream:
    return PromptStream(dataset, tokenizer, DataConfig(**changes), seed)


def _key(prompts: list) -> list:
    return [
        (p.order, p.visit, p.prompt_id, p.text, {name: trace.tolist() for name, trace in p.traces.items()})
        for p in prompts
    ]


def test_rows_of_both_formats_read_the_same(tmp_path: Path) -> None:
    jsonl = PromptDataset([write_jsonl(tmp_path / "x.jsonl", ROWS)])
    parquet = PromptDataset([write_parquet(tmp_path / "x.parquet", ROWS)])
    assert len(jsonl) == len(parquet) == len(ROWS)
    for row, (a, b) in enumerate(zip(jsonl, parquet, strict=True)):
        assert (a.prompt, a.answer, a.source, a.traces) == (b.prompt, b.answer, b.source, b.traces)
        assert (a.prompt_id, b.prompt_id) == (f"x.jsonl:{row + 1}", f"x.parquet:{row + 1}")
    assert jsonl.teachers == parquet.teachers == {"r1", "terse"}


def test_rows_can_be_read_in_any_order(dataset: PromptDataset) -> None:
    order = random.Random(0).sample(range(len(dataset)), len(dataset))
    assert [dataset[row].prompt for row in order] == [ROWS[row]["prompt"] for row in order]


@settings(max_examples=40, deadline=None)
@given(start=st.integers(0, 60), count=st.integers(0, 60), num_shards=st.integers(1, 5), seed=st.integers(0, 2**40))
def test_shards_partition_the_draws(
    dataset: PromptDataset, tokenizer: Tokenizer, start: int, count: int, num_shards: int, seed: int
) -> None:
    stream = _stream(dataset, tokenizer, seed)
    whole, _ = stream.take(start, count)
    shards = [stream.take(start, count, shard, num_shards)[0] for shard in range(num_shards)]
    assert all(p.order % num_shards == shard for shard in range(num_shards) for p in shards[shard])
    assert _key(sorted((p for shard in shards for p in shard), key=lambda p: p.order)) == _key(whole)
    assert [p.order for p in whole] == list(range(start, start + count))


@settings(max_examples=30, deadline=None)
@given(cursor=st.integers(0, 50), seed=st.integers(0, 9))
def test_a_stream_resumed_at_any_cursor_draws_the_same(
    dataset: PromptDataset, tokenizer: Tokenizer, cursor: int, seed: int
) -> None:
    whole, _ = _stream(dataset, tokenizer, seed).take(0, 60)
    resumed, _ = _stream(dataset, tokenizer, seed).take(cursor, 60 - cursor)
    assert _key(resumed) == _key(whole[cursor:])


def test_every_epoch_visits_every_row_once_in_its_own_order(dataset: PromptDataset, tokenizer: Tokenizer) -> None:
    stream, size = _stream(dataset, tokenizer), len(dataset)
    epochs = [stream.take(epoch * size, size)[0] for epoch in range(3)]
    for epoch, prompts in enumerate(epochs):
        assert {p.visit for p in prompts} == {epoch}
        assert len({p.prompt_id for p in prompts}) == size
    orders = [[p.prompt_id for p in prompts] for prompts in epochs]
    assert orders[0] != orders[1] != orders[2] != orders[0]
    other, _ = _stream(dataset, tokenizer, seed=2).take(0, size)
    assert [p.prompt_id for p in other] != orders[0]


def test_the_epoch_order_is_the_same_in_another_process_and_in_every_version() -> None:
    code = "from megatron_dypo.data.prompts import epoch_order; print(epoch_order(7, 10, 3).tolist())"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    # A change here would make resumed runs draw other prompts than they should.
    assert json.loads(output) == epoch_order(7, 10, 3).tolist() == [4, 5, 1, 0, 8, 3, 6, 9, 2, 7]


def test_without_shuffling_rows_come_in_file_order(dataset: PromptDataset, tokenizer: Tokenizer) -> None:
    prompts, _ = _stream(dataset, tokenizer, shuffle=False, chat_template=False).take(20, 6)
    assert [p.text for p in prompts] == [ROWS[row % 23]["prompt"] for row in range(20, 26)]
    assert [p.visit for p in prompts] == [0, 0, 0, 1, 1, 1]


def test_prompts_are_tokenised_with_template_and_traces_with_eos(dataset: PromptDataset, tokenizer: Tokenizer) -> None:
    prompts, drops = _stream(dataset, tokenizer, shuffle=False).take(0, 4)
    assert (drops.prompts, drops.traces) == (0, 0)
    assert prompts[0].tokens.dtype == np.int32
    assert prompts[0].tokens.tolist() == tokenizer.render(ROWS[0]["prompt"], True)
    assert prompts[0].answer == "1"
    assert prompts[0].source == "a"
    assert [sorted(p.traces) for p in prompts] == [["r1", "terse"], ["r1"], ["r1"], ["r1", "terse"]]
    assert prompts[0].traces["terse"].tolist() == [*tokenizer.encode("1"), tokenizer.eos_id]


def test_only_the_chosen_teachers_are_used(dataset: PromptDataset, tokenizer: Tokenizer) -> None:
    prompts, _ = _stream(dataset, tokenizer, teachers=("terse",), shuffle=False).take(0, 4)
    assert [sorted(p.traces) for p in prompts] == [["terse"], [], [], ["terse"]]
    with pytest.raises(ValueError, match=r"data\.teachers=\['tersee'\].*r1, terse"):
        _stream(dataset, tokenizer, teachers=("r1", "tersee"))


def test_overlong_prompts_and_traces_are_counted_and_never_cut(tmp_path: Path, tokenizer: Tokenizer) -> None:
    rows = [
        {"prompt": "a" * 5, "answer": "1", "traces": {"t": "b" * 6, "u": "c" * 7}},
        {"prompt": "a" * 6, "answer": "1", "traces": {"t": "b", "u": "c" * 9}},
        {"prompt": "q", "answer": "1"},
    ]
    stream = _stream(
        PromptDataset([write_jsonl(tmp_path / "x.jsonl", rows)]),
        tokenizer,
        chat_template=False,
        shuffle=False,
        max_prompt_tokens=len(tokenizer.encode("a" * 5)),
        max_trace_tokens=len(tokenizer.encode("b" * 6)) + 1,  # EOS counts
    )
    prompts, drops = stream.take(0, 3)
    assert [(p.order, p.text, sorted(p.traces)) for p in prompts] == [(0, "aaaaa", ["t"]), (2, "q", [])]
    assert (drops.prompts, drops.traces) == (1, 1)
    twice, drops_twice = stream.take(0, 6)
    assert len(twice) == 4
    assert drops.too_long == (1,)
    assert drops_twice.too_long == (1, 4)
    assert (drops_twice.prompts, drops_twice.traces) == (2, 2)


def test_an_evaluation_set_is_read_in_file_order_without_traces(dataset: PromptDataset, tokenizer: Tokenizer) -> None:
    stream = _stream(dataset, tokenizer, max_trace_tokens=1)
    prompts, drops = stream.all(12)
    assert [p.answer for p in prompts] == [str(i + 1) for i in range(12)]
    assert all(not p.traces for p in prompts)
    assert (drops.prompts, drops.traces) == (0, 0)
    assert len(stream.all()[0]) == 23


def test_chat_messages_come_from_both_formats(tmp_path: Path, tokenizer: Tokenizer) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    rows = [{"prompt": chat, "answer": "x", "id": 5, "source": "s"}]
    for path in (write_jsonl(tmp_path / "x.jsonl", rows), write_parquet(tmp_path / "x.parquet", rows)):
        (prompt,), _ = _stream(PromptDataset([path]), tokenizer).take(0, 1)
        assert prompt.tokens.tolist() == tokenizer.render(chat, True)
        assert (prompt.prompt_id, prompt.source) == ("5", "s")
        with pytest.raises(ValueError, match=r"prompt 5: .*chat_template=false"):
            _stream(PromptDataset([path]), tokenizer, chat_template=False).take(0, 1)


def test_parquet_maps_are_traces(tmp_path: Path) -> None:
    traces = pyarrow.array([[("r1", "x"), ("r2", None)], None], pyarrow.map_(pyarrow.string(), pyarrow.string()))
    table = pyarrow.table({"prompt": ["p", "q"], "answer": [1.5, 2.0], "traces": traces})
    pyarrow.parquet.write_table(table, tmp_path / "x.parquet")
    dataset = PromptDataset([tmp_path / "x.parquet"])
    assert [(row.answer, dict(row.traces)) for row in dataset] == [("1.5", {"r1": "x"}), ("2.0", {})]


def test_fields_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"question": "q", "gold": "7", "unique_id": "u/1", "prompt": 3}]
    fields = DataFieldsConfig(prompt="question", answer="gold", id="unique_id")
    for path in (write_jsonl(tmp_path / "x.jsonl", rows), write_parquet(tmp_path / "x.parquet", rows)):
        row = PromptDataset([path], fields)[0]
        assert (row.prompt, row.answer, row.prompt_id) == ("q", "7", "u/1")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda p: PromptStream(PromptDataset([write_jsonl(p / "x.jsonl", [])]), NO_TOKENIZER, DataConfig(), 1),
            "x.jsonl: is empty",
        ),
        (lambda p: PromptStream(PromptDataset([]), NO_TOKENIZER, DataConfig(), 1), "hold no rows"),
        (lambda p: PromptDataset([p / "no.jsonl"]), "no such file"),
        (lambda p: PromptDataset([write_jsonl(p / "x.txt", ROWS)]), "must end in .jsonl or .parquet"),
        (lambda p: PromptDataset([write_jsonl(p / "x.parquet", ROWS)]), "is not a Parquet file"),
        (lambda p: PromptDataset([write_parquet(p / "x.parquet", [{"prompt": "a"}])]), "has no column answer"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(tmp_path)


def test_memory_does_not_grow_with_the_rows(tmp_path: Path) -> None:
    path = tmp_path / "big.jsonl"
    row = json.dumps({"prompt": "x" * 1000, "answer": "1"}) + "\n"
    with path.open("w") as file:
        file.writelines(row for _ in range(8_000))
    tracemalloc.start()
    dataset = PromptDataset([path])
    kept, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(dataset) == 8_000
    assert kept < 40 * len(dataset) + 2**16, "the index holds more than a few words a row"
