"""Call a function in this process, over Transformer Engine's Python: FOLDER MODULE:FUNCTION ARGUMENTS_AS_JSON

The last line of the output is the function's result as JSON.
"""

from __future__ import annotations

import importlib
import json
import sys
import warnings
from pathlib import Path

from tests.support.te.start import use_transformer_engine


def main() -> None:
    """Run the command of the module's docstring."""
    folder, function, arguments = sys.argv[1:]
    warnings.simplefilter("ignore")
    use_transformer_engine(Path(folder))
    module, _, name = function.partition(":")
    print(json.dumps(getattr(importlib.import_module(module), name)(*json.loads(arguments))))


if __name__ == "__main__":
    main()
