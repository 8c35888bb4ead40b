"""Write the names of the oldest supported torch: python -m tests.golden.render_torch_names FOLDER

FOLDER has the unpacked wheel of that version. The wheels of all platforms have the same Python files and stubs. The
smallest has 74 MB::

    pip download --no-deps --only-binary :all: --platform macosx_11_0_arm64 --python-version 3.11 torch==2.8.0
    unzip torch-2.8.0-*.whl 'torch/*.py' 'torch/*.pyi' -d FOLDER

The list has every public name of the modules in question, and the other names that this package uses now.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from tests.support.sources import Found, Sources
from tests.support.supported_names import OLDEST_TORCH, TORCH, private_uses_of, uses_of


def main() -> None:
    """Run the command of the module's docstring."""
    root = Path(sys.argv[1])
    sources = Sources(root)
    version = re.search(r"__version__ = '([\d.]+)", (root / "torch" / "version.py").read_text(encoding="utf-8"))
    assert version is not None
    names = {f"{module}.{name}" for module in TORCH for name in sources.public_names(module)}
    names |= {use.name for _, use in (*uses_of(*TORCH), *private_uses_of("torch"))}
    found = {name: sources.find(name) for name in sorted(names)}
    listed = {name: _takes(one) for name, one in found.items() if one is not None}
    text = json.dumps({"version": version[1], "names": listed})
    OLDEST_TORCH.write_text(text.replace('], "', '],\n"').replace('null, "', 'null,\n"') + "\n", encoding="utf-8")


def _takes(found: Found) -> list[str] | None:
    return None if found.takes is None else [*found.takes, *("*" for _ in range(found.takes_more))]


if __name__ == "__main__":
    main()
