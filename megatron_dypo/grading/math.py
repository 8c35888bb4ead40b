"""Verify mathematical equality: plain numbers by exact fractions, other answers by math-verify.

Imported in verifier processes only: math-verify brings sympy, and some inputs keep it busy indefinitely.
"""

from __future__ import annotations

from megatron_dypo.grading.answers.extract import gold_text
from megatron_dypo.grading.answers.formulas import same_formula
from megatron_dypo.grading.answers.same import same_answer
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle
from megatron_dypo.grading.answers.unmarked import claimed_answer


def verify_math(response: str, answer: str, style: AnswerStyle = AUTO) -> bool:
    """Return whether the answer of ``response`` equals ``answer``; ``docs/verifiers.md`` shows which answers are equal.

    :func:`megatron_dypo.grading.answers.unmarked.claimed_answer` finds the answer of the response. Raises ValueError if
    ``answer`` is blank. Never returns for inputs such as ``9^{9^{9^9}}``: run it under a limit.
    """
    gold = gold_text(answer)
    claim = claimed_answer(response, gold, style)
    return claim is not None and same_answer(gold, claim, same_formula)
