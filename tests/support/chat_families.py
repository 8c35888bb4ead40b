"""Chat templates in the manner of published families, each with a tiny tokenizer that has the same special tokens.

The templates are written for these tests. For plain conversations they give the same text as the published templates
(``test_published_templates.py`` compares them).
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

LLAMA_2 = """{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}
{% set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}
{% else %}{% set rest = messages %}{% set system = '' %}{% endif %}
{% for m in rest %}
{% if (m.role == 'user') != (loop.index0 is even) %}{{ raise_exception('roles must alternate') }}{% endif %}
{% set text = system ~ m.content if loop.first else m.content %}
{% if m.role == 'user' %}{{ bos_token ~ '[INST] ' ~ text.strip() ~ ' [/INST]' }}
{%- else %}{{ ' ' ~ text.strip() ~ ' ' ~ eos_token }}{% endif %}
{% endfor %}"""

LLAMA_3 = """{{ bos_token }}{% for m in messages %}
{{ '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content.strip() ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

LLAMA_3_1 = """{% set system = messages[0].content.strip() if messages[0].role == 'system' else '' %}
{% set today = date_string if date_string is defined else strftime_now('%d %b %Y') %}
{{ bos_token ~ '<|start_header_id|>system<|end_header_id|>\\n\\nCutting Knowledge Date: December 2023\\nToday Date: ' }}
{{- today ~ '\\n\\n' ~ system ~ '<|eot_id|>' }}
{%- for m in messages if m.role != 'system' %}
{{- '<|start_header_id|>' ~ m.role ~ '<|end_header_id|>\\n\\n' ~ m.content.strip() ~ '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""

MISTRAL = """{{ bos_token }}{% for m in messages %}
{% if m.role not in ('user', 'assistant') or (m.role == 'user') != (loop.index0 is even) %}
{{ raise_exception('only user and assistant, in turn') }}{% endif %}
{{ '[INST] ' ~ m.content ~ ' [/INST]' if m.role == 'user' else m.content ~ eos_token }}
{%- endfor %}"""

_CHATML = """{% for m in messages %}{{ '<|im_start|>' ~ m.role ~ '\\n' ~ m.content ~ '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""

QWEN_2_5_MATH = (
    """{% if messages[0].role != 'system' %}
{{ '<|im_start|>system\\nPlease reason step by step, and put your final answer within \\\\boxed{}.<|im_end|>\\n' }}
{%- endif %}"""
    + _CHATML
)

QWEN_3 = """{% for m in messages %}
{% set text = m.content.split('</think>')[-1].lstrip('\\n') if m.role == 'assistant' else m.content %}
{% set thought = '<think>\\n\\n</think>\\n\\n' if m.role == 'assistant' and loop.last else '' %}
{{ '<|im_start|>' ~ m.role ~ '\\n' ~ thought ~ text ~ '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}{% endif %}"""

QWEN_3_THINKING = QWEN_3.partition("{%- if add_generation_prompt")[0] + (
    "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"
)

R1_DISTILL = """{{ bos_token }}{% for m in messages if m.role == 'system' %}{{ m.content }}{% endfor %}
{% for m in messages %}
{% if m.role == 'user' %}{{ '<｜User｜>' ~ m.content }}
{%- elif m.role == 'assistant' %}
{{- '<｜Assistant｜>' ~ m.content.split('</think>')[-1] ~ '<｜end▁of▁sentence｜>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<｜Assistant｜><think>\\n' }}{% endif %}"""

HARMONY = """{% for m in messages %}
{% if m.role == 'assistant' %}{{ '<|start|>assistant<|channel|>final<|message|>' ~ m.content }}
{{- '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}
{%- else %}{{ '<|start|>' ~ m.role ~ '<|message|>' ~ m.content ~ '<|end|>' }}{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"""


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family's template and special tokens."""

    template: str
    special: tuple[str, ...]
    """Special tokens; their ids begin at 256, after the bytes."""
    eos_token: str
    bos_token: str | None = None
    stops: tuple[str, ...] = ()
    """Tokens of ``eos_token_id`` in generation_config.json."""
    arguments: dict[str, Any] = field(default_factory=dict)
    ordinary: tuple[str, ...] = ()
    """Tokens that are added, but not special."""


_LLAMA_3_TOKENS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
_CHATML_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_THINK = ("<think>", "</think>")
FAMILIES = {
    "llama2": Family(
        template=LLAMA_2, special=("<unk>", "<s>", "</s>"), bos_token="<s>", eos_token="</s>", stops=("</s>",)
    ),
    "llama3": Family(
        template=LLAMA_3,
        special=_LLAMA_3_TOKENS,
        bos_token="<|begin_of_text|>",
        eos_token="<|end_of_text|>",
        stops=("<|end_of_text|>", "<|eot_id|>"),
    ),
    "llama3_1": Family(
        template=LLAMA_3_1,
        special=(*_LLAMA_3_TOKENS, "<|eom_id|>"),
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        stops=("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
        arguments={"date_string": "26 Jul 2024"},
    ),
    "mistral": Family(template=MISTRAL, special=("<unk>", "<s>", "</s>"), bos_token="<s>", eos_token="</s>"),
    "qwen2_5_math": Family(
        template=QWEN_2_5_MATH, special=_CHATML_TOKENS, eos_token="<|endoftext|>", stops=("<|endoftext|>",)
    ),
    "qwen3": Family(
        template=QWEN_3,
        special=_CHATML_TOKENS,
        eos_token="<|im_end|>",
        stops=("<|im_end|>", "<|endoftext|>"),
        ordinary=_THINK,
    ),
    "qwen3_without_thinking": Family(
        template=QWEN_3,
        special=_CHATML_TOKENS,
        eos_token="<|im_end|>",
        arguments={"enable_thinking": False},
        ordinary=_THINK,
    ),
    "qwen3_thinking": Family(template=QWEN_3_THINKING, special=_CHATML_TOKENS, eos_token="<|im_end|>", ordinary=_THINK),
    "r1_distill": Family(
        template=R1_DISTILL,
        special=("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"),
        bos_token="<｜begin▁of▁sentence｜>",
        eos_token="<｜end▁of▁sentence｜>",
        ordinary=_THINK,
    ),
    "harmony": Family(
        template=HARMONY,
        special=(
            "<|startoftext|>",
            "<|endoftext|>",
            "<|start|>",
            "<|end|>",
            "<|message|>",
            "<|channel|>",
            "<|return|>",
        ),
        eos_token="<|return|>",
        stops=("<|return|>", "<|endoftext|>"),
    ),
}


def write_family(folder: Path, family: Family, **config: Any) -> Path:
    """Write a tokenizer folder of the family: bytes and special tokens; ``config`` overrides tokenizer_config.json."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in family.special])
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in family.ordinary])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": family.bos_token,
        "eos_token": family.eos_token,
        "chat_template": family.template,
        **config,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if family.stops:
        ids = [tokenizer.token_to_id(text) for text in family.stops]
        (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": ids}))
    return folder
