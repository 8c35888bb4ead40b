"""Folders of published models: vocabulary and chat template from packages, settings as the models' files have them.

``tests/published_files.py`` finds the packages. Ids, names and flags below are facts of the models' tokenizer_config.json
and generation_config.json; no text of these files is here.
"""

from __future__ import annotations

import ast
import base64
import functools
import itertools
import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers.convert_slow_tokenizer import generate_merges

from tests.published_files import published_file

_QWEN_2_5 = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>"),
    *("<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>"),
    *("<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>"),
    *("<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
)
_QWEN_3 = (*_QWEN_2_5, "<tool_response>", "</tool_response>", "<think>", "</think>")
_R1_QWEN = (
    *("<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜begin▁of▁sentence｜>", "<|EOT|>", "<think>"),
    *("</think>", *_QWEN_2_5[7:]),
)
_R1_LLAMA = {
    0: "<｜begin▁of▁sentence｜>",
    1: "<｜end▁of▁sentence｜>",
    11: "<｜User｜>",
    12: "<｜Assistant｜>",
    13: "<think>",
    14: "</think>",
    15: "<｜▁pad▁｜>",
}
_ORDINARY = {
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>", "<|EOT|>"),
    *("<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>"),
    *("<｜User｜>", "<｜Assistant｜>"),
}
"""Added tokens that are not marked as special."""
_MATH_SYSTEM = r"Please reason step by step, and put your final answer within \\boxed{}."
"""System message of Qwen2.5-Math, as its template writes it."""


@dataclass(frozen=True, kw_only=True)
class Published:
    """One published model."""

    vocabulary: str
    """``qwen``, ``llama3``, or the name of a sentencepiece model of the package mistral-common."""
    template: str
    """Name of the chat template in trl, or of Mistral's in axolotl."""
    eos_token: str
    stops: tuple[int, ...]
    """``eos_token_id`` of generation_config.json."""
    added: tuple[str, ...] = ()
    """Tokens after the vocabulary, in the order of their ids."""
    bos_token: str | None = None
    tokenizer_class: str = "PreTrainedTokenizerFast"
    settings: dict[str, Any] = field(default_factory=dict)
    arguments: dict[str, Any] = field(default_factory=dict)
    """Values for the chat template."""
    edit: tuple[str, str] | None = None
    """A text of the template and what this model's own has in its place."""

    @property
    def tokenizer(self) -> str:
        """The same for models with the same tokenizer."""
        return f"{self.vocabulary}_{self.bos_token}_{len(self.added)}"

    @property
    def is_sentencepiece(self) -> bool:
        return self.vocabulary not in ("qwen", "llama3")


def _qwen(template: str, **other: Any) -> Published:
    values = {"added": _QWEN_3, "eos_token": "<|im_end|>", "stops": (151645, 151643), **other}
    return Published(vocabulary="qwen", template=template, tokenizer_class="Qwen2Tokenizer", **values)


def _llama(template: str, stops: tuple[int, ...], **other: Any) -> Published:
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    return Published(vocabulary="llama3", template=template, stops=stops, **names, **other)


def _r1(vocabulary: str, stop: int) -> Published:
    return Published(
        vocabulary=vocabulary,
        template="deepseek_r1_distill",
        added=_R1_QWEN if vocabulary == "qwen" else (),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        stops=(stop,),
        settings={"add_bos_token": True, "legacy": True},
    )


def _mistral(model: str, template: str) -> Published:
    return Published(
        vocabulary=model,
        template=template,
        bos_token="<s>",
        eos_token="</s>",
        stops=(2,),
        tokenizer_class="LlamaTokenizer",
        settings={"unk_token": "<unk>", "add_bos_token": True, "legacy": False},
    )


PUBLISHED = {
    "llama3_8b_instruct": _llama("llama3", (128001, 128009)),
    "llama3_1_8b_instruct": _llama("llama3_1", (128001, 128008, 128009)),
    "llama3_2_3b_instruct": _llama("llama3_2", (128001, 128008, 128009), arguments={"date_string": "26 Jul 2024"}),
    "mistral_7b_instruct_v0_2": _mistral("tokenizer.model.v1", "mistral_v1"),
    "mistral_7b_instruct_v0_3": _mistral("mistral_instruct_tokenizer_240323.model.v3", "mistral_v2v3"),
    "qwen2_5_7b_instruct": _qwen("qwen2_5", added=_QWEN_2_5),
    "qwen2_5_math_7b": _qwen(
        "qwen2_5",
        added=_QWEN_2_5,
        eos_token="<|endoftext|>",
        stops=(151643,),
        edit=("You are Qwen, created by Alibaba Cloud. You are a helpful assistant.", _MATH_SYSTEM),
    ),
    "qwen3_8b_base": _qwen("qwen3", eos_token="<|endoftext|>", stops=(151643,)),
    "qwen3_8b": _qwen("qwen3"),
    "qwen3_8b_without_thinking": _qwen("qwen3", arguments={"enable_thinking": False}),
    "qwen3_4b_instruct_2507": _qwen("qwen3_instruct_2507"),
    "qwen3_4b_thinking_2507": _qwen(
        "qwen3", edit=(r"{{- '<|im_start|>assistant\n' }}", r"{{- '<|im_start|>assistant\n<think>\n' }}")
    ),
    "r1_distill_qwen_7b": _r1("qwen", 151643),
    "r1_distill_llama_8b": _r1("llama3", 128001),
}


def write_published(folder: Path, name: str) -> Path:
    """Write the folder of a published model: tokenizer, tokenizer_config.json, generation_config.json.

    Folders beside each other share the files of a tokenizer that several models have.
    """
    model = PUBLISHED[name]
    folder.mkdir(parents=True)
    shared = folder.parent / f"tokenizer_of_{model.tokenizer}"
    if not shared.is_dir():
        shared.mkdir()
        _write_tokenizer(shared, model)
    for file in shared.iterdir():
        (folder / file.name).hardlink_to(file)
    config = {
        "tokenizer_class": model.tokenizer_class,
        "bos_token": model.bos_token,
        "eos_token": model.eos_token,
        "chat_template": read_template(model),
        "clean_up_tokenization_spaces": False,
        **model.settings,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": list(model.stops)}))
    return folder


def read_template(model: Published) -> str:
    """Return the chat template of a model."""
    if model.template.startswith("mistral"):
        file = published_file("axolotl", f"axolotl/utils/chat_templates/templates/{model.template}.jinja")
    else:
        file = published_file("trl", f"trl/chat_templates/{model.template}.jinja")
    text = file.read_text(encoding="utf-8")
    if model.edit is not None:
        before, after = model.edit
        assert before in text
        text = text.replace(before, after)
    return text


def sentencepiece_model(model: Published) -> Path:
    """Return the path of the published sentencepiece model."""
    return published_file("mistral-common", f"mistral_common/data/{model.vocabulary}")


@functools.cache
def read_ranks(vocabulary: str) -> dict[bytes, int]:
    """Return the bytes of each token → its id, of a vocabulary in tiktoken's format."""
    package, name = {
        "qwen": ("dashscope", "dashscope/resources/qwen.tiktoken"),
        "llama3": ("llama-models", "llama_models/llama3/tokenizer.model"),
    }[vocabulary]
    lines = published_file(package, name).read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines if line)}


@functools.cache
def read_pattern(vocabulary: str) -> str:
    """Return the regular expression that cuts a text into words, from the package's own tokenizer."""
    if vocabulary == "qwen":
        return _assigned("dashscope", "dashscope/tokenizers/qwen_tokenizer.py", "PAT_STR")
    return _assigned("llama-models", "llama_models/llama3/tokenizer.py", "pat_str")


def added_tokens(model: Published) -> list[str]:
    """Return the tokens that follow the vocabulary, in the order of their ids."""
    if model.vocabulary == "qwen":
        return list(model.added)
    named = _assigned("llama-models", "llama_models/llama3/tokenizer.py", "special_tokens")
    tokens = [*named, *(f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(named)))]
    if model.template == "deepseek_r1_distill":
        tokens = [_R1_LLAMA.get(i, token) for i, token in enumerate(tokens)]
    return tokens


def merge_bytes(word: bytes, ranks: dict[bytes, int], below: int) -> list[bytes]:
    """Return the parts of a word: pairs whose rank is under ``below`` are merged, the lowest rank first."""
    parts = [bytes([byte]) for byte in word]
    while len(parts) > 1:
        found = [ranks.get(left + right, below) for left, right in itertools.pairwise(parts)]
        lowest = min(found)
        if lowest >= below:
            break
        at = found.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return parts


def _assigned(package: str, name: str, variable: str) -> Any:
    """Return the first literal that a Python file assigns to a variable; the file is not run."""
    tree = ast.parse(published_file(package, name).read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == variable
    )


@functools.cache
def _vocabulary(vocabulary: str) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Return what a byte-level BPE of the tokenizers library is made of: token → id, and the merges in order."""
    ranks = read_ranks(vocabulary)
    # GPT-2's alphabet: printable bytes are themselves, the others the characters from 256 on.
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    char = [chr(byte if byte in printable else next(others)) for byte in range(256)]
    text = {token: "".join(char[byte] for byte in token) for token in ranks}
    pairs = (merge_bytes(token, ranks, rank) for token, rank in ranks.items() if len(token) > 1)
    # A few tokens of Llama 3 no merge leads to; ignore_merges is for these.
    merges = [(text[pair[0]], text[pair[1]]) for pair in pairs if len(pair) == 2]
    return {text[token]: rank for token, rank in ranks.items()}, merges


def _write_tokenizer(folder: Path, model: Published) -> None:
    if model.is_sentencepiece:
        shutil.copyfile(sentencepiece_model(model), folder / "tokenizer.model")
        tokenizer = convert_sentencepiece(folder / "tokenizer.model")
    else:
        tokenizer = _from_ranks(model)
    if model.bos_token is not None:
        bos = (model.bos_token, tokenizer.token_to_id(model.bos_token))
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{model.bos_token} $A", pair=f"{model.bos_token} $A {model.bos_token} $B", special_tokens=[bos]
        )
    tokenizer.save(str(folder / "tokenizer.json"))


def _from_ranks(model: Published) -> Tokenizer:
    vocabulary, merges = _vocabulary(model.vocabulary)
    is_llama = model.vocabulary == "llama3"
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, ignore_merges=is_llama))
    if not is_llama:
        tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(read_pattern(model.vocabulary)), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(text, normalized=False, special=text not in _ORDINARY) for text in added_tokens(model)]
    )
    return tokenizer


def convert_sentencepiece(file: Path) -> Tokenizer:
    """Return the tokenizer.json that goes with a sentencepiece model, as transformers 4 made the published ones."""
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    pieces = [model.id_to_piece(i) for i in range(model.vocab_size())]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    merges = generate_merges(vocabulary, {piece: model.get_score(i) for piece, i in vocabulary.items()})
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    control = [piece for i, piece in enumerate(pieces) if i == model.unk_id() or model.is_control(i)]
    tokenizer.add_special_tokens([AddedToken(piece, normalized=False, special=True) for piece in control])
    return tokenizer
