"""The plan of a scaling study, checked before anything runs: the runs that it trains, and their folders."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.compose import compose_overrides
from conf.paths import checked, path_problems
from conf.schema import Config
from launch.scaling.fits import PowerLaw
from launch.scaling.ladder import Ladder, Shape, shapes_of
from launch.scaling.laws import M_OPT
from launch.scaling.settings import ScalingSettings
from launch.scaling.settings import problems as problems_of_settings
from launch.trainings.asked import asked_of, unmeasured
from launch.trainings.recipe import keep_recipe, other_recipe, recipe_of
from launch.trainings.train_all import Training
from model.problems import BadInput

PREFIX = "scaling."
ISOFLOP = "isoflop"
"""The folder of the IsoFLOP runs."""
SMALL = (
    "model=tiny_mha",
    "model.head_dim=16",  # so that widths, multiples of it, lie close together
    "model.vocab_size=288",  # bytes, 15 special tokens and few merges: an embedding that M does not count stays small
    "model.init_std=0.1",  # about 1 / sqrt(d_model): narrow models begin slowly with less
    "model.max_seq_len=128",
    "train.seq_len=128",
    "train.micro_batch=4",
    "train.val_sequences=1024",
    "train.spike_sigmas=null",  # batches of a thousand tokens are uneven, and a rate that is too high is to be seen
    "schedule.warmup_steps=100",
)
"""The recipe where no model is named: for two CPU cores."""
_OF_ALL = ("train.val_every=0", "sample.tokens=0")
_SET = {
    "hydra.run.dir": "scaling.dir=… says where the study is kept",
    "name": "scaling.dir=… names the study, and each run in it by its setting",
    "resume": "the same command goes on, and a scaling.dir of its own begins anew",
    "init_from": "every run begins with new weights",
    "uptrain.alpha": "every run begins with new weights",
    "train.total_tokens": "scaling.budgets=[…] says what each run may cost, and tokens follow",
    "train.max_steps": "scaling.budgets=[…] says what each run may cost, and steps follow",
    "train.seed": "scaling.seeds=[…] would work",
    "data.stages": "each run has a length of its own; data.sources with weights would work",
    "model.d_ff": "the width of a feed-forward network is 8/3 of the model's",
}
"""Overrides that a study sets itself, and what works in their place."""
_OF_GRID = {"optimizer.lr": "scaling.rates", "train.global_batch": "scaling.batches"}
FEWEST_STEPS = 20
"""Of a run; with fewer, rounding its tokens to whole steps would change its compute by more than 2.5 %."""
_EACH = {"model.n_layers", "model.d_model", "optimizer.lr", "train.global_batch", "train.total_tokens", "train.seed"}
"""Keys of a recipe that each run has its own value of."""


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        kind: ``rate``, of the grid of rates and batches, or ``isoflop``.
        budget: the compute that it is asked to cost, in FLOPs.
        shape: of its model.
        m: its M, FLOPs a token.
        lr: its peak learning rate.
        global_batch: its sequences of a step.
        seq_len: their tokens.
        seed: its train.seed.
    """

    kind: str
    budget: float
    shape: Shape
    m: int
    lr: float
    global_batch: int
    seq_len: int
    seed: int

    @property
    def steps(self) -> int:
        """The steps whose compute is nearest to the budget."""
        return max(1, round(self.budget / self.m / (self.global_batch * self.seq_len)))

    @property
    def tokens(self) -> int:
        """The tokens of those steps."""
        return self.steps * self.global_batch * self.seq_len

    @property
    def compute(self) -> float:
        """The FLOPs M D that they cost."""
        return float(self.m) * self.tokens

    @property
    def name(self) -> str:
        """The name of the run's folder; another value of anything that makes it is another name."""
        budget = f"{self.budget:g}".replace("+", "")
        return f"{self.kind}-{budget}-{self.shape}-b{self.global_batch}-lr{self.lr:g}-s{self.seed}"


@dataclass(frozen=True)
class Laws:
    """Where the IsoFLOP runs get their rate and batch: fitted power laws, held to what the grid has tried.

    Attributes:
        lr: the rate by compute.
        batch_tokens: the batch by compute, in tokens.
    """

    lr: PowerLaw
    batch_tokens: PowerLaw


@dataclass(frozen=True)
class Plan:
    """A study that can begin.

    Attributes:
        settings: of the study.
        config: of the recipe; what each run has its own value of stands for nothing.
        base: the overrides that all runs share.
        ladder: its models.
        shapes: the models of each budget of IsoFLOP runs.
        folder: of the study.
    """

    settings: ScalingSettings
    config: Config
    base: list[str]
    ladder: Ladder
    shapes: dict[float, list[Shape]]
    folder: Path

    @property
    def unit(self) -> int:
        """The sequences that a batch is a multiple of."""
        return unit_of(self.config)

    def grid(self) -> list[Setting]:
        """Return the runs of the grid of rates and batches."""
        found = []
        for budget in sorted(self.settings.rate_budgets):
            shape = self.ladder.around(M_OPT.at(budget), 1)[0]
            for batch in sorted(self.settings.batches):
                found += [
                    self._setting("rate", budget, shape, lr, batch, seed)
                    for lr in sorted(self.settings.rates)
                    for seed in self.settings.seeds
                ]
        return found

    def isoflop(self, laws: Laws | None) -> list[Setting]:
        """Return the IsoFLOP runs, the cheapest first.

        Args:
            laws: fitted to the grid; None where there is none, or it is still to be trained.
        """
        return [
            self._setting("isoflop", budget, shape, *self.rate_and_batch(budget, laws), seed)
            for budget, shapes in sorted(self.shapes.items())
            for shape in shapes
            for seed in self.settings.seeds
        ]

    def rate_and_batch(self, budget: float, laws: Laws | None) -> tuple[float, int]:
        """Return the rate, to three digits, and the batch in sequences that a budget's runs are trained with."""
        settings = self.settings
        if not settings.rate_budgets:
            assert isinstance(self.config.train.global_batch, int)
            return self.config.optimizer.lr, self.config.train.global_batch
        if laws is None:  # the batch that allows the fewest steps, to be judged by
            return min(settings.rates), max(settings.batches)
        lr = min(max(laws.lr.at(budget), min(settings.rates)), max(settings.rates))
        wanted = laws.batch_tokens.at(budget) / self.config.train.seq_len
        batch = self.unit * round(wanted / self.unit)
        return float(f"{lr:.3g}"), min(max(batch, min(settings.batches)), max(settings.batches))

    def _setting(self, kind: str, budget: float, shape: Shape, lr: float, batch: int, seed: int) -> Setting:
        return Setting(kind, budget, shape, self.ladder.m(shape), lr, batch, self.config.train.seq_len, seed)

    def training(self, setting: Setting) -> Training:
        """Return a setting as a run of its own folder; at a rate that was tried it may diverge, which is a result."""
        warmup = max(1, min(self.config.schedule.warmup_steps, setting.steps // 10))
        overrides = [
            *self.base,
            *self.ladder.overrides(setting.shape),
            f"optimizer.lr={setting.lr!r}",
            f"train.global_batch={setting.global_batch}",
            f"train.total_tokens={setting.tokens}",
            f"schedule.warmup_steps={warmup}",
            f"train.seed={setting.seed}",
        ]
        run_dir = self.folder / ("rates" if setting.kind == "rate" else ISOFLOP) / setting.name
        return Training(f"{self.folder.name}-{setting.name}", run_dir, tuple(overrides), may_diverge=True)

    def keep_recipe(self) -> None:
        """Write the recipe of the runs into the study's folder, so that those of another are not taken for them."""
        keep_recipe(self.folder, recipe_of(self.config, _EACH))


def plan(overrides: Sequence[str]) -> Plan:
    """Check a study's command, without preparing data; `launch.trainings.problems_of` judges each run.

    Args:
        overrides: ``scaling.…`` and those of every run, whose recipe is `SMALL` where no model is named.

    Raises:
        BadInput: the study cannot work; it lists every problem.
    """
    asked = asked_of(overrides, ScalingSettings, PREFIX, _SET)
    settings, given = asked.settings, asked.keys
    problems = [*asked.problems, *problems_of_settings(settings), *asked.refused]
    if settings.rate_budgets:
        problems += [
            f"{key}: is what {tried}=[…] tries; scaling.rate_budgets=[] tries none, and takes it for every run"
            for key, tried in _OF_GRID.items()
            if key in given
        ]
    if problems:
        raise BadInput(problems)
    small = SMALL if not given & {"model", "--config-name"} else ()
    # One replica for a run, whatever else of its layout is given, so that several runs share the machine.
    alone = [] if "parallel.dp" in given else ["parallel.dp=1"]
    base = [*small, *alone, *_OF_ALL, *asked.rest]
    composition = compose_overrides(base)
    config = composition.config
    problems = list(composition.problems) + _model_problems(config)
    if problems:
        raise BadInput(problems)
    ladder = Ladder(config.model, config.train.seq_len)
    explicit, problems = shapes_of(settings.shapes, ladder)
    default = f"runs/scaling-{composition.config.name}"
    try:
        folder = checked("scaling.dir", default if settings.dir is None else settings.dir)
    except BadInput as error:
        raise BadInput([*problems, *error.problems]) from None
    shapes = {budget: explicit or ladder.around(M_OPT.at(budget), settings.sizes) for budget in settings.budgets}
    found = Plan(settings, config, base, ladder, shapes, folder)
    problems += _problems(found) if not problems else []
    if problems:
        raise BadInput(problems)
    return found


def unit_of(config: Config) -> int:
    """Return the sequences of a step that all replicas take at once, of which every batch is a multiple."""
    return config.train.micro_batch * (config.parallel.dp or 1)


def _model_problems(config: Config) -> list[str]:
    """Return the problems of the recipe that would keep a ladder from being made of it."""
    found = config.model.problems()
    if config.parallel.dp is None:
        found.append("parallel.dp=null: each run would take the whole machine; parallel.dp=1 would work")
    if config.train.seq_len < 1:
        found.append(f"train.seq_len={config.train.seq_len}: must be at least 1")
    if config.train.micro_batch < 1 or (config.parallel.dp or 1) < 1:
        found.append("train.micro_batch and parallel.dp must be at least 1")
    return found


def _problems(found: Plan) -> list[str]:
    settings, config = found.settings, found.config
    problems = path_problems("scaling.dir", found.folder) + unmeasured(config)
    if not settings.rate_budgets and not isinstance(config.train.global_batch, int):
        problems.append(f"train.global_batch={config.train.global_batch}: grows; one number of sequences would work")
        return problems
    tried = settings.batches if settings.rate_budgets else []
    for batch in tried:
        if batch % found.unit:
            near = max(found.unit, batch // found.unit * found.unit)
            problems.append(
                f"scaling.batches={batch}: not a multiple of train.micro_batch x parallel.dp = {found.unit} sequences; "
                f"{near} would work"
            )
    if problems:
        return problems
    problems += _too_short([*found.grid(), *found.isoflop(None)])
    return problems + other_recipe("scaling.dir", found.folder, recipe_of(config, _EACH))


def _too_short(settings: Sequence[Setting]) -> list[str]:
    """Say which runs have too few steps, of each budget the one whose steps cost most."""
    short: dict[tuple[str, float], Setting] = {}
    for one in settings:
        least = short.get((one.kind, one.budget))
        if one.steps < FEWEST_STEPS and (least is None or one.m * one.global_batch > least.m * least.global_batch):
            short[one.kind, one.budget] = one
    return [
        f"scaling.{'rate_budgets' if kind == 'rate' else 'budgets'}={budget:g}: pays for {one.steps} steps of "
        f"{one.global_batch} x {one.seq_len} tokens of a model of {one.shape} (M = {one.m:.3g}), and a run needs "
        f"{FEWEST_STEPS}; {FEWEST_STEPS * one.m * one.global_batch * one.seq_len:.2g}, smaller batches or "
        "smaller models would work"
        for (kind, budget), one in short.items()
    ]
