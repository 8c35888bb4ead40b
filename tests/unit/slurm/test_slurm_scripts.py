"""The scripts of slurm/ as text: they parse, shellcheck finds nothing, and their commands equal the golden files."""

import shutil
import subprocess

import pytest

from tests.golden.render_jobs import FOLDER, JOBS, REPOSITORY, render
from tests.slurm_host.host import require

SCRIPTS = sorted(
    [*REPOSITORY.glob("slurm/*.sh"), *REPOSITORY.glob("tests/slurm_host/*.sh"), REPOSITORY / ".ci" / "run"]
)


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_bash_parses_the_script(path):
    subprocess.run(["bash", "-n", path], check=True)


def test_shellcheck_is_content_with_all_scripts():
    require(shutil.which("shellcheck") is not None, "needs shellcheck: apt-get install shellcheck")
    done = subprocess.run(["shellcheck", "-x", *SCRIPTS], cwd=REPOSITORY, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("name", JOBS)
def test_a_script_renders_the_job_of_its_golden_file(name):
    assert render(name) == (FOLDER / name).read_text(), (
        "python tests/golden/render_jobs.py writes it anew; read the diff"
    )
