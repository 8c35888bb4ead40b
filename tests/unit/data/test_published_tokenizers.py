"""Published tokenizers and templates against transformers, naive byte merging, sentencepiece and mistral-common.

The files come from the packages of ``requirements/test_data.txt``: tests/unit/models_real/README.md says which,
and which models are not covered.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import pytest
import regex
import transformers

from megatron_dypo.data.prompts import end_trace
from megatron_dypo.data.tokenizer.chat import ChatTemplate
from megatron_dypo.data.tokenizer.open import Tokenizer, load_tokenizer
from tests.golden.render_chats import CHATS
from tests.golden.render_published import GOLDEN, render
from tests.support.independent_encoders import by_byte_pairs, by_sentencepiece
from tests.support.published_families import PUBLISHED, Published, read_template
from tests.support.published_folders import write_published

CONVERSATIONS = {
    **CHATS,
    "thought": [
        {"role": "system", "content": " Be brief.\n"},
        {"role": "user", "content": "What is\n\n1 + 2?"},
        {"role": "assistant", "content": "<think>\nOne and two.\n</think>\n\nIt is 3."},
        {"role": "user", "content": "Write <|im_end|>, <|eot_id|>, </s> and <think> in a row."},
    ],
}
_PIECES = (
    *(
        "a",
        "The",
        "naïve",
        "e\u0301",
        "ﬁ",
        "İ",
        "ß",
        "十",
        "漢字",
        "हिन्दी",
        "العربية",
        "ไทย",
        "👩\u200d🔬",
        "🇪🇺",
        "\u200b",
        "\ufeff",
    ),
    *(" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u2003", "▁", "'s", "'LL", "don't", "1", "2024", "3.14", "1,000"),
    *("\\boxed{", "}", "$", "x^2", "def f(x):", "\x00", "\x7f", "\U0010ffff", "<|im_end|>", "<|eot_id|>", "</s>"),
    *("<s>", "<unk>", "<think>", "</think>", "[INST]", "<｜User｜>", "<|endoftext|>", "<|reserved_special_token_7|>"),
)
_RANDOM = random.Random(5)
TEXTS = (
    "",
    "Hello world",
    " lead and trail ",
    "a    b\n\n\n  c \t\t d",
    "0123456789 12 345 6789 1e-19",
    "<|im_start|>user\n<|im_start|><|im_end|>",
    "<think>\n\n</think>\n\n\\boxed{\\frac{1}{2}}",
    "e\u0301 is \u00e9, Å is A\u030a, \u2126 is \u03a9",
    " việc hợp nhiều nghiệm .:.:",
    "word" * 300,
    " " * 400 + "x" + "\n" * 300,
    *("".join(_RANDOM.choices(_PIECES, k=_RANDOM.randint(2, 30))) for _ in range(100)),
)
STOPS = {
    "llama3_8b_instruct": {"<|eot_id|>": 128009, "<|end_of_text|>": 128001},
    "llama3_1_8b_instruct": {"<|eot_id|>": 128009, "<|end_of_text|>": 128001, "<|eom_id|>": 128008},
    "llama3_2_3b_instruct": {"<|eot_id|>": 128009, "<|end_of_text|>": 128001, "<|eom_id|>": 128008},
    "mistral_7b_instruct_v0_2": {"</s>": 2},
    "mistral_7b_instruct_v0_3": {"</s>": 2},
    "r1_distill_qwen_7b": {"<｜end▁of▁sentence｜>": 151643},
    "r1_distill_llama_8b": {"<｜end▁of▁sentence｜>": 128001},
}
_QWEN_STOPS = {"<|im_end|>": 151645, "<|endoftext|>": 151643}


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """A published model's tokenizer, read by this package and by transformers."""

    name: str
    folder: Path
    model: Published
    ours: Tokenizer
    theirs: transformers.PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module", params=PUBLISHED)
def loaded(request: pytest.FixtureRequest, root: Path) -> Loaded:
    name = request.param
    model = PUBLISHED[name]
    folder = write_published(root / name, name)
    theirs = _theirs(root / f"tokenizer_of_{model.tokenizer}", folder)
    theirs.chat_template = read_template(model)
    ours = load_tokenizer(folder, chat_template_args=model.arguments)
    return Loaded(name=name, folder=folder, model=model, ours=ours, theirs=theirs)


_SHARED: dict[Path, transformers.PreTrainedTokenizerFast] = {}


def _theirs(shared: Path, folder: Path) -> transformers.PreTrainedTokenizerFast:
    """Load the tokenizer by transformers, once for the models that share it. Only the last one is kept."""
    if shared not in _SHARED:
        _SHARED.clear()
        _SHARED[shared] = transformers.AutoTokenizer.from_pretrained(folder)
    return _SHARED[shared]


@pytest.mark.parametrize("chat", CONVERSATIONS)
def test_a_prompt_has_the_ids_that_transformers_gives(loaded: Loaded, chat: str) -> None:
    expected = loaded.theirs.apply_chat_template(
        CONVERSATIONS[chat], tools=None, add_generation_prompt=True, return_dict=False, **loaded.model.arguments
    )
    assert loaded.ours.render(CONVERSATIONS[chat], True) == expected


@pytest.mark.parametrize("chat", CONVERSATIONS)
def test_a_conversation_has_the_text_that_transformers_gives(loaded: Loaded, chat: str) -> None:
    tokens = {"bos_token": loaded.model.bos_token or "", "eos_token": loaded.model.eos_token}
    template = ChatTemplate(read_template(loaded.model), tokens, "here", loaded.model.arguments)
    for for_generation in (False, True):
        expected = loaded.theirs.apply_chat_template(
            CONVERSATIONS[chat],
            tools=None,
            add_generation_prompt=for_generation,
            tokenize=False,
            **loaded.model.arguments,
        )
        assert template.render(CONVERSATIONS[chat], for_generation=for_generation) == expected


def test_the_published_stop_tokens_end_a_response(loaded: Loaded) -> None:
    expected = STOPS.get(loaded.name, _QWEN_STOPS)
    assert loaded.ours.eos_ids == tuple(expected.values())
    assert [loaded.ours.encode(text) for text in expected] == [[token_id] for token_id in expected.values()]


def test_prompts_and_targets_are_those_of_the_golden_file(loaded: Loaded) -> None:
    golden = dict(part.split("\n", 1) for part in GOLDEN.read_text(encoding="utf-8").split("== ")[1:])
    assert list(golden) == list(PUBLISHED)
    ours = render(loaded.name, loaded.ours).split("\n", 1)[1]
    assert ours.strip() == golden[loaded.name].strip()


def test_a_text_has_the_ids_and_comes_back_as_in_transformers(loaded: Loaded) -> None:
    for text in TEXTS:
        ids = loaded.ours.encode(text)
        assert ids == loaded.theirs.encode(text, add_special_tokens=False), text
        assert loaded.ours.decode(ids) == loaded.theirs.decode(ids, skip_special_tokens=True), text
        assert loaded.ours.show(ids) == loaded.theirs.decode(ids), text
        begun = loaded.ours.encode(loaded.model.bos_token) if loaded.model.bos_token else []
        if ids[:1] != begun:
            assert loaded.ours.render(text, False) == loaded.theirs.encode(text), text


def test_a_text_has_the_ids_that_naive_byte_merging_or_sentencepiece_gives(loaded: Loaded) -> None:
    is_sentencepiece = loaded.model.is_sentencepiece
    ours = load_tokenizer(loaded.folder / "tokenizer.model", chat_template=False) if is_sentencepiece else loaded.ours
    special, encode = by_sentencepiece(loaded.model) if is_sentencepiece else by_byte_pairs(loaded.model)
    split = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
    for text in TEXTS:
        expected: list[int] = []
        for part in split.split(text):
            expected += [special[part]] if part in special else encode(part, not expected)
        assert ours.encode(text) == expected, text


MISTRAL_IDS = {
    (
        "mistral_7b_instruct_v0_2",
        "user",
    ): "1 733 16289 28793 28705 1824 349 28705 28740 648 28705 28750 28804 28705 733 28748 16289 28793",
    (
        "mistral_7b_instruct_v0_2",
        "system",
    ): "1 733 16289 28793 1739 6817 28723 13 13 3195 349 28705 28740 648 28705 28750 28804 733 28748 16289 28793",
    (
        "mistral_7b_instruct_v0_2",
        "turns",
    ): "1 733 16289 28793 1824 349 28705 28740 648 28705 28750 28804 733 28748 16289 "
    "28793 28705 28770 2 733 16289 28793 1015 28705 28770 648 28705 28781 28804 733 28748 16289 28793",
    ("mistral_7b_instruct_v0_3", "user"): "1 3 29473 2592 1117 29473 29508 1416 29473 29518 29572 29473 4",
    (
        "mistral_7b_instruct_v0_3",
        "system",
    ): "1 3 2507 7585 29491 781 781 3963 1117 29473 29508 1416 29473 29518 29572 4",
    (
        "mistral_7b_instruct_v0_3",
        "turns",
    ): "1 3 2592 1117 29473 29508 1416 29473 29518 29572 4 29473 29538 2 3 1783 29473 29538 1416 29473 29549 29572 4",
}
"""Ids of prompts as mistral-common 1.13.1, imported in an environment of its own, encodes the conversations."""


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer.model"])
@pytest.mark.parametrize("name", ["mistral_7b_instruct_v0_2", "mistral_7b_instruct_v0_3"])
def test_a_prompt_for_mistral_has_the_ids_of_its_makers_own_encoder(root: Path, name: str, file: str) -> None:
    tokenizer = load_tokenizer(write_published(root / f"{name}_{file}", name) / file)
    for chat in CHATS:
        assert tokenizer.render(CHATS[chat], True) == [int(token_id) for token_id in MISTRAL_IDS[name, chat].split()]


WITH_THINKING = ("qwen3_8b_base", "qwen3_8b", "qwen3_4b_thinking_2507")
"""Models whose template keeps the thinking of the last answer; R1-Distill's template drops it."""


def test_a_prompt_and_its_trace_are_the_finished_conversation_of_transformers(loaded: Loaded) -> None:
    answer = "It is \\boxed{3}."
    if loaded.name in WITH_THINKING:
        answer = f"<think>\nOne and two.\n</think>\n\n{answer}"
    chat = [*CHATS["turns"], {"role": "assistant", "content": answer}]
    finished = loaded.theirs.apply_chat_template(chat, return_dict=False, **loaded.model.arguments)
    prompt = loaded.ours.render(CHATS["turns"], True)
    if loaded.model.template == "deepseek_r1_distill":
        opened = loaded.ours.encode("<think>\n")
        assert prompt[-len(opened) :] == opened
        prompt = prompt[: -len(opened)]
    ids = [*prompt, *end_trace(answer, loaded.ours, prompt).tolist()]
    assert ids == finished[: len(ids)]
    assert loaded.ours.show(finished[len(ids) :]) in ("", "\n")
