"""Samples as bytes, to be sent between ranks and stored in checkpoints.

All fields of :class:`megatron_dypo.types.Sample` and all token weights are included: arrays as safetensors tensors,
everything else as JSON in the header.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
from safetensors import numpy as safetensors_numpy

from megatron_dypo.json_text import parse_json
from megatron_dypo.types import Sample, SampleKind, Treatment

_FIELDS = tuple(field.name for field in fields(Sample) if field.name != "weights")


def dump_samples(samples: Sequence[Sample]) -> bytes:
    """Return ``samples`` as safetensors bytes."""
    tensors: dict[str, np.ndarray] = {}
    headers = []
    for index, sample in enumerate(samples):
        header, arrays = _split({name: getattr(sample, name) for name in _FIELDS})
        weights, weight_arrays = _split(sample.weights or {})
        tensors |= {f"{index}.{name}": np.ascontiguousarray(array) for name, array in arrays.items()}
        tensors |= {f"{index}.weights.{name}": np.ascontiguousarray(array) for name, array in weight_arrays.items()}
        header["treatment"], header["kind"] = sample.treatment.value, sample.kind.value
        header["weights"] = None if sample.weights is None else weights
        headers.append(header)
    return safetensors_numpy.save(tensors, metadata={"samples": json.dumps(headers)})


def load_samples(data: bytes) -> list[Sample]:
    """Return the samples of :func:`dump_samples`."""
    header_size = int.from_bytes(data[:8], "little")
    headers = parse_json(parse_json(data[8 : 8 + header_size])["__metadata__"]["samples"])
    for name, array in safetensors_numpy.load(data).items():
        index, *sections, field = name.split(".", 2)
        (headers[int(index)]["weights"] if sections else headers[int(index)])[field] = array
    return [
        Sample(**{**header, "treatment": Treatment(header["treatment"]), "kind": SampleKind(header["kind"])})
        for header in headers
    ]


def without_arrays(sample: Sample) -> Sample:
    """Return a copy that carries tokens and routes only, for a forward pass."""
    return replace(
        sample, rollout_logp=None, old_logp=None, old_entropy=None, ref_logp=None, teacher_logp=None, weights=None
    )


def without_routes(sample: Sample) -> Sample:
    """Return a copy without routes, which only some ranks need, and each of them a part."""
    return sample if sample.routes is None else replace(sample, routes=None)


def _split(values: Any) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Split values into (numbers and texts, arrays)."""
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    rest = {name: value for name, value in values.items() if name not in arrays}
    return {name: value.item() if isinstance(value, np.generic) else value for name, value in rest.items()}, arrays
