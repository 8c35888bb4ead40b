"""The last line of a file without a line break: it counts as cut off only if its JSON ends too early."""

from pathlib import Path

import pytest

from megatron_dypo.data.dataset import PromptDataset

ROW = b'{"prompt": "p", "answer": "1"}\n'


@pytest.mark.parametrize(
    ("last", "is_cut"),
    [
        (b'{"prompt": "p", "ans', True),
        (b'{"prompt": "p", "prompt": "q", "answer": "1"}', False),
        (b'{"prompt": "p", "answer": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", False),
    ],
    ids=["cut", "key twice", "deep"],
)
def test_only_json_that_does_not_parse_is_said_to_be_cut_off(last: bytes, is_cut: bool, tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_bytes(ROW + last)
    with pytest.raises(ValueError, match=r"p\.jsonl:2: ") as error:
        PromptDataset([path])
    assert ("cut off" in str(error.value)) == is_cut
