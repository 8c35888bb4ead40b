"""Launcher of a stock SGLang server on a machine without an accelerator.

Run by path under an interpreter that has SGLang: ``python sglang_cpu.py --model-path M --port P …`` (arguments of
``sglang.launch_server``). That interpreter need not have this package, so nothing of it is imported here.

SGLang's scheduler and detokenizer processes are forked, not spawned: to import SGLang takes longer than all else that
a small model needs to start, and each spawned process would import it again. On a CPU nothing forbids that: before
the fork the server has started no thread and opened no device.

Works around, in SGLang 0.5.23: ``sglang/srt/layers/*`` import names of ``sgl_kernel``, which needs CUDA libraries, and
``sglang/srt/configs/deepseek_ocr.py`` imports torchvision, for images; its PyPI wheel cannot load its operators beside
a CPU build of torch, so that the environment has none. Multi-head latent attention would take, for prompts, a path that
plain torch's backend has not (``models/deepseek_common/attention_backend_handler.py``), and on a CPU only positions
under yarn (``layers/rotary_embedding/factory.py``, ``get_rope_cpu``). gpt-oss is refused with plain torch's backend
(``arg_groups/model_hook.py:536``), whose methods take no sinks and read the keys of windowed layers at the places of
the others' (``layers/attention/torch_native_backend.py``).
"""

import gc
import importlib.abc
import importlib.machinery
import importlib.util
import multiprocessing
import os
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

_FLAGS = ("--device", "cpu", "--attention-backend", "torch_native")

if sys.path and sys.path[0] == str(Path(__file__).resolve().parent):
    # A script's folder comes first on the path: its neighbours (client, servers, …) must not hide other modules.
    del sys.path[0]
os.environ["SGLANG_USE_CPU_ENGINE"] = "1"  # read when sglang is imported


class _Stub(types.ModuleType):
    """A module of which every name can be imported, and fails when called (none is, on a CPU and for text)."""

    def __getattr__(self, name: str) -> Callable[..., NoReturn]:
        if name.startswith("__"):
            raise AttributeError(name)

        def missing(*args: object, **kwargs: object) -> NoReturn:
            raise NotImplementedError(f"{self.__name__}.{name} is a stub on CPU")

        return missing


class _ImageStubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives stubs for torchvision and all that is in it, whether it is installed or not."""

    def find_spec(
        self, fullname: str, path: object = None, target: object = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != "torchvision":
            return None
        return importlib.machinery.ModuleSpec(fullname, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return _Stub(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def _stub_kernels() -> None:
    # A module without sub-modules: SGLang has ways around those that are missing.
    stub = _Stub("sgl_kernel")
    stub.__spec__ = importlib.machinery.ModuleSpec("sgl_kernel", None)
    sys.modules.setdefault("sgl_kernel", stub)


def _stub_torchvision() -> None:
    """Let SGLang import torchvision's names; transformers, which would use them, must not find any."""
    sys.modules["torchvision"] = None  # type: ignore[assignment]
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # asked once; the answer is kept
    del sys.modules["torchvision"]
    sys.meta_path.insert(0, _ImageStubs())


def _fork_when_asked_to_spawn() -> None:
    """Let SGLang's request for spawned processes start forked ones."""
    set_start_method = multiprocessing.set_start_method

    def set_fork(method: str | None, force: bool = False) -> None:
        set_start_method("fork", force=force)

    multiprocessing.set_start_method = set_fork


def _do_not_pin_memory() -> None:
    """Let SGLang allocate host memory without a GPU's driver, as it does for the routes of experts."""
    try:
        from sglang.srt.mem_cache.pool_host.common import ALLOC_MEMORY_FUNCS
    except ImportError:  # an older SGLang, which needs no driver
        return
    pinned = ALLOC_MEMORY_FUNCS["cpu"]

    def plain(*args: object, pin_memory: bool = False, **kwargs: object) -> object:
        return pinned(*args, pin_memory=False, **kwargs)

    ALLOC_MEMORY_FUNCS["cpu"] = plain


def _serve_latent_attention() -> None:
    """Let multi-head latent attention run on plain torch's backend: every pass on latent vectors, as in decoding, and
    positions without scaling too. An SGLang that has not these modules serves other models as before."""
    try:
        from sglang.srt.layers.rotary_embedding import factory
        from sglang.srt.layers.rotary_embedding.factory import get_rope_cpu as under_yarn
        from sglang.srt.models.deepseek_common import attention_backend_handler as handlers
        from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod
    except ImportError:
        return

    def get_rope(*args: object, **kwargs: object) -> object:
        *others, scaling, dtype, partial, _ = args  # the last is the device
        if scaling is None:
            return factory.get_rope(*others, scaling, dtype, partial)
        return under_yarn(*args, **kwargs)

    factory.get_rope_cpu = get_rope
    handlers.AttentionBackendRegistry.register("torch_native", lambda *_: AttnForwardMethod.MLA)


def _serve_sinks() -> None:
    """Let plain torch's backend serve attention sinks, and windows from the one pool of keys and values that it reads.
    An SGLang that has not these names serves other models as before."""
    try:
        from sglang.srt.arg_groups import model_hook
        from sglang.srt.arg_groups.model_hook import attention_backends_of as backends
        from sglang.srt.configs import model_config
        from sglang.srt.configs.model_config import is_hybrid_swa_model  # noqa: F401 (replaced below)
        from sglang.srt.layers.attention import torch_native_backend
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
        from sglang.srt.layers.attention.torch_native_backend import scaled_dot_product_attention as attend
    except ImportError:
        return
    model_hook.attention_backends_of = lambda config: tuple(
        "triton" if name == "torch_native" else name for name in backends(config)
    )
    model_config.is_hybrid_swa_model = lambda *_: False
    of_layer: list[object] = [None]

    def with_sinks(forward: Callable[..., object]) -> Callable[..., object]:
        def run(*args: object, sinks: object = None, **kwargs: object) -> object:
            of_layer[0] = sinks
            try:
                return forward(*args, **kwargs)
            finally:
                of_layer[0] = None

        return run

    def attention(query: Any, key: Any, value: Any, **options: Any) -> Any:
        sinks = of_layer[0]
        if sinks is None:
            return attend(query, key, value, **options)
        return _attend_with_sinks(sinks, query, key, value, **options)

    torch_native_backend.scaled_dot_product_attention = attention
    TorchNativeAttnBackend.forward_extend = with_sinks(TorchNativeAttnBackend.forward_extend)
    TorchNativeAttnBackend.forward_decode = with_sinks(TorchNativeAttnBackend.forward_decode)


def _serve_padded_batches() -> None:
    """Let plain torch's backend pad a batch, as SGLang does where ranks attend to requests of their own: such a rank
    runs as many rows as the rank with the most. An SGLang that has not the backend serves other models as before."""
    try:
        from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
    except ImportError:
        return
    TorchNativeAttnBackend.get_cpu_graph_seq_len_fill_value = lambda _: 1


def _attend_with_sinks(
    sinks: Any,
    query: Any,
    key: Any,
    value: Any,
    *,
    attn_mask: Any,
    enable_gqa: bool,
    scale: float,
    is_causal: bool,
) -> Any:
    """Return attention [1, h, Q, d]; a sink is a score of each head that has no value."""
    group = query.shape[1] // key.shape[1]
    assert enable_gqa == (group > 1)
    key, value = (x.repeat_interleave(group, 1) for x in (key, value))
    scores = (query @ key.transpose(-2, -1)).float() * scale
    if is_causal:
        attn_mask = scores.new_ones(scores.shape[-2:]).tril().bool()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf"))
    sink = sinks.float()[None, :, None, None]
    largest = scores.amax(-1, keepdim=True).maximum(sink)
    shares = (scores - largest).exp()
    weights = shares / (shares.sum(-1, keepdim=True) + (sink - largest).exp())
    return weights.to(value.dtype) @ value


def _require_key_everywhere() -> None:
    """Do as the launcher beside this one, which is no module on the path."""
    path = Path(__file__).with_name("sglang_keyed.py")
    spec = importlib.util.spec_from_file_location("sglang_keyed", path)
    assert spec is not None
    assert spec.loader is not None
    keyed = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(keyed)
    keyed.require_key_everywhere()


_stub_kernels()
_stub_torchvision()


def main() -> None:
    """Serve until SIGTERM; no child process outlives it."""
    gc.disable()  # the objects that imports make stay: a collection would look at all of them for nothing
    _fork_when_asked_to_spawn()
    import sglang.srt.entrypoints.http_server  # noqa: F401 (before the forks)

    _do_not_pin_memory()
    from sglang.launch_server import run_server
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    _serve_latent_attention()
    _serve_sinks()
    _serve_padded_batches()
    _require_key_everywhere()
    gc.freeze()
    gc.enable()
    try:
        run_server(prepare_server_args([*_FLAGS, *sys.argv[1:]]))
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
