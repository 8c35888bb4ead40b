"""Which quantised weights a refit can write into a running server."""

from __future__ import annotations

from collections.abc import Sequence

from megatron_dypo.models.quantized.names import Quantization


def refusal(quantization: Quantization, device_kind: str, capability: Sequence[int] | None) -> str | None:
    """Return why a refit cannot write weights of this kind into a server, or None.

    Args:
        device_kind: ``cpu`` or ``cuda``.
        capability: compute capability of the server's GPU; None on a CPU.

    Read in SGLang 0.5.23: ``layers/quantization/fp8.py`` and ``compressed_tensors`` replace some weights after loading.
    """
    if device_kind == "cpu" or quantization == "none":
        return None
    if quantization == "fp8_channel":
        return "on a GPU SGLang keeps such weights transposed, and a refit would write into the wrong places: fp8_block"
    if capability is not None and capability[0] >= 10:
        return f"on compute capability {capability[0]} SGLang packs the scales of fp8_block: only none can be refitted"
    return None
