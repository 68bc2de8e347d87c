"""The plan of a depth study, checked before anything runs: its shapes, the runs of each, and their folders."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.compose import compose_overrides
from conf.paths import checked, path_problems
from conf.schema import Config
from launch.depth import pipelines
from launch.depth.settings import DepthSettings, Equal, aspects_of
from launch.depth.settings import problems as problems_of_settings
from launch.depth.shapes import Shape, said, shapes_of
from launch.trainings.asked import asked_of, shape_overrides, unmeasured
from launch.trainings.recipe import keep_recipe, other_recipe, recipe_of
from launch.trainings.train_all import Training
from model.config import ModelConfig
from model.problems import BadInput
from train.length import length_of

PREFIX = "depth."
SMALL = "model=tiny_depth"
"""The preset where no model is named: for two CPU cores."""
_OF_ALL = ("train.val_every=0", "sample.tokens=0")
RATES = (0.25, 0.5, 1.0, 2.0)
"""The rates that are tried by default, as multiples of optimizer.lr."""
_SET = {
    "hydra.run.dir": "depth.dir=… says where the study is kept",
    "name": "depth.dir=… names the study, and each run in it by its shape, rate and seed",
    "resume": "the same command goes on, and a depth.dir of its own begins anew",
    "init_from": "every run begins with new weights",
    "uptrain.alpha": "every run begins with new weights",
    "train.seed": "depth.seeds=[…] would work",
}
"""Overrides that a study sets itself, and what works in their place."""
_EACH = {"optimizer.lr", "train.seed"}
"""Keys of a recipe that each run has its own value of, and its name says. Of its shape the name says layers and width
alone: the preset's, which the rest follows from, is part of the recipe."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        model: its shape by name, layers x width.
        lr: its peak learning rate.
        seed: its train.seed.
    """

    model: str
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of the run's folder."""
        return f"{self.model}-lr{self.lr!r}-s{self.seed}"


@dataclass(frozen=True)
class Plan:
    """A study that can begin.

    Attributes:
        settings: of the study.
        config: of the preset's run, whose shape, rate and seed stand for nothing.
        base: the overrides that all runs share.
        shapes: those of each equality, the shallowest first; the preset's is in each.
        missing: a sentence for each aspect that has no shape.
        folder: of the study.
    """

    settings: DepthSettings
    config: Config
    base: list[str]
    shapes: list[Shape]
    missing: list[str]
    folder: Path

    @property
    def models(self) -> dict[str, ModelConfig]:
        """The models by name, each once, the shallowest first."""
        found = {shape.name: shape.model for shape in self.shapes}
        return dict(sorted(found.items(), key=lambda item: (item[1].n_layers, -item[1].d_model)))

    @property
    def lrs(self) -> list[float]:
        """The rates that are tried, ascending."""
        if self.settings.lrs is not None:
            return sorted(self.settings.lrs)
        return [float(f"{self.config.optimizer.lr * times:.6g}") for times in RATES]

    @property
    def steps(self) -> int:
        """The steps of each run."""
        return length_of(self.config).steps

    @property
    def tokens(self) -> int:
        """The tokens of each run."""
        return int(length_of(self.config).tokens_after(self.steps))

    def first(self) -> list[Setting]:
        """Return the runs that try rates, all with the first seed; the deepest, which take longest, begin."""
        seed = self.settings.seeds[0]
        return [Setting(name, lr, seed) for name in reversed(self.models) for lr in self.lrs]

    def others(self, rates: Mapping[str, float]) -> list[Setting]:
        """Return the runs with the other seeds.

        Args:
            rates: the rate of each model, by name; one that has none diverged at all of them, and is left out.
        """
        return [Setting(name, rates[name], seed)
                for name in reversed(self.models) if name in rates for seed in self.settings.seeds[1:]]  # fmt: skip

    def training(self, setting: Setting) -> Training:
        """Return a setting as a run of its own folder; at a rate that is tried it may diverge, which is a result."""
        overrides = [
            *self.base,
            *shape_overrides(self.models[setting.model]),
            f"optimizer.lr={setting.lr!r}",
            f"train.seed={setting.seed}",
        ]
        run_dir = self.folder / "runs" / setting.name
        return Training(f"{self.folder.name}-{setting.name}", run_dir, tuple(overrides), may_diverge=True)

    def keep_recipe(self) -> None:
        """Write the recipe of the runs into the study's folder."""
        keep_recipe(self.folder, recipe_of(self.config, _EACH))


def plan(overrides: Sequence[str]) -> Plan:
    """Check a study's command, without preparing data; `launch.trainings.problems_of` judges each run.

    Args:
        overrides: ``depth.…`` and those of every run, whose model is `SMALL` where none is named.

    Raises:
        BadInput: the study cannot work; it lists every problem.
    """
    asked = asked_of(overrides, DepthSettings, PREFIX, _SET)
    settings, given = asked.settings, asked.keys
    problems = [*asked.problems, *problems_of_settings(settings), *asked.refused]
    if settings.lrs is not None and "optimizer.lr" in given:
        problems.append("optimizer.lr: depth.lrs says which rates are tried; either of the two alone would work")
    if problems:
        raise BadInput(problems)
    small = [SMALL] if not given & {"model", "--config-name"} else []
    # One replica for a run, whatever else of its layout is given, so that several runs share the machine.
    alone = [] if "parallel.dp" in given else ["parallel.dp=1"]
    base = [*small, *alone, *_OF_ALL, *asked.rest]
    composition = compose_overrides(base)
    config = composition.config
    problems = list(composition.problems) + config.model.problems()
    if config.parallel.dp is None:
        problems.append("parallel.dp=null: each run would take the whole machine; parallel.dp=1 would work")
    if config.train.seq_len < 1:
        problems.append(f"train.seq_len={config.train.seq_len}: must be at least 1")
    if problems:
        raise BadInput(problems)
    default = f"runs/depth-{config.name}"
    folder = checked("depth.dir", default if settings.dir is None else settings.dir)
    shapes, missing = shapes_of(config.model, settings.equal, aspects_of(settings)[0], config.train.seq_len)
    found = Plan(settings, config, base, shapes, missing, folder)
    if problems := _problems(found):
        raise BadInput(problems)
    return found


def _problems(found: Plan) -> list[str]:
    settings, config = found.settings, found.config
    problems = path_problems("depth.dir", found.folder) + unmeasured(config)
    for pp in settings.pp:
        problems += [
            one for one in pipelines.problems(config.parallel, pp, settings.micro_batches) if one not in problems
        ]
    if settings.aspects is not None:  # else what is not there is said, and the others are compared
        problems += [f"depth.aspects: {one}; {_works(found, one)}" for one in found.missing]
    for equal in settings.equal:
        if sum(shape.equal is equal for shape in found.shapes) < 2:
            problems.append(
                f"depth.equal={equal.value}: the preset has no shape to be compared with; one of more layers, or "
                "other depth.aspects, would work"
            )
    return problems + other_recipe("depth.dir", found.folder, recipe_of(config, _EACH))


def _works(found: Plan, problem: str) -> str:
    """Say which aspects the preset has shapes of, at the equality that a problem names."""
    (equal,) = [one for one in Equal if f"at equal {one.value}:" in problem]
    there, _ = shapes_of(found.config.model, [equal], aspects_of(DepthSettings())[0], found.config.train.seq_len)
    return f"{', '.join(said(shape.aspect) for shape in there)} would work"
