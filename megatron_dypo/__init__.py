"""DYPO (Dynamic Policy Optimization, arXiv 2604.08926) for Megatron-Core and SGLang."""

__version__ = "0.1.0"
