"""Mathematical equality, by exact fractions where the answers are plain numbers and by math-verify elsewhere.

Imported in verifier processes only: math-verify brings sympy, and some inputs keep it busy indefinitely.
"""

from __future__ import annotations

from megatron_dypo.grading.answers.extract import after_thinking, gold_text, marked_answer
from megatron_dypo.grading.answers.formulas import same_formula
from megatron_dypo.grading.answers.same import same_answer
from megatron_dypo.grading.answers.style import AUTO, AnswerStyle
from megatron_dypo.grading.answers.unmarked import statement, unmarked_answer


def verify_math(response: str, answer: str, style: AnswerStyle = AUTO) -> bool:
    """True if ``response`` ends with an answer equal to ``answer``; ``docs/verifiers.md`` shows what equals what.

    The answer of a response is the one that it marks (see :func:`megatron_dypo.grading.answers.extract.marked_answer`);
    without a mark, and in format ``auto`` only, what :func:`megatron_dypo.grading.answers.unmarked.unmarked_answer`
    finds. Raises ValueError if ``answer`` is blank. Never returns for inputs such as ``9^{9^{9^9}}``: run it under a
    deadline.
    """
    gold = gold_text(answer)
    claim = marked_answer(response, style)
    if claim is not None and style.answer_format == "final_answer":
        claim = statement(claim)
    if claim is None and style.answer_format == "auto":
        text = after_thinking(response, style.thinking)
        claim = None if text is None else unmarked_answer(text, gold)
    return claim is not None and same_answer(gold, claim, same_formula)
