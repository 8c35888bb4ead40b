"""Environment of every test: one thread a process, no network, no compile, no deadline for examples of Hypothesis."""

import os
import signal

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_COMPILE_DISABLE", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import hypothesis
import pytest
import torch

from megatron_dypo.metrics.repeats import flush_repeated

torch.set_num_threads(1)
# No deadline: how long an example takes says more of what else the machine does than of the code.
hypothesis.settings.register_profile("megatron_dypo", deadline=None)
hypothesis.settings.load_profile("megatron_dypo")


def pytest_collection_modifyitems(items):
    """Tests marked ``gpu`` skip, with the reason, where torch sees no GPU."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU; torch sees none"))


@pytest.fixture(autouse=True)
def _first_warnings_are_first():
    """A warning that another test has caused is not counted as repeated."""
    flush_repeated()


@pytest.fixture(autouse=True, scope="session")
def _hangups_are_heard():
    """Processes that tests start hear SIGHUP as usual, also where the tests run under ``nohup``."""
    inherited = signal.signal(signal.SIGHUP, lambda number, frame: None)
    yield
    signal.signal(signal.SIGHUP, inherited)
