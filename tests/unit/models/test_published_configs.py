"""The config.json of published models, read as transformers reads it, field by field."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_dypo.models.architecture import load_architecture
from tests.support.hf_config_oracle import as_transformers_reads, differences
from tests.support.hf_models import import_transformers

FOLDERS = sorted(path.parent for path in (Path(__file__).parents[1] / "models_real").glob("*/config.json"))


@pytest.mark.skipif(not FOLDERS, reason="no configs of published models are here")
@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_a_published_config_is_read_as_transformers_reads_it(folder: Path) -> None:
    config = import_transformers().AutoConfig.from_pretrained(folder)
    assert differences(load_architecture(folder), as_transformers_reads(config)) == []
