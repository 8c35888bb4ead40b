"""Published models: vocabulary and chat template from packages, settings as the models' files have them.

``tests/support/published_files.py`` finds the packages. Ids, names and flags below are facts of the models'
tokenizer_config.json and generation_config.json; no text of these files is here.
"""

from __future__ import annotations

import ast
import base64
import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support.published_files import published_file

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
ORDINARY = {
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
    """(Text of the template, text that this model's own template has instead)."""

    @property
    def tokenizer(self) -> str:
        """Return a name that models with the same tokenizer share."""
        return f"{self.vocabulary}_{self.bos_token}_{len(self.added)}"

    @property
    def is_sentencepiece(self) -> bool:
        return self.vocabulary not in ("qwen", "llama3")


def _qwen(template: str, **other: Any) -> Published:
    values = {"added": _QWEN_3, "eos_token": "<|im_end|>", "stops": (151645, 151643), **other}
    return Published(vocabulary="qwen", template=template, tokenizer_class="Qwen2Tokenizer", **values)


def _llama(template: str, stops: tuple[int, ...], **other: Any) -> Published:
    names: dict[str, Any] = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
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
    """Return bytes of a token → id, for a vocabulary in tiktoken's format."""
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


def _assigned(package: str, name: str, variable: str) -> Any:
    """Return the first literal that a Python file assigns to a variable; the file is not run."""
    tree = ast.parse(published_file(package, name).read_text(encoding="utf-8"))
    return next(
        ast.literal_eval(node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == variable
    )
