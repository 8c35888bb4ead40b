"""No file of an HF folder or a tokenizer folder runs code: pickles, modules of ``auto_map``, templates."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_dypo.data.tokenizer.open import load_tokenizer
from megatron_dypo.mcore.checkpoints.convert import hf_to_mcore
from megatron_dypo.models.architecture import load_architecture
from megatron_dypo.models.hf.read import HFReader
from megatron_dypo.models.hf.write import copy_beside
from megatron_dypo.parallel.mesh import Mesh
from tests.support.exploits import pickled, saved_by_torch
from tests.support.hf_models import make_hf_model

READ = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
"""Files of the folder that an error has to name."""
MORE = ["added_tokens.json", "special_tokens_map.json", "chat_template.jinja", "model.safetensors.index.json"]
"""Files that such a folder may have, and that are read."""
UNREAD = ["pytorch_model.bin", "training_args.bin", "optimizer.pt", "pytorch_model.bin.index.json", "tokenizer.pkl"]
"""Files of other programs."""


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_hf_model("qwen2", tmp_path_factory.mktemp("model") / "hf", num_hidden_layers=1)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "hf"))


def errors_of_readers(folder: Path) -> list[str]:
    """Let everything read the folder that reads one, and return the errors."""
    actions: list[Callable[[], object]] = [
        lambda: load_architecture(folder),
        lambda: HFReader(folder).check_complete(load_architecture(folder)),
        lambda: load_tokenizer(folder).render("3 + 4", True),
        lambda: load_tokenizer(folder / "tokenizer.json"),
        lambda: hf_to_mcore(folder, folder.parent / "mcore", mesh=Mesh(), show_progress=False),
        lambda: copy_beside(folder, folder.parent),
    ]
    errors = []
    for action in actions:
        try:
            action()
        except ValueError as error:
            errors.append(str(error))
    return errors


@pytest.mark.parametrize("make", [pickled, saved_by_torch])
@pytest.mark.parametrize("name", [*READ, *MORE])
def test_a_pickle_in_place_of_a_file_that_is_read_is_named_and_not_run(
    name: str, make: Callable[[Path], bytes], folder: Path, tmp_path: Path
) -> None:
    (folder / name).write_bytes(make(tmp_path / "marker"))
    errors = errors_of_readers(folder)
    assert [error for error in errors if str(folder / name) in error], errors
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("make", [pickled, saved_by_torch])
@pytest.mark.parametrize("name", UNREAD)
def test_a_pickle_of_another_program_is_not_read(
    name: str, make: Callable[[Path], bytes], folder: Path, tmp_path: Path
) -> None:
    (folder / name).write_bytes(make(tmp_path / "marker"))
    assert errors_of_readers(folder) == []
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("make", [pickled, saved_by_torch])
def test_weights_that_are_only_a_pickle_are_refused(
    make: Callable[[Path], bytes], folder: Path, tmp_path: Path
) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(make(tmp_path / "marker"))
    with pytest.raises(ValueError, match=str(folder)):
        HFReader(folder)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("make", [pickled, saved_by_torch])
def test_a_sentencepiece_model_that_is_a_pickle_is_named_and_not_run(
    make: Callable[[Path], bytes], folder: Path, tmp_path: Path
) -> None:
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(make(tmp_path / "marker"))
    with pytest.raises(ValueError, match=str(folder / "tokenizer.model")):
        load_tokenizer(folder)
    assert not (tmp_path / "marker").exists()


def test_modules_that_a_folder_brings_along_are_not_imported(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    for name, key in (("config.json", "AutoModelForCausalLM"), ("tokenizer_config.json", "AutoTokenizer")):
        content = json.loads((folder / name).read_text())
        content["auto_map"] = {key: "hostile.Hostile", "AutoConfig": "hostile.Hostile"}
        (folder / name).write_text(json.dumps(content))
    (folder / "hostile.py").write_text(f"open({str(marker)!r}, 'w').close()\nclass Hostile: ...\n")
    errors_of_readers(folder)
    assert not marker.exists()


@pytest.mark.parametrize(
    "template",
    [
        "{{{{ cycler.__init__.__globals__.os.system('touch {marker}') }}}}",
        "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}{{{{ self.__init__.__globals__ }}}}",
        "{{% for c in [].__class__.__base__.__subclasses__() %}}{{{{ c.__init__.__globals__ }}}}{{% endfor %}}",
        "{{{{ messages.append.__self__.__class__.__base__ }}}}",
    ],
)
def test_a_chat_template_that_reaches_for_python_is_refused(template: str, folder: Path, tmp_path: Path) -> None:
    (folder / "chat_template.jinja").write_text(template.format(marker=tmp_path / "marker"))
    with pytest.raises(ValueError, match="chat_template"):
        load_tokenizer(folder).render("3 + 4", True)
    assert not (tmp_path / "marker").exists()
