"""Launcher of a stock SGLang server on a machine without an accelerator.

Run by path under an interpreter that has SGLang: ``python sglang_cpu.py --model-path M --port P …`` (arguments of
``sglang.launch_server``). That interpreter need not have this package, so nothing of it is imported here. The top
level runs again in SGLang's scheduler and detokenizer processes, which multiprocessing spawns: they need it too.

Works around, in SGLang 0.5.23: ``sglang/srt/layers/*`` import names of ``sgl_kernel``, which needs CUDA libraries, and
``transformers`` imports torchvision, whose PyPI wheel cannot load its operators beside a CPU build of torch.
"""

import importlib.machinery
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

_FLAGS = ("--device", "cpu", "--attention-backend", "torch_native")

if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
    # A script's folder comes first on the path: its neighbours (client, servers, …) must not hide other modules.
    del sys.path[0]
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # read when sglang is imported

import torch  # noqa: E402


class _KernelStub(types.ModuleType):
    """Stands for ``sgl_kernel``: its names can be imported, and fail when called (none is, on a CPU)."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"sgl_kernel.{name} is a stub on CPU")

        return missing


def _declare_torchvision_operators() -> torch.library.Library:
    """Declare the two operators that torchvision's import registers fakes for; alive as long as the result is."""
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return library


def _stub_kernels() -> None:
    stub = _KernelStub("sgl_kernel")
    stub.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    sys.modules.setdefault("sgl_kernel", stub)


# A CUDA build of torch on a machine without a GPU loads torchvision's own operators.
_torchvision_library = _declare_torchvision_operators() if torch.version.cuda is None else None
_stub_kernels()


def main() -> None:
    """Serve until SIGTERM; no child process outlives it."""
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    try:
        run_server(prepare_server_args([*_FLAGS, *sys.argv[1:]]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
