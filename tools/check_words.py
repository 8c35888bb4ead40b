"""Find words that this project has replaced by another one: python tools/check_words.py

One thing has one word, in code, config, command line, metrics and documents. The table says which word is meant.
A docstring of the package says who does what: it does not begin with a noun clause ("What is held", "Of one layer").
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SUFFIXES = {".py", ".md", ".yaml", ".sh", ".j2", ".cfg", ".toml"}
LEFT_OUT = (
    "CHANGELOG.md",
    "tools/check_words.py",
    "tests/golden/",
    "tests/mutation/",
    "tests/unit/grading/data/",
    "tests/unit/tools/test_check_words.py",
)
"""Files that are not checked: files about the past, files of other authors, and this file with its test."""

OLD_WORDS = {
    r"push(es|ed|ing)?|update_weights(?!_from)|weights\.(transport|verify|quantize|deadline_s)": "refit",
    # Not the package Megatron-Bridge, nor the value of model.family: family=bridge, family: bridge, "bridge".
    r"(?<![-.=`\"/])(?<!family: )(?<!auto, )bridges?": "refitter",
    r"(?-i:(?<!transformer[_-])engines?)": "server",  # "Engine" is Transformer Engine
    r"pack_rows|row_length|row_multiple": "microbatch, token_multiple",
    r"is_mid_batch\(|updates_left|scored_version|rescore\w*|unscored|ScoreConfig|score\.policy": "log-probs",
    r"regimes?|distil": "tier; DISTILL, REINFORCE, DROP",
    r"weigh(ed|s|ing)?": "token weights, weighted",
    r"anchor(ed|s)?(?!: )": "gal_scale",
    r"prompts_per_step": "prompts_per_round",
    r"switch_gate": "rl_only_steps",
    r"(logprob_memory|bucket)_mb": "..._mib",
    r"truncated_is_wrong": "fail_truncated",
    r"balance_coef": "moe_aux_loss_coef",
    r"urls_come_back": "urls_are_restarted",
    r"for ever": "indefinitely",
    r"by itself": "on its own",
    r"(?<!in )so many": "that many",
    r"be it|whether it be": "whether",
    r"mend(s|ed|ing)?": "fix",
    r"lest": "so that ... not",
    r"in the mean": "on average",
    r"meanwhile": "in the meantime, until then",
}
"""Pattern of an old word -> the word to use."""

NOUN_CLAUSE = re.compile(r"(What|Of|As|The same)\b")
"""A noun clause at the beginning of a docstring."""

_PATTERNS = [(re.compile(rf"(?<![\w-])(?:{old})(?!\w)", re.IGNORECASE), new) for old, new in OLD_WORDS.items()]


def findings(path: Path, name: str) -> Iterator[str]:
    """Yield ``file:line: word: use another`` for each old word of a file."""
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        for pattern, new in _PATTERNS:
            if (found := pattern.search(line)) is not None:
                yield f"{name}:{number}: {found[0]!r}: say {new}"


def beginnings(path: Path, name: str) -> Iterator[str]:
    """Yield ``file:line: word: say who does what`` for each docstring that begins with a noun clause."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        body = getattr(node, "body", None)
        for inner in body if isinstance(body, list) else ():
            if not isinstance(inner, ast.Expr) or not isinstance(inner.value, ast.Constant):
                continue
            if (found := NOUN_CLAUSE.match(str(inner.value.value))) is not None:
                yield f"{name}:{inner.lineno}: a docstring begins with {found[0]!r}: say who does what"


def tracked_files() -> list[str]:
    """Return the names of the files to check, relative to the root."""
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True)
    names = (name for name in done.stdout.splitlines() if Path(name).suffix in SUFFIXES)
    return [name for name in names if not name.startswith(LEFT_OUT) and (ROOT / name).is_file()]


def all_findings() -> Iterator[str]:
    """Yield everything that is found in the tracked files."""
    for name in tracked_files():
        yield from findings(ROOT / name, name)
        if name.startswith("megatron_dypo/") and name.endswith(".py"):
            yield from beginnings(ROOT / name, name)


def main() -> int:
    """Print what is found; return 1 if there is anything."""
    found = list(all_findings())
    print("\n".join(found) if found else "no old words")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
