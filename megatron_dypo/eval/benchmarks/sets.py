"""The benchmarks of the paper, and GPQA-Diamond: where to get each, its licence, its size and its records."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from megatron_dypo.eval.benchmarks import readers

MAA = "problems: Mathematical Association of America, all rights reserved (not to be passed on); the compilation: "


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """One published set."""

    title: str
    rows: tuple[int, ...]
    """Numbers of rows of its published files."""
    where: str
    """Places of files whose records ``read`` can read."""
    licence: str
    columns: str
    """Columns that ``read`` reads."""
    read: Callable[[Mapping[str, Any]], readers.Question]
    verifier: str
    samples: int = 1
    """Responses to each prompt in the reports of papers."""


BENCHMARKS: dict[str, Benchmark] = {
    "aime24": Benchmark(
        title="AIME 2024, I and II",
        rows=(30,),
        where="HuggingFaceH4/aime_2024 or math-ai/aime24 at the HF hub; Qwen2.5-Math, evaluation/data/aime24",
        licence=MAA + "Apache-2.0",
        columns="problem; answer, or the box of solution",
        read=readers.read_aime,
        verifier="math",
        samples=32,
    ),
    "aime25": Benchmark(
        title="AIME 2025, I and II",
        rows=(30,),
        where="math-ai/aime25 or opencompass/AIME2025 (its two files joined) at the HF hub",
        licence=MAA + "Apache-2.0",
        columns="problem or question; answer",
        read=readers.read_aime,
        verifier="math",
        samples=32,
    ),
    "amc23_83": Benchmark(
        title="AMC 12 of 2022 and 2023, those of the 100 problems with an integer for an answer",
        rows=(83,),
        where="AI-MO/aimo-validation-amc at the HF hub; TTRL and LUFFY evaluate on it",
        licence=MAA + "Apache-2.0",
        columns="problem; answer",
        read=readers.read_amc,
        verifier="math",
        samples=32,
    ),
    "amc23_40": Benchmark(
        title="AMC 12 of 2023, A and B: 40 problems, reworded so that an integer is the answer",
        rows=(40,),
        where="math-ai/amc23 at the HF hub; Qwen2.5-Math, evaluation/data/amc23/test.jsonl",
        licence=MAA + "Apache-2.0",
        columns="problem or question; answer",
        read=readers.read_amc,
        verifier="math",
        samples=32,
    ),
    "math500": Benchmark(
        title="MATH-500: 500 problems of the test split of MATH",
        rows=(500,),
        where="HuggingFaceH4/MATH-500 at the HF hub; openai/prm800k, prm800k/math_splits/test.jsonl",
        licence="MIT",
        columns="problem; answer; unique_id",
        read=readers.read_math,
        verifier="math",
    ),
    "minerva": Benchmark(
        title="Minerva's OCWCourses: problems of MIT's courses",
        rows=(272,),
        where="Qwen2.5-Math, evaluation/data/minerva_math/test.jsonl; math-ai/minervamath at the HF hub",
        licence="not stated; the courses are CC BY-NC-SA 4.0 (MIT OpenCourseWare)",
        columns="problem or question; answer, or the box of solution; idx",
        read=readers.read_minerva,
        verifier="math",
    ),
    "olympiadbench": Benchmark(
        title="OlympiadBench: open problems of mathematics in English, text alone (OE_TO_maths_en_COMP)",
        rows=(674, 675),
        where="Hothan/OlympiadBench at the HF hub (674); Qwen2.5-Math, evaluation/data/olympiadbench/test.jsonl (675)",
        licence="Apache-2.0",
        columns="question; final_answer; context; id",
        read=readers.read_olympiad,
        verifier="math",
    ),
    "gsm8k": Benchmark(
        title="GSM8K, the test split",
        rows=(1319,),
        where="openai/grade-school-math, grade_school_math/data/test.jsonl; openai/gsm8k at the HF hub",
        licence="MIT",
        columns="question; answer, which ends with #### and a number",
        read=readers.read_gsm8k,
        verifier="math",
    ),
    "gsm8k_train": Benchmark(
        title="GSM8K, the train split",
        rows=(7473,),
        where="openai/grade-school-math, grade_school_math/data/train.jsonl; openai/gsm8k at the HF hub",
        licence="MIT",
        columns="question; answer, which ends with #### and a number",
        read=readers.read_gsm8k,
        verifier="math",
    ),
    "arc_c": Benchmark(
        title="ARC-Challenge, the test split",
        rows=(1172,),
        where="allenai/ai2_arc at the HF hub, ARC-Challenge; ElliottYan/LUFFY, data/valid.arc_c.parquet",
        licence="CC BY-SA 4.0",
        columns="question; choices; answerKey; id; or prompt and reward_model of LUFFY's file",
        read=readers.read_arc,
        verifier="choice",
    ),
    "gpqa_diamond": Benchmark(
        title="GPQA-Diamond",
        rows=(198,),
        where="Idavidrein/gpqa at the HF hub (behind a form), gpqa_diamond.csv",
        licence="CC BY 4.0; its authors ask not to publish its questions in plain text",
        columns="Question; Correct Answer; Incorrect Answer 1 to 3; Record ID",
        read=readers.read_gpqa,
        verifier="choice",
        samples=8,
    ),
}
"""Name of the set → the set."""


def listing() -> str:
    """Return the list of all sets, as text for people."""
    lines = []
    for name, one in BENCHMARKS.items():
        sizes = " or ".join(str(count) for count in one.rows)
        lines += [f"{name}: {one.title}; {sizes} rows", f"  from     {one.where}", f"  licence  {one.licence}"]
        lines += [f"  columns  {one.columns}", f"  judged by `{one.verifier}`, responses to each prompt: {one.samples}"]
    return "\n".join(lines)
