"""A job to plan: a model, the rank grid that trains it, and the settings of its engine."""

from dataclasses import dataclass
from functools import cached_property, lru_cache

from model.config import ModelConfig
from parallel.engine import EngineSettings
from parallel.layout import Layout
from parallel.schedules import Placement
from parallel.stages import Stage, split_for


@dataclass(frozen=True)
class Job:
    """A model on a rank grid, with the settings of `parallel.engine.build_engine`.

    Attributes:
        model: the whole model's shape.
        layout: the rank grid.
        settings: micro-batch, accumulation, precision, recomputation, schedule and the rest.
        cut_at: the tokens of a sequence at whose FLOPs the stages are cut, where a run has steps of several lengths;
            None for those of the settings.
    """

    model: ModelConfig
    layout: Layout
    settings: EngineSettings
    cut_at: int | None = None

    @property
    def placement(self) -> Placement:
        """The placement of the stages on the ranks of a pipeline."""
        return self.settings.placement or Placement(self.layout.pp)

    @cached_property
    def stages(self) -> list[Stage]:
        """The stages, cut by FLOPs."""
        flops = self.model.layer_flops(self.cut_at or self.settings.seq_len)
        return list(_cut(tuple(map(float, flops)), self.placement))

    @property
    def tokens_per_step(self) -> int:
        """The tokens of a step of all replicas."""
        settings = self.settings
        return settings.accumulation * settings.micro_batch * settings.seq_len * self.layout.dp


@lru_cache(maxsize=1024)
def _cut(costs: tuple[float, ...], placement: Placement) -> tuple[Stage, ...]:
    """Cut the layers once for all jobs that cut them alike: a search plans thousands."""
    return tuple(split_for(costs, placement))
