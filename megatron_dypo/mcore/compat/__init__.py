"""Private names of torch and Megatron that we use, and patches of them: all in this folder, one subject a file.

A private name may change in any release. Each is a :class:`~megatron_dypo.mcore.compat.private_name.PrivateName`, which
says where upstream defines it and from which version on it is as we use it; ``tests/unit/mcore/test_compat.py`` fails
when upstream changes it, and when a private name is used anywhere else.

SGLang's processes, which have no Megatron, import ``groups`` and ``storages`` for the refit.
"""
