"""The input of a plan: a config, an architecture, a number of GPUs, and assumptions about the data."""

from __future__ import annotations

import dataclasses
import functools
import math
from dataclasses import dataclass

from megatron_dypo.checks import require
from megatron_dypo.config.tree import Config
from megatron_dypo.models.architecture import Architecture
from megatron_dypo.models.bridged import tabled_architecture
from megatron_dypo.models.layout_rules import check_fp8_sizes, check_layout
from megatron_dypo.parallel.mesh import Mesh
from megatron_dypo.planning.constants import FITTED, Constants
from megatron_dypo.planning.devices import Gpu
from megatron_dypo.planning.fp8 import Quantized, quantized
from megatron_dypo.planning.groups import MeanGroup, mean_group
from megatron_dypo.planning.lengths import sequences_per_microbatch
from megatron_dypo.refit.plan.flags import mesh_of_flags
from megatron_dypo.refit.plan.server_mesh import ServerMesh
from megatron_dypo.types import Tier


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Facts that no config contains. Guess them before a first run, and measure them in it."""

    prompt_tokens: int
    """Mean length of a prompt."""
    response_tokens: int
    """Mean length of a rollout, and of a teacher's trace."""
    easy: float = 0.25
    """Share of Easy prompts."""
    hard: float = 0.25
    """Share of Hard prompts. All other prompts are Mid."""


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A run on a cluster."""

    config: Config
    arch: Architecture
    gpu: Gpu
    gpus_per_node: int
    trainer_gpus: int
    num_servers: int
    """Number of SGLang servers, each with ``rollout.servers.tensor_parallel`` GPUs."""
    assumed: Assumptions
    constants: Constants = FITTED
    frees_trainer: bool = False
    """Whether the trainer's weights and optimizer leave the GPU while servers on it sample. Ours stay; other trainers'
    leave."""
    output_passes: int = 4
    """Matmuls of the output layer in an update, in forward passes. Ours computes logits twice (``fused_logprobs``);
    trainers that keep them need 3."""
    balanced_output: bool = False
    """Whether the last stage has fewer layers by as much as the output layer takes, in a layout that ``parallel``
    cannot describe (interleaved, in some published runs)."""
    fused: bool = True
    """Whether layers are Transformer Engine's (see ``planning/activations.py``)."""
    on_gpu: bool = True
    """Whether ranks run on GPUs. On CPUs, as in tests, no memory is reserved besides the tensors."""

    @property
    def server_mesh(self) -> ServerMesh:
        """Return the mesh of a server. Raises ValueError for sizes that do not suit each other."""
        servers = self.config.rollout.servers
        return mesh_of_flags(servers.tensor_parallel, servers.extra_args)

    @property
    def element(self) -> int:
        return self.config.model.element_size

    @property
    def quantized(self) -> Quantized | None:
        """Return the costs of the tensors that ``model.fp8`` quantises; None without FP8."""
        return quantized(self.config.model.fp8, self.gpu.capability)

    @functools.cached_property
    def mesh(self) -> Mesh:
        """Return the trainer's mesh."""
        return self.config.parallel.mesh(self.trainer_gpus)

    @property
    def data(self) -> int:
        """Return the number of data-parallel replicas."""
        return self.mesh.data

    @property
    def is_colocated(self) -> bool:
        """Return whether the servers are on the trainer's GPUs."""
        return self.config.refit.offload_servers

    @property
    def gpus(self) -> int:
        """Return the number of all GPUs."""
        return self.trainer_gpus + (0 if self.is_colocated else self.rollout_gpus)

    @property
    def rollout_gpus(self) -> int:
        return self.num_servers * self.config.rollout.servers.tensor_parallel

    @property
    def longest_sequence(self) -> int:
        cfg = self.config
        return cfg.data.max_prompt_tokens + max(cfg.rollout.max_new_tokens, cfg.data.max_trace_tokens)

    @property
    def row_tokens(self) -> int:
        """Return the tokens of the longest microbatch, over all context-parallel ranks together.

        A sequence that is longer than the budget gets a microbatch of its own.
        """
        return max(self.config.batching.tokens_per_microbatch, self.longest_sequence)

    @property
    def mid(self) -> float:
        return 1 - self.assumed.easy - self.assumed.hard

    @functools.cached_property
    def group(self) -> MeanGroup:
        """Return what the objective makes of a prompt in the run's last step, on average over the tiers."""
        shares = {Tier.EASY: self.assumed.easy, Tier.MID: self.mid, Tier.HARD: self.assumed.hard}
        cfg = self.config
        return mean_group(cfg.objective, cfg.rollout.group_size, shares, step=cfg.run.steps - 1)

    @property
    def sequences_per_update(self) -> float:
        """Count the rollouts and traces that an update learns from."""
        return self.config.batching.prompts_per_update * self.group.sequences / self.group.learned

    @property
    def sequence_tokens(self) -> int:
        """Return the mean length of a sequence in an update."""
        return self.assumed.prompt_tokens + self.assumed.response_tokens

    def microbatches_of(self, sequences: float) -> float:
        """Return the number of microbatches of a replica in a pass over ``sequences`` sequences, for its time.

        Unlike ``microbatches``, which counts the tokens of full microbatches, it leaves room where no sequence fits.
        """
        cfg, assumed = self.config, self.assumed
        limit = max(cfg.rollout.max_new_tokens, assumed.response_tokens)
        budget = cfg.batching.tokens_per_microbatch
        each = sequences_per_microbatch(assumed.prompt_tokens, assumed.response_tokens, limit, budget)
        count = max(1, math.ceil(sequences / self.data / each))
        step = cfg.parallel.pipeline if cfg.parallel.virtual_pipeline else 1
        return -(-count // step) * step

    @property
    def microbatches(self) -> int:
        """Return the number of microbatches of one update on a replica."""
        tokens = self.sequences_per_update * self.sequence_tokens / self.data
        count = max(1, math.ceil(tokens / self.config.batching.tokens_per_microbatch))
        step = self.config.parallel.pipeline if self.config.parallel.virtual_pipeline else 1
        return -(-count // step) * step


def make_setting(
    config: Config,
    gpu: Gpu,
    *,
    nodes: int | None = None,
    gpus_per_node: int = 8,
    prompt_tokens: int | None = None,
    response_tokens: int | None = None,
    arch: Architecture | None = None,
) -> Setting:
    """Return the setting of a config.

    Args:
        nodes: number of trainer nodes. None: ``parallel.num_processes`` GPUs, or the fewest that the axes allow.
        prompt_tokens, response_tokens: mean lengths. None: a quarter of the limits in the config.
        arch: the model. None: that of ``<model.hf_path>/config.json``.

    Raises:
        ValueError: the model folder has no ``config.json``, or the layout does not suit the model, the GPUs or the FP8
            recipe.
    """
    arch, parallel, servers = (
        arch or tabled_architecture(config.model, "megatron-dypo plan"),
        config.parallel,
        config.rollout.servers,
    )
    check_layout(arch, parallel)
    check_fp8_sizes(arch, parallel, config.model.fp8)
    asked = nodes * gpus_per_node if nodes else parallel.num_processes
    setting = Setting(
        config=config,
        arch=arch,
        gpu=gpu,
        gpus_per_node=gpus_per_node,
        trainer_gpus=asked or 0,
        num_servers=servers.num_servers(gpus_per_node),
        assumed=Assumptions(
            prompt_tokens=prompt_tokens or max(1, config.data.max_prompt_tokens // 4),
            response_tokens=response_tokens or max(1, config.rollout.max_new_tokens // 4),
        ),
    )
    fewest = parallel.fewest_ranks
    rule = f"must be a multiple of {fewest}, which the axes of parallel need at least"
    require(setting.trainer_gpus % fewest == 0, f"{asked} trainer GPUs", rule)
    return setting if asked else dataclasses.replace(setting, trainer_gpus=fewest)
