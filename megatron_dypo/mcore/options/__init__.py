"""Megatron's own options: the ``megatron`` mappings of the config, checked against the installed version."""
