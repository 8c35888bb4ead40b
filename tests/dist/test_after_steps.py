"""The results of a step: checkpoints, refits, metrics and accounts; and what each end of a run saves and exports."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from tests.support.dist.multi_step import PROMPTS, batch_of, config_of, make_run, put
from tests.support.dist.spawn import run_ranks
from tests.support.hf_models import make_hf_model

CAUSES = ("STOPPED", "NOT_FINITE", "NOTHING_LEFT")


def rank_finish(path: str, folder: str) -> dict[str, Any]:
    """Make all runs of this file, one after the other on one rank."""
    from megatron_dypo.config.model import ParallelConfig
    from megatron_dypo.mcore.start import start_megatron
    from megatron_dypo.parallel.groups import close

    layout = start_megatron(ParallelConfig())

    def start(name: str, every: int = 0, steps: int = 3, **options: Any) -> tuple[Any, Any]:
        config = config_of(path, f"{folder}/{name}", {}, "exact", **options)
        checkpoint = dataclasses.replace(config.checkpoint, every=every, keep=9)
        run = dataclasses.replace(config.run, steps=steps)
        made, recorder, _ = make_run(dataclasses.replace(config, checkpoint=checkpoint, run=run), layout)
        return made, recorder

    seen = {
        "schedule": _schedule(*start("schedule", every=2)),
        "epochs": _epochs(*start("epochs", steps=9, epochs=2)),
        "skipped": _skipped(*start("skipped", every=1)),
        "evaluated": _evaluated(*start("evaluated", steps=9)),
        "start": [_started(*start(f"start_{bad_steps}"), bad_steps) for bad_steps in (0, 2)],
        "trained": _trained(*start("trained")),
        "ends": {
            (cause, steps): _ended(*start(f"{cause}_{steps}"), cause, steps) for cause in CAUSES for steps in (0, 1)
        },
        "saved twice": _saved_twice(*start("saved_twice", every=1)),
    }  # fmt: skip
    close(layout)
    return seen


def _saved(run: Any) -> list[int]:
    from megatron_dypo.mcore.checkpoints.folder import step_of

    folder = run.dir / "checkpoints"
    return sorted(step_of(path) for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _schedule(run: Any, recorder: Any) -> Any:
    """Make the three steps of a run, two of a batch."""
    from tests.support.loop_cases import make_step

    after = []
    for step in range(3):
        if run.progress.batch.is_used_up:
            put(run, batch_of(step // 2))
        run.tally.add("retries")
        run.tally.add("asked")
        make_step(run)
        after.append((_saved(run), list(recorder.refitted), not run.progress.batch.is_used_up))
    return after, {step: metrics["rollout/retries"] for step, metrics in recorder.metrics.items()}


def _epochs(run: Any, recorder: Any) -> Any:
    """Return the accounts after each of four updates: two passes over a batch of two."""
    from tests.support.loop_cases import make_step

    put(run, batch_of(0))
    found = []
    for _ in range(4):
        make_step(run)
        balance = run.accounts.balance(run.progress.batch)
        found.append((balance.difference, balance.counts()))
    return found, [recorder.metrics[step]["ledger/waiting"] for step in (1, 2, 3, 4)]


def _skipped(run: Any, recorder: Any) -> Any:
    """Make two updates that are not finite, two that are, and one that is not."""
    from tests.support.loop_cases import make_step

    counts = []
    for step, is_bad in enumerate((True, True, False, False, True)):
        if run.progress.batch.is_used_up:
            put(run, _spoilt(batch_of(step // 2)) if is_bad else batch_of(step // 2))
        make_step(run)
        counts.append((run.progress.bad_steps, _saved(run), recorder.metrics[run.progress.step]["train/skipped"]))
    return counts


def _spoilt(groups: Any) -> Any:
    return [[dataclasses.replace(s, reward=math.inf if s.is_correct else 0.0) for s in group] for group in groups]


def _evaluated(run: Any, recorder: Any) -> Any:
    """Make one step of a batch of two against a server, with an evaluation after every step."""
    from tests.support import loop_cases
    from tests.support.fake_sglang import FakeSGLang
    from tests.support.loop_cases import make_step

    settings = loop_cases.aime(every=1)
    run.config = dataclasses.replace(run.config, eval=settings)
    with FakeSGLang(version="1") as fake:
        other = loop_cases.make_run([fake.url], loop_cases.make_config(run.dir, eval=settings))
        run.servers.requests = loop_cases.requests_of(other)
        run.replica.held_out = loop_cases.leader_of(other).held_out
        recorder.serving = (fake.url,)
        put(run, batch_of(0))
        make_step(run)
    return list(recorder.refitted), not run.progress.batch.is_used_up, recorder.metrics[1]


def _started(run: Any, recorder: Any, bad_steps: int) -> Any:
    """Resume a run at its last step."""
    from megatron_dypo.ending import RunEnded
    from megatron_dypo.loop.progress import Progress
    from megatron_dypo.loop.train import train_run

    run.progress = Progress(step=3, bad_steps=bad_steps, last_problem="gradient of x")
    try:
        train_run(run)
    except RunEnded as end:
        return end.cause.label, str(end), list(recorder.refitted)
    return None, "", list(recorder.refitted)


def _trained(run: Any, recorder: Any) -> Any:
    """Make a whole run of three steps, two of a batch; its rollouts exist from the start."""
    from megatron_dypo.loop.train import train_run

    for index in (0, 1):
        put(run, batch_of(index))
    train_run(run)
    return run.progress.step, list(recorder.refitted), sorted(recorder.metrics)


def _ended(run: Any, recorder: Any, cause: str, steps: int) -> Any:
    """End a run by ``cause`` after that many steps, while a collection has counted something."""
    from megatron_dypo.ending import Cause, RunEnded
    from megatron_dypo.loop.train import train_run
    from tests.support.loop_cases import make_step

    put(run, batch_of(0))
    for _ in range(steps):
        make_step(run)
    run.tally.add("asked", steps)
    recorder.end = RunEnded(Cause[cause], "why")
    with pytest.raises(RunEnded, match="why"):
        train_run(run)
    return _saved(run), (run.dir / "hf").is_dir(), sorted(recorder.metrics)


def _saved_twice(run: Any, recorder: Any) -> Any:
    """End a run whose last step is saved already."""
    from megatron_dypo.loop.resume import save_unless_saved
    from megatron_dypo.mcore.checkpoints.folder import find_latest
    from tests.support.loop_cases import make_step

    put(run, batch_of(0))
    make_step(run)
    folder = find_latest(run.dir / "checkpoints")
    assert folder is not None
    before = folder.stat().st_mtime_ns
    save_unless_saved(run.checkpointer, run.progress)
    run.progress.step = 2
    save_unless_saved(run.checkpointer, run.progress)
    return folder.stat().st_mtime_ns == before, _saved(run)


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    root = tmp_path_factory.mktemp("after_steps")
    path = str(make_hf_model("qwen2", root / "hf"))
    (result,) = run_ranks(1, rank_finish, path, str(root / "runs"))
    return result


def test_checkpoints_are_due_at_multiples_and_at_the_last_step_and_pushes_after_a_batch(seen: dict[str, Any]) -> None:
    after, retries = seen["schedule"]
    assert after == [([], [], True), ([2], [2], False), ([2, 3], [2], True)]
    assert retries == {1: 1.0, 2: 1.0, 3: 1.0}, "a step counts its own"


def test_a_draw_is_trained_on_once_at_its_last_update_and_waits_until_then(seen: dict[str, Any]) -> None:
    books, waiting = seen["epochs"]
    assert [difference for difference, _ in books] == [0, 0, 0, 0]
    trained = [(counts["trained_rl"], counts["trained_sft"], counts["waiting"]) for _, counts in books]
    assert trained == [(0, 0, 8), (0, 0, 8), (2, 2, 4), (6, 2, 0)]
    assert waiting == [8, 8, 4, 0]
    assert 2 * PROMPTS == 8


def test_bad_updates_in_a_row_are_counted_and_none_is_saved(seen: dict[str, Any]) -> None:
    assert seen["skipped"] == [
        (1, [], 1.0),
        (2, [], 1.0),
        (0, [3], 0.0),
        (0, [3, 4], 0.0),
        (1, [3, 4], 1.0),
    ]


def test_an_evaluation_inside_a_batch_is_of_the_weights_now(seen: dict[str, Any]) -> None:
    refitted, is_mid_batch, metrics = seen["evaluated"]
    assert (refitted, is_mid_batch) == ([1], True)
    assert metrics["eval/aime/num_lost"] == 0, "the server answers with version 1, which was refitted"
    assert 0 < metrics["eval/aime/num_samples"] == metrics["eval/aime/num_prompts"] * 1


def test_a_run_gives_the_servers_its_weights_and_makes_every_step(seen: dict[str, Any]) -> None:
    assert seen["trained"] == (3, [0, 2], [1, 2, 3])


def test_a_run_whose_last_updates_were_skipped_did_not_end_well(seen: dict[str, Any]) -> None:
    good, bad = seen["start"]
    assert good == (None, "", [3]), "the servers of a resumed run get its weights"
    assert bad == ("not_finite", "the last 2 updates of the run were skipped: gradient of x", [3])


def test_an_end_saves_what_was_done_unless_it_is_not_finite_and_exports_what_is_complete(seen: dict[str, Any]) -> None:
    assert {end: found[:2] for end, found in seen["ends"].items()} == {
        ("STOPPED", 0): ([], False),
        ("STOPPED", 1): ([1], False),
        ("NOT_FINITE", 0): ([], False),
        ("NOT_FINITE", 1): ([], False),
        ("NOTHING_LEFT", 0): ([], False),
        ("NOTHING_LEFT", 1): ([1], True),
    }


def test_what_an_unfinished_collection_counted_is_the_record_of_its_step(seen: dict[str, Any]) -> None:
    for (_, steps), (*_, written) in seen["ends"].items():
        assert written == ([1, 2] if steps else [])


def test_a_step_is_saved_once(seen: dict[str, Any]) -> None:
    assert seen["saved twice"] == (True, [1, 2])
