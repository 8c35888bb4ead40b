"""Import what most ranks need, once, in the process from which they are forked. No import may start a thread."""

from megatron_dypo.mcore import features

features.shield_imports()

import megatron.core.dist_checkpointing  # noqa: E402, F401
import torch.distributed.checkpoint  # noqa: E402, F401

import megatron_dypo.mcore.bridged.package as bridged  # noqa: E402
import megatron_dypo.mcore.checkpoints.checkpoint  # noqa: E402
import megatron_dypo.mcore.forward_step  # noqa: E402
import megatron_dypo.mcore.model  # noqa: E402
import megatron_dypo.mcore.optimizer  # noqa: E402
import megatron_dypo.refit.refitter  # noqa: E402, F401
import tests.support.hf_models  # noqa: E402, F401

if bridged.is_installed():  # in the tests of models that Megatron-Bridge names
    bridged.import_bridge()
