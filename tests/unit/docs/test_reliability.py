"""docs/reliability.md is the fault matrix, rendered, and names tests and metrics that exist."""

import re
from pathlib import Path

from megatron_dypo.metrics.names import METRICS
from tests.golden.render_reliability import DOCUMENT, render
from tests.support.faults.injector import FAULTS, PARTS
from tests.support.faults.matrix import PHASES, ROWS

ROOT = Path(__file__).parents[3]


def test_the_page_is_the_matrix_rendered():
    assert DOCUMENT.read_text() == render(), "python -m tests.golden.render_reliability writes it anew; read the diff"


def test_every_fault_of_the_matrix_can_be_done_in_every_phase():
    assert ROWS.keys() == FAULTS.keys()
    assert PARTS.keys() == set(PHASES)


def test_the_page_names_files_and_metrics_that_exist():
    text = DOCUMENT.read_text()
    assert all((ROOT / path).exists() for path in re.findall(r"`((?:tests|tools)/[\w/]+\.py)", text))
    named = set(re.findall(r"`((?:timing_s|refit|rollout|train)/\w+)`", text))
    assert named <= {metric.name for metric in METRICS}
