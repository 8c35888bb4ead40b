"""The mesh of the trainer's ranks: sizes of its axes, position of each rank, and layers of each stage.

Pure, without torch or Megatron. The trainer, the planner, the converters and the plan of a refit all use it.

Ranks are numbered as in Megatron. The axes, the fastest first, are tensor, context, data, pipeline. The experts of a
pipeline stage are spread over all its ranks: expert_tensor, expert, copies of all experts. A *replica* is one whole
copy of the policy: the ranks with the same ``dp_rank``.

Layers follow Megatron's rules (``TransformerConfig.__post_init__`` and ``get_transformer_layer_offset`` of 0.16.1):
stages without a given number of layers share the rest evenly; the chunks of a stage have equal size; layers are
assigned to the first chunk of every stage in turn, then to the second chunk of every stage, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.checks import require, require_divides, require_positive
from megatron_dypo.parallel.position import Position

_AXES = ("tensor", "pipeline", "virtual_pipeline", "context", "data", "expert", "expert_tensor")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """Sizes of the axes. Every field means the same as in ``ParallelConfig``."""

    tensor: int = 1
    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks on each pipeline stage; 1: not interleaved."""
    context: int = 1
    data: int = 1
    """Replicas of the policy."""
    expert: int = 1
    """Ranks over which the experts of a layer are spread. They may belong to several replicas."""
    expert_tensor: int = 1
    """Ranks over which each of these experts is split."""
    first_stage_layers: int | None = None
    """Layers of the first stage; None: as many as the stages between first and last."""
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, *_AXES)
        require(
            self.stage_size % self.expert_ranks == 0,
            f"expert × expert_tensor = {self.expert} × {self.expert_tensor}",
            f"does not divide the {self.stage_size} ranks of a pipeline stage",
        )
        for name, value in self._given_layers().items():
            require_positive(self, name)
            require(self.pipeline > 1, f"{name}={value}", "needs pipeline > 1")
            require(
                value % self.virtual_pipeline == 0,
                f"{name}={value}",
                f"virtual_pipeline={self.virtual_pipeline} must divide it: the chunks of a stage are equally large",
            )

    @property
    def stage_size(self) -> int:
        """Return the number of ranks of one pipeline stage, over all replicas."""
        return self.tensor * self.context * self.data

    @property
    def world_size(self) -> int:
        """Return the number of all ranks."""
        return self.stage_size * self.pipeline

    @property
    def expert_ranks(self) -> int:
        """Return the number of ranks that hold all experts of a stage once."""
        return self.expert * self.expert_tensor

    @property
    def replicas_share_experts(self) -> bool:
        """Return whether tokens of one replica are computed by experts of another.

        The ranks that hold all experts once are neighbours in their stage, as are those of a replica.
        """
        return self.expert_ranks > 1 and (self.tensor * self.context) % self.expert_ranks != 0

    def at(self, rank: int) -> Position:
        """Return the position of global rank ``rank``.

        Raises:
            ValueError: the mesh has no such rank.
        """
        return Position(mesh=self, rank=rank)

    def replica_ranks(self, dp_rank: int) -> tuple[int, ...]:
        """Return the global ranks of one replica, ascending. The first is its leader."""
        inner = self.tensor * self.context
        starts = (stage * self.stage_size + dp_rank * inner for stage in range(self.pipeline))
        return tuple(start + offset for start in starts for offset in range(inner))

    def sender_ranks(self) -> tuple[int, ...]:
        """Return the global ranks that send or export the policy, ascending. Together they hold it exactly once.

        On each stage these are the first tensor-parallel group and the first copy of the experts.
        """
        return tuple(rank for rank in range(self.world_size) if self.at(rank).is_sender)

    def stage_layers(self, num_layers: int) -> list[int]:
        """Return the number of layers of each stage.

        Raises:
            ValueError: the layers do not fit, e.g. ``parallel.pipeline=4 does not divide num_hidden_layers=94``.
        """
        given, each = self._given_layers(), self._layers_between(num_layers)
        layers = [each] * self.pipeline
        layers[0] = given.get("first_stage_layers", each)
        layers[-1] = given.get("last_stage_layers", layers[-1])
        return layers

    def chunks(self, num_layers: int) -> list[list[range]]:
        """Return ``[stage][chunk]`` → global indices of its layers.

        Raises:
            ValueError: as :meth:`stage_layers`.
        """
        sizes = [count // self.virtual_pipeline for count in self.stage_layers(num_layers)]
        rounds = [chunk * sum(sizes) for chunk in range(self.virtual_pipeline)]
        firsts = [sum(sizes[:stage]) for stage in range(self.pipeline)]
        return [
            [range(start + first, start + first + size) for start in rounds]
            for first, size in zip(firsts, sizes, strict=True)
        ]

    def layers_of(self, stage: int, num_layers: int) -> list[int]:
        """Return the global indices of the layers of a stage, ascending.

        Raises:
            ValueError: as :meth:`stage_layers`.
        """
        return [layer for chunk in self.chunks(num_layers)[stage] for layer in chunk]

    def _given_layers(self) -> dict[str, int]:
        """Return the fields that give a stage a number of layers, by name."""
        fields = {"first_stage_layers": self.first_stage_layers, "last_stage_layers": self.last_stage_layers}
        return {name: value for name, value in fields.items() if value is not None}

    def _layers_between(self, num_layers: int) -> int:
        """Return the number of layers of each stage for which no field gives it; 0 if there is no such stage."""
        given = self._given_layers()
        others, rest = self.pipeline - len(given), num_layers - sum(given.values())
        model, chunks = f"num_hidden_layers={num_layers}", others * self.virtual_pipeline
        fields = ", ".join(f"parallel.{name}={value}" for name, value in given.items())
        if others == 0:
            require(rest == 0, fields, f"must add up to {model}, since there is no other stage")
            return 0
        if not given:
            self._check_even(num_layers)
        require(rest > 0, fields, f"leaves none of {model} to {_stages(others)}")
        whose = f"{_stages(others)} of {self.virtual_pipeline} chunks" if self.virtual_pipeline > 1 else _stages(others)
        require(rest % chunks == 0, fields, f"leaves {rest} of {model}, which {whose} cannot share evenly")
        return rest // others

    def _check_even(self, num_layers: int) -> None:
        """Require that the chunks of all stages divide the layers; name a remedy if there is one."""
        axes = "parallel.pipeline" + (" × virtual_pipeline" if self.virtual_pipeline > 1 else "")
        size, way_out = self.pipeline * self.virtual_pipeline, ""
        if num_layers % self.virtual_pipeline == 0 and num_layers > size:
            way_out = (
                "; parallel.first_stage_layers and parallel.last_stage_layers set the layers of these stages, "
                "and the others share the rest"
            )
        require_divides(axes, size, "num_hidden_layers", num_layers, hint=way_out)


def _stages(count: int) -> str:
    return f"the {count} other stages" if count > 1 else "the other stage"
