"""Samples → a teacher's log-probs of their responses."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import TypeAlias

from megatron_dypo.metrics.progress import Progress
from megatron_dypo.metrics.progress import progress as progress_bar
from megatron_dypo.processes.stop_requests import StopFlag
from megatron_dypo.rollout.collect import set_at_stop, show_life
from megatron_dypo.rollout.teacher.client import NoLogprobsError, TeacherClient
from megatron_dypo.types import Floats, Sample

Answered: TypeAlias = "Floats | NoLogprobsError | None"
"""None: ``stop`` came before the answer."""

DOING = "asking the teacher for log-probs"


def teacher_logprobs(
    samples: Sequence[Sample], client: TeacherClient, *, stop: StopFlag | None = None, progress: bool = True
) -> list[Answered]:
    """Ask for the log-probs of all responses at once; return them in the order of ``samples``, or why there are none.

    When ``stop`` is set, the requests that are open are aborted.
    """
    with progress_bar(len(samples), "teacher", "responses", enabled=progress) as bar:
        return asyncio.run(_ask_for_all(samples, client, stop, bar))


async def _ask_for_all(
    samples: Sequence[Sample], client: TeacherClient, stop: StopFlag | None, bar: Progress
) -> list[Answered]:
    async with client:
        over, life = asyncio.Event(), asyncio.ensure_future(show_life(DOING))
        asked = [asyncio.ensure_future(_ask(sample, client, bar)) for sample in samples]
        all_answers = asyncio.gather(*asked)
        all_answers.add_done_callback(lambda _: over.set())
        try:
            with set_at_stop(over, stop):
                await over.wait()
            if all_answers.done():
                return list(all_answers.result())  # raises a bug that was met
            return [one.result() if one.done() else None for one in asked]
        finally:
            for task in (*asked, life):
                task.cancel()
            await asyncio.gather(*asked, life, return_exceptions=True)


async def _ask(sample: Sample, client: TeacherClient, bar: Progress) -> Floats | NoLogprobsError:
    prompt, response = sample.tokens[: sample.num_prompt_tokens], sample.tokens[sample.num_prompt_tokens :]
    try:
        answer: Floats | NoLogprobsError = await client.logprobs(prompt, response)
    except NoLogprobsError as error:
        answer = error
    bar.update(1)
    return answer
