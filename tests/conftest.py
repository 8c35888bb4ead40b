"""Set the environment of every test: one thread a process, no network, no compile, no deadline for Hypothesis examples.

Each test gets the mark of its folder (``-m e2e``), and folders whose files take long come first.
"""

import os
import signal
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from megatron_dypo.metrics.repeats import flush_repeated

torch.set_num_threads(1)
# No deadline: the time of an example depends more on other load of the machine than on the code.
hypothesis.settings.register_profile("megatron_dypo", deadline=None)
hypothesis.settings.load_profile("megatron_dypo")


TESTS = Path(__file__).parent
FOLDERS = ("e2e", "dist", "unit", "gpu")
"""Folders of tests and their marks. Those with long files come first, so that two workers end together."""
E2E_TIMEOUT_S = 1800
"""Time limit of an e2e test with its fixtures, which start servers and runs. A test that needs more sets its own."""


def folder_of(item: pytest.Item) -> str:
    """Return the folder of ``tests/`` that a test is in."""
    return item.path.relative_to(TESTS).parts[0]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test by its folder, put long folders first, give e2e tests time, and skip tests that lack their GPU."""
    items.sort(key=lambda item: FOLDERS.index(folder_of(item)))
    for item in items:
        item.add_marker(folder_of(item))
        if folder_of(item) == "e2e" and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(E2E_TIMEOUT_S))
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))


@pytest.fixture(autouse=True)
def _first_warnings_are_first():
    """Forget the warnings of other tests, so that the first of this test does not count as repeated."""
    flush_repeated()


@pytest.fixture(autouse=True)
def _umask_is_restored():
    """Restore the umask after commands that a test ran in this process, which set it for the rest of a process."""
    before = os.umask(0o022)
    os.umask(before)
    yield
    os.umask(before)


@pytest.fixture(autouse=True, scope="session")
def _hangups_are_heard():
    """Let processes that tests start receive SIGHUP as usual, even if the tests run under ``nohup``."""
    inherited = signal.signal(signal.SIGHUP, lambda number, frame: None)
    yield
    signal.signal(signal.SIGHUP, inherited)
