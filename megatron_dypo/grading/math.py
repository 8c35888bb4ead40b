"""Mathematical equality, by exact fractions where the answers are plain numbers and by math-verify elsewhere.

Imported in verifier processes only: math-verify brings sympy, and some inputs keep it busy indefinitely.
"""

from __future__ import annotations

from megatron_dypo.grading.answers.extract import gold_text
from megatron_dypo.grading.answers.formulas import same_formula
from megatron_dypo.grading.answers.same import same_answer
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle
from megatron_dypo.grading.answers.unmarked import claimed_answer


def verify_math(response: str, answer: str, style: AnswerStyle = AUTO) -> bool:
    """True if ``response`` ends with an answer equal to ``answer``; ``docs/verifiers.md`` shows what equals what.

    The answer of a response is what :func:`megatron_dypo.grading.answers.unmarked.claimed_answer` finds. Raises
    ValueError if ``answer`` is blank. Never returns for inputs such as ``9^{9^{9^9}}``: run it under a deadline.
    """
    gold = gold_text(answer)
    claim = claimed_answer(response, gold, style)
    return claim is not None and same_answer(gold, claim, same_formula)
