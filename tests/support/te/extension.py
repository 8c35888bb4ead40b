"""A stand-in for Transformer Engine's compiled extension, ``transformer_engine_torch``: names that compute nothing.

Importing Transformer Engine's Python asks the extension for types, enumerations and functions. Classes of the extension
can be made and subclassed; a function raises when it is called, unless ``_ANSWERS`` has its answer.
"""

from __future__ import annotations

import enum
import importlib.machinery
import types
from typing import Any, NoReturn

NAME = "transformer_engine_torch"

_DTYPE = {
    "kByte": 0,
    "kInt32": 2,
    "kFloat32": 4,
    "kFloat16": 5,
    "kBFloat16": 6,
    "kFloat8E4M3": 7,
    "kFloat8E5M2": 8,
    "kFloat4E2M1": 10,
}
_GEMM_TENSORS = ("INPUT", "WEIGHT", "OUTPUT")
_GRAD_TENSORS = ("GRAD_OUTPUT", "GRAD_INPUT")
_ENUMS = {
    "DType": _DTYPE,
    "FP8FwdTensors": {f"GEMM{i + 1}_{name}": 3 * i + j for i in range(3) for j, name in enumerate(_GEMM_TENSORS)},
    "FP8BwdTensors": {f"{name}{i + 1}": 2 * i + j for i in range(3) for j, name in enumerate(_GRAD_TENSORS)},
}
"""Enumerations whose values are indices in Transformer Engine's Python."""

_ANSWERS = {
    "get_num_cublas_streams": 4,
    "get_cublasLt_version": 120_000,
    "get_cudnn_version": 91_200,
    "ubuf_built_with_mpi": False,
}


class StandIn(types.ModuleType):
    """A module that makes each name when it is first asked for."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.__spec__ = importlib.machinery.ModuleSpec(name, None)
        self.__file__ = "a stand-in without code"
        if name == NAME:  # Transformer Engine imports * of it
            for known in (*_ENUMS, *_ANSWERS):
                getattr(self, known)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        made = _make(f"{self.__name__}.{name}")
        setattr(self, name, made)
        return made


def _make(path: str) -> Any:
    name = path.rpartition(".")[2]
    if name in _ENUMS:
        return enum.IntEnum(name, _ENUMS[name])
    if name in _ANSWERS:
        return lambda *args, **kwargs: _ANSWERS[name]
    if name[0].isupper():
        return _Members(name, (_Opaque,), {})

    def absent(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{path} was called: its stand-in computes nothing")

    return absent


class _Opaque:
    """An object of a class of the extension."""

    number = 0
    """Value, if the object is a member of an enumeration."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __int__(self) -> int:
        return self.number


class _Members(type):
    """A class of the extension. As an enumeration it has every member that it is asked for, numbered in that order."""

    def __getattr__(cls, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        member = cls()
        member.number = len(cls.__members__)
        setattr(cls, name, member)
        return member

    @property
    def __members__(cls) -> dict[str, Any]:
        return {name: value for name, value in vars(cls).items() if isinstance(value, cls)}
