"""Which layers each pipeline stage and each of its chunks holds: the one place that knows. Pure, without torch and Megatron.

The rules are Megatron's (``TransformerConfig.__post_init__`` and ``get_transformer_layer_offset`` of 0.16.1, for
``num_layers_in_first_pipeline_stage`` and ``num_layers_in_last_pipeline_stage``): stages that are not named share out the
rest evenly; a stage's layers are shared out evenly over its chunks; layers run through the first chunk of every stage,
then through the second of every stage, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_dypo.checks import require, require_positive


@dataclass(frozen=True, kw_only=True)
class PipelineCut:
    """How layers are laid out over a pipeline; the fields are those of ``ParallelConfig``."""

    pipeline: int = 1
    virtual_pipeline: int = 1
    """Model chunks on each stage; 1: not interleaved."""
    first_stage_layers: int | None = None
    """None: as many as on the stages between first and last."""
    last_stage_layers: int | None = None

    def __post_init__(self) -> None:
        require_positive(self, "pipeline", "virtual_pipeline")
        for name, value in self._named().items():
            require_positive(self, name)
            require(self.pipeline > 1, f"{name}={value}", "needs pipeline > 1")
            require(
                value % self.virtual_pipeline == 0,
                f"{name}={value}",
                f"virtual_pipeline={self.virtual_pipeline} must divide it: the chunks of a stage are equally large",
            )

    def stage_layers(self, num_layers: int) -> list[int]:
        """Number of layers of each stage.

        Raises:
            ValueError: layers that cannot be laid out so, e.g. ``parallel.pipeline=4 does not divide
                num_hidden_layers=94: …``.
        """
        named, each = self._named(), self._layers_between(num_layers)
        layers = [each] * self.pipeline
        layers[0] = named.get("first_stage_layers", each)
        layers[-1] = named.get("last_stage_layers", layers[-1])
        return layers

    def chunks(self, num_layers: int) -> list[list[range]]:
        """``[stage][chunk]`` → global indices of its layers.

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

    def _named(self) -> dict[str, int]:
        """The fields that give a stage layers of its own."""
        fields = {"first_stage_layers": self.first_stage_layers, "last_stage_layers": self.last_stage_layers}
        return {name: value for name, value in fields.items() if value is not None}

    def _layers_between(self, num_layers: int) -> int:
        """Layers of each stage that no field names; 0 where there is none."""
        named = self._named()
        others, rest = self.pipeline - len(named), num_layers - sum(named.values())
        model, chunks = f"num_hidden_layers={num_layers}", others * self.virtual_pipeline
        fields = ", ".join(f"parallel.{name}={value}" for name, value in named.items())
        if others == 0:
            require(rest == 0, fields, f"must add up to {model}, since there is no other stage")
            return 0
        if not named:
            self._check_even(num_layers)
        require(rest > 0, fields, f"leaves none of {model} to {_stages(others)}")
        whose = f"{_stages(others)} of {self.virtual_pipeline} chunks" if self.virtual_pipeline > 1 else _stages(others)
        require(rest % chunks == 0, fields, f"leaves {rest} of {model}, which {whose} cannot share evenly")
        return rest // others

    def _check_even(self, num_layers: int) -> None:
        axes = "parallel.pipeline" + (" × virtual_pipeline" if self.virtual_pipeline > 1 else "")
        size = self.pipeline * self.virtual_pipeline
        if num_layers % size == 0:
            return
        problem = f"{axes}={size} does not divide num_hidden_layers={num_layers}"
        if num_layers % self.virtual_pipeline == 0 and num_layers > size:
            problem += (
                "; parallel.first_stage_layers and parallel.last_stage_layers give these stages layers of their own, "
                "and the others share the rest"
            )
        raise ValueError(problem)


def _stages(count: int) -> str:
    return f"the {count} other stages" if count > 1 else "the other stage"
