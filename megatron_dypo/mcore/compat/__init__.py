"""All uses of private names of torch and Megatron, and all patches of them, one subject for each file.

A private name may change in any release. Each is a :class:`~megatron_dypo.mcore.compat.private_name.PrivateName`, which
records where upstream defines it and the first version that suits this package. ``tests/unit/mcore/test_compat.py``
fails if upstream changes a name, or if a private name is used elsewhere.

SGLang's processes, which have no Megatron, import ``groups`` and ``storages`` for the refit.
"""
