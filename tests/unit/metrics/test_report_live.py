"""The live report follows a run: it waits for the first metrics, reloads while the run goes on, and ends with it."""

from __future__ import annotations

from pathlib import Path

from megatron_dypo.ending import Cause
from megatron_dypo.metrics.report.live import follow, write_page
from megatron_dypo.metrics.status import RunStatus
from tests.support.run_folder import make_run

REFRESH = '<meta http-equiv="refresh" content="7">'


class Clock:
    """A stand-in for the time between two looks at the run: each wait makes the run's next change."""

    def __init__(self, *happenings) -> None:
        self.waited: list[float] = []
        self._happenings = list(happenings)

    def __call__(self, seconds: float) -> None:
        self.waited.append(seconds)
        self._happenings.pop(0)()


def test_a_live_page_reloads_until_the_run_has_ended(tmp_path: Path) -> None:
    run = tmp_path / "run"
    said: list[str] = []
    pages: list[str] = []
    status = RunStatus(run, "attempt", 0)

    def look() -> None:
        pages.append((run / "report.html").read_text(encoding="utf-8"))

    def start() -> None:
        run.mkdir()
        status.open()
        make_run(run, num_steps=1)

    def go_on() -> None:
        look()
        make_run(run, num_steps=4)

    def end() -> None:
        look()
        status.end(Cause.DONE, "all steps are done")

    clock = Clock(start, go_on, lambda: None, end)
    follow([run], None, every_s=7, say=said.append, wait=clock)
    look()
    assert clock.waited == [7, 7, 7, 7]
    assert [REFRESH in page for page in pages] == [True, True, False]
    assert ["1 steps (0–0)" in page for page in pages] == [True, False, False]
    assert ["4 steps (0–3)" in page for page in pages] == [False, True, True]
    assert "ended: done" in pages[-1]
    assert said[0].startswith("waiting for metrics.jsonl in ")
    assert said[1].startswith(f"{run / 'report.html'}: open it in a browser")
    assert said[2].endswith("final, every run has ended")


def test_a_page_is_written_again_only_when_a_run_has_written_something(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", num_steps=1)
    status, times = RunStatus(run, "attempt", 0), []
    status.open()

    def note() -> None:
        times.append((run / "report.html").stat().st_mtime_ns)

    def end() -> None:
        note()
        status.end(Cause.DONE, "all steps are done")

    follow([run], None, every_s=1, say=lambda line: None, wait=Clock(note, note, end))
    assert len(set(times)) == 1


def test_several_runs_have_one_page_and_one_run_has_its_own(tmp_path: Path, monkeypatch) -> None:
    runs = [make_run(tmp_path / name, num_steps=1) for name in ("one", "two")]
    monkeypatch.chdir(tmp_path)
    assert write_page(runs, None) == Path("comparison.html")
    assert write_page(runs[:1], None) == runs[0] / "report.html"
    assert write_page(runs[:1], tmp_path / "elsewhere.html") == tmp_path / "elsewhere.html"
    assert (tmp_path / "elsewhere.html").is_file()
