"""The life of a checkpoint folder, without a model in it."""

from typing import Any

import pytest

from megatron_dypo.config.run import CheckpointConfig
from megatron_dypo.mcore.checkpoints import checkpoint, folder
from megatron_dypo.mcore.checkpoints.prune import prune
from megatron_dypo.mcore.checkpoints.weights import load_weights


def publish(root, step, keep=0):
    final = folder.folder_of(root, step)
    partial = folder.make_partial(final, ("mcore",))
    (partial / "trainer_state.json").write_text("{}")
    folder.publish(final)
    prune(final, CheckpointConfig(keep=keep))


def crash(root, step):
    """Leave the files of a save that never ended."""
    folder.make_partial(folder.folder_of(root, step), ("mcore",))


def names(root):
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_a_folder_without_checkpoints_has_no_latest(tmp_path):
    assert folder.find_latest(tmp_path) is None
    assert folder.find_latest(tmp_path / "missing") is None


def test_a_partial_checkpoint_is_never_the_latest(tmp_path):
    publish(tmp_path, 10)
    crash(tmp_path, 20)
    assert folder.find_latest(tmp_path) == tmp_path / "step_000010"


def test_publishing_clears_what_a_crash_left(tmp_path):
    crash(tmp_path, 7)
    publish(tmp_path, 10)
    assert names(tmp_path) == ["step_000010"]


def test_a_published_folder_is_whole_and_tracked(tmp_path):
    publish(tmp_path, 10)
    assert names(tmp_path) == ["step_000010"]
    assert sorted(p.name for p in (tmp_path / "step_000010").iterdir()) == ["mcore", "trainer_state.json"]
    assert (tmp_path / folder.TRACKER).read_text() == "10"


def test_the_tracker_outranks_the_highest_step(tmp_path):
    publish(tmp_path, 10)
    publish(tmp_path, 20)
    (tmp_path / folder.TRACKER).write_text("10")
    assert folder.find_latest(tmp_path) == tmp_path / "step_000010"


class Killed(BaseException):
    """The process ends here."""


def publish_until(root, step, last, monkeypatch):
    """Publish a checkpoint, but be killed before the named function of ``folder`` is called."""

    def killed(*_, **__):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(folder, last, killed)
        with pytest.raises(Killed):
            publish(root, step)


@pytest.mark.parametrize(
    ("last", "taken"), [("replace_file", 10), ("commit_folder", 10), ("track", 20), ("remove", 20)]
)
@pytest.mark.parametrize("replaced", [False, True])
def test_a_save_that_is_killed_while_it_publishes_counts_from_its_rename_on(
    tmp_path, monkeypatch, last, taken, replaced
):
    publish(tmp_path, 10)
    if replaced:  # the run went back to step 10, and reaches step 20 again
        publish(tmp_path, 20)
        (tmp_path / folder.TRACKER).write_text("10")
    if last == "remove":
        folder.make_partial(folder.folder_of(tmp_path, 20), ("mcore",))
        (tmp_path / "step_000020.tmp" / "trainer_state.json").write_text("{}")
        monkeypatch.setattr(folder, "make_partial", lambda final, parts: final.with_suffix(".tmp"))
    publish_until(tmp_path, 20, last, monkeypatch)
    for _ in range(2):
        folder.mend_interrupted(tmp_path)
        assert folder.candidates(tmp_path)[0] == folder.folder_of(tmp_path, taken)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == [folder.TRACKER]


def test_a_tracker_that_is_set_back_after_a_kill_is_obeyed(tmp_path, monkeypatch):
    for step in (10, 20):
        publish(tmp_path, step)
    publish_until(tmp_path, 30, "track", monkeypatch)
    (tmp_path / folder.TRACKER).write_text("10")
    folder.mend_interrupted(tmp_path)
    assert folder.candidates(tmp_path) == [tmp_path / "step_000010"]


@pytest.mark.parametrize("text", [b"", b"[]", b"{}", b'{"step": "x", "tracker": "10"}', b"\xff", b"[" * 100_000])
def test_a_damaged_note_of_a_publication_changes_nothing(tmp_path, text):
    publish(tmp_path, 10)
    (tmp_path / ".publishing.json").write_bytes(text)
    folder.mend_interrupted(tmp_path)
    assert folder.candidates(tmp_path) == [tmp_path / "step_000010"]
    assert not (tmp_path / ".publishing.json").exists()


def told(caplog):
    """Return the lines that were logged, and forget them."""
    lines = [record.getMessage() for record in caplog.records]
    caplog.clear()
    return lines


@pytest.mark.parametrize("choose", [folder.find_latest, lambda root: folder.candidates(root)[0]])
def test_a_tracker_that_names_an_older_checkpoint_than_the_newest_is_obeyed_and_told(tmp_path, caplog, choose):
    for step in (100, 200, 300):
        publish(tmp_path, step)
    assert choose(tmp_path) == tmp_path / "step_000300"
    assert told(caplog) == []
    (tmp_path / folder.TRACKER).write_text("100")
    assert choose(tmp_path) == tmp_path / "step_000100"
    (line,) = told(caplog)
    both = "names step_000100, and step_000300 is newer: "
    assert line.startswith(f"OLDER CHECKPOINT: {tmp_path}/{folder.TRACKER} {both}")


@pytest.mark.parametrize("choose", [folder.find_latest, lambda root: folder.candidates(root)[0]])
def test_a_flipped_bit_of_the_tracker_is_told_or_changes_nothing(tmp_path, caplog, choose):
    for step in range(1, 301):
        folder.folder_of(tmp_path, step).mkdir()
        (folder.folder_of(tmp_path, step) / folder.STATE).write_text("{}")
    chosen = set()
    for bit in range(8 * len(b"300")):
        flipped = bytearray(b"300")
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / folder.TRACKER).write_bytes(flipped)
        chosen.add(folder.step_of(choose(tmp_path)))
        assert told(caplog), flipped
    assert chosen == {300, 200, 100, 30}, "the flips that make 200, 100 and '30 ' name another checkpoint"


def test_without_a_tracker_the_highest_step_counts(tmp_path):
    for step in (9, 10, 1_000_000):
        publish(tmp_path, step)
    (tmp_path / folder.TRACKER).unlink()
    assert folder.find_latest(tmp_path) == tmp_path / "step_1000000"


@pytest.mark.parametrize(
    "text", [b"", b"\n", b"\0\0\0", b"-10", b"10.0", b"ten", b"\xff", b"9" * 5000, b"30", "１０".encode()]
)
def test_a_tracker_that_names_no_whole_checkpoint_counts_as_lost(tmp_path, text):
    for step in (10, 20):
        publish(tmp_path, step)
    crash(tmp_path, 30)
    (tmp_path / folder.TRACKER).write_bytes(text)
    assert folder.find_latest(tmp_path) == tmp_path / "step_000020"


@pytest.mark.parametrize("spoil", ["nothing", "no state", "empty state", "cut state", "a file", "a dangling link"])
def test_what_has_a_checkpoints_name_and_is_not_whole_is_never_the_latest(tmp_path, spoil):
    publish(tmp_path, 10)
    spoilt = tmp_path / "step_000020"
    if spoil in ("a file", "a dangling link"):
        spoilt.write_text("") if spoil == "a file" else spoilt.symlink_to("absent")
    else:
        spoilt.mkdir()
    if spoil.endswith("state") and spoil != "no state":
        (spoilt / folder.STATE).write_text("" if spoil == "empty state" else '{"step": 2')
    (tmp_path / folder.TRACKER).write_text("20")
    assert folder.find_latest(tmp_path) == tmp_path / "step_000010"
    publish(tmp_path, 20)  # the run reaches that step again
    assert folder.find_latest(tmp_path) == spoilt


def test_what_saves_left_behind_is_removed_and_nothing_else(tmp_path):
    publish(tmp_path, 10)
    crash(tmp_path, 20)
    (tmp_path / "step_000030.tmp").write_text("a file of that name")
    (tmp_path / "notes.tmp").mkdir()
    folder.mend_interrupted(tmp_path)
    assert names(tmp_path) == ["notes.tmp", "step_000010"]
    folder.mend_interrupted(tmp_path / "missing")


def test_a_failed_save_can_be_discarded_and_made_again(tmp_path):
    final = folder.folder_of(tmp_path, 10)
    crash(tmp_path, 10)
    folder.discard_partial(final)
    folder.discard_partial(final)
    assert names(tmp_path) == []
    publish(tmp_path, 10)
    assert names(tmp_path) == ["step_000010"]


@pytest.mark.parametrize(("keep", "left"), [(0, [10, 20, 30]), (1, [30]), (2, [20, 30]), (5, [10, 20, 30])])
def test_the_last_ones_are_kept(tmp_path, keep, left):
    for step in (10, 20, 30):
        publish(tmp_path, step, keep)
    assert names(tmp_path) == [f"step_{step:06d}" for step in left]


def test_pruning_never_takes_the_one_just_written(tmp_path):
    publish(tmp_path, 30)
    publish(tmp_path, 20, keep=1)
    assert names(tmp_path) == ["step_000020"]


def test_writing_a_step_again_replaces_it(tmp_path):
    publish(tmp_path, 10)
    (tmp_path / "step_000010" / "stale").write_text("")
    publish(tmp_path, 10)
    assert not (tmp_path / "step_000010" / "stale").exists()


def test_a_folder_that_is_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metadata\.json is missing"):
        load_weights(tmp_path, [])
    nothing: Any = None
    with pytest.raises(ValueError, match=r"trainer_state\.json is missing"):
        checkpoint.load(tmp_path, chunks=[], optimizer=nothing, layout=nothing)
