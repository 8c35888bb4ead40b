"""The report is one self-contained page, for any texts of the run."""

import json
from html.parser import HTMLParser

import pytest

from megatron_dypo.metrics.report.page import render_report, script_json
from megatron_dypo.metrics.report.tiles import duration
from tests.support.run_folder import HOSTILE, make_run


class _Page(HTMLParser):
    """A parser of a page's script elements, links to other files, and text outside scripts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[tuple[dict, str]] = []
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self._in_script = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("src", "href") if name in attributes]
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append((attributes, ""))

    def handle_endtag(self, tag):
        self._in_script = False

    def handle_data(self, data):
        if self._in_script:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        else:
            self.text += data

    def data(self, name):
        return next(json.loads(text) for attributes, text in self.scripts if attributes.get("id") == name)


def _render(run_dir) -> _Page:
    return _Page(render_report(run_dir).read_text(encoding="utf-8"))


def test_the_page_needs_no_other_file_and_forbids_the_network(tmp_path):
    path = render_report(make_run(tmp_path, 3))
    page = _Page(path.read_text(encoding="utf-8"))
    assert path == tmp_path / "report.html"
    assert page.links == []
    assert "default-src 'none'" in path.read_text(encoding="utf-8")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "report.html", "samples"]


def test_the_plotly_bundle_is_inlined_once(tmp_path):
    page = _render(make_run(tmp_path, 2))
    assert sum("plotly.js v" in text for _, text in page.scripts) == 1


def test_hostile_text_is_inert_and_arrives_unchanged(tmp_path):
    harmless, hostile = (
        _render(make_run(tmp_path / name, 2, text=text)) for name, text in [("a", "x"), ("b", HOSTILE)]
    )
    assert hostile.tags == harmless.tags
    row = hostile.data("samples")[0]
    assert (row["prompt"], row["rollouts"][1]["text"]) == (HOSTILE, HOSTILE)


def test_hostile_text_in_config_and_summary_is_escaped(tmp_path):
    run_dir = make_run(tmp_path, 1)
    tags = _render(run_dir).tags
    (run_dir / "config.yaml").write_text(f"model: {HOSTILE}")
    (run_dir / "summary.json").write_text(json.dumps({"note": HOSTILE}))
    page = _render(run_dir)
    assert page.tags.count("script") == tags.count("script")
    assert "img" not in page.tags
    assert page.text.count(HOSTILE) == 2


def test_only_our_own_scripts_may_run(tmp_path):
    page = _render(make_run(tmp_path, 1, text=HOSTILE))
    executed = [attributes for attributes, _ in page.scripts if attributes.get("type") != "application/json"]
    assert len(executed) == 2
    assert len({attributes["nonce"] for attributes in executed}) == 1


@pytest.mark.parametrize("text", ["</script>", "<!--<script>", "]]>", "&lt;", "a\u2028b", "\\u003c"])
def test_script_json_has_no_markup_and_reads_back(text):
    encoded = str(script_json({"text": text}))
    assert not set("<>&") & set(encoded)
    assert json.loads(encoded) == {"text": text}


def test_the_summary_heads_the_page(tmp_path):
    run_dir = make_run(tmp_path, 1)
    summary = {
        "accuracy_before": 0.2,
        "accuracy_before_interval": [0.15, 0.26],
        "tiers_last": {"easy": 0.5, "mid": 0.3, "hard": 0.2},
        "seconds": 605.2,
    }
    (run_dir / "summary.json").write_text(json.dumps(summary))
    text = " ".join(_render(run_dir).text.split())
    assert "accuracy before20.0% 15.0% – 26.0%" in text
    assert "tiers lasteasy 50.0% · mid 30.0% · hard 20.0%" in text
    assert "seconds10 min 05 s" in text


def test_without_a_summary_the_records_head_the_page(tmp_path):
    text = " ".join(_render(make_run(tmp_path, 3)).text.split())
    assert "accuracy on held_out, step 050.0% 40.4% – 59.6%" in text
    assert "accuracy on held_out, step 250.0% 40.4% – 59.6%" in text
    assert "tiers, last 3 stepseasy 25% · mid 50% · hard 25%" in text


@pytest.mark.parametrize(("seconds", "text"), [(3.21, "3.21 s"), (125, "2 min 05 s"), (3720, "1 h 02 min")])
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_a_run_without_samples_or_steps_still_has_a_page(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    text = _render(tmp_path).text
    assert "no step written yet" in text
    assert "No metric to plot" in text
    assert "This run wrote no samples" in text


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"not a run folder: it has no metrics\.jsonl"):
        render_report(tmp_path)
    with pytest.raises(ValueError, match="missing"):
        render_report(tmp_path / "missing")


def test_a_damaged_summary_is_named(tmp_path):
    run_dir = make_run(tmp_path, 1)
    (run_dir / "summary.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"summary\.json: must hold a JSON object, got list"):
        render_report(run_dir)


def test_the_page_stays_small_when_the_run_is_long(tmp_path):
    short = render_report(make_run(tmp_path / "short", 1)).stat().st_size
    long = render_report(make_run(tmp_path / "long", 70, num_prompts=30, text="x" * 20_000))
    page = _Page(long.read_text(encoding="utf-8"))
    assert long.stat().st_size - short < 12_000_000
    assert "600 of the 1,800 prompts of 60 steps, spread evenly over the 70" in " ".join(page.text.split())
    shown = [row["step"] for row in page.data("samples")]
    assert (shown[0], shown[-1]) == (0, 69)
