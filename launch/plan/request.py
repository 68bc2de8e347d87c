"""What a plan is asked for: the run as it is composed, the cluster, and the keys that are to stay as they are."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from conf.clusters import cluster_of
from conf.compose import compose_overrides
from conf.overrides import key_of
from conf.schema import Config
from conf.search import OWN, Options, split_options
from conf.validate import Machine, validate
from launch.describe import of_presets
from model.problems import BadInput
from parallel.plan.cluster import Cluster
from parallel.plan.search import Choice, Space, Task, space_for
from parallel.schedules import ONE_F_ONE_B
from train import predicted
from train.job import computes_in_bf16
from train.length import Length, length_of, longest
from train.like import take_over
from train.uptrain import compose_with_source, other_shape

SEARCHED = ("pp", "tp", "dp", "schedule", "virtual_stages", "recompute", "head_pieces")
"""The keys of `parallel` that a plan chooses; it chooses train.micro_batch as well."""
KEYS = {**{name: f"parallel.{name}" for name in SEARCHED}, "micro_batch": "train.micro_batch"}
"""The full key of each field of `Choice`."""
_GROUPS = ("model", "data", "schedule")
_ANY = Choice(1, 1, 1, ONE_F_ONE_B, 1, 1)


@dataclass(frozen=True)
class Request:
    """What is planned.

    Attributes:
        arguments: the overrides and options of the run, ``--like`` replaced by what it stands for.
        config: what they compose to.
        cluster: the machines.
        fixed: the values of the keys that the user has set, by field of `Choice`.
        groups: the presets that were chosen, by group.
    """

    arguments: list[str]
    config: Config
    cluster: Cluster
    fixed: dict[str, Any]
    groups: dict[str, str]

    @cached_property
    def length(self) -> Length:
        """The steps of the run."""
        return length_of(self.config)

    @property
    def task(self) -> Task:
        """The last step of the run, whose batch is the largest of a batch size ramp-up."""
        return self.task_of(self.length.at(self.length.schedule_steps).global_batch, longest(self.config))

    def task_of(self, global_batch: int, seq_len: int) -> Task:
        """Return a step of the run with this batch, in sequences, and sequences of this many tokens."""
        config = self.config
        cut = config.parallel.sequence_parallel is not False
        bf16 = computes_in_bf16(config, on_gpus=self.cluster.has_gpus)
        clip, cut_at = config.optimizer.clip, config.train.seq_len
        return Task(config.model, self.cluster, global_batch, seq_len, bf16, clip, cut, cut_at)

    @property
    def space(self) -> Space:
        """The values that are searched."""
        return space_for(self.cluster, self.config.model, longest(self.config), self.fixed)

    @property
    def problems(self) -> Callable[[Choice], list[str]]:
        """A function that says why a choice would not run, one sentence each."""
        return judge(self.config, self.cluster)


def read(arguments: Sequence[str], cluster: str | None, price: float | None) -> Request:
    """Read what a plan is asked for.

    Args:
        arguments: overrides and options of the run, ``--like`` among them; a bare word is a preset of the model.
        cluster: of the option ``--cluster``; None for the run's key ``cluster``.
        price: of an hour of a GPU; None for what the cluster says.

    Raises:
        BadInput: with every problem.
    """
    taken = take_over(of_presets(arguments))
    composition, source, _ = compose_with_source(taken, checked=False)
    config = composition.config
    choices = composition.node.hydra.runtime.choices
    groups = {group: str(choices[group]) for group in _GROUPS if choices.get(group)}
    fixed = _fixed(taken, config, groups)
    # Any layout will do for what else is asked: those that are searched are judged one by one.
    _, problems = validate(with_choice(config, _ANY), Machine(gpus=0, elsewhere=True))
    problems = composition.all_problems(problems + (other_shape(config, source) if source else []))
    problems += below_one(fixed)
    if price is not None and not 0 <= price < math.inf:
        problems.append(f"--price={price}: must be at least 0, for an hour of a GPU; --price=2.5 would work")
    found, spec = None, cluster or config.cluster
    try:
        if spec is None:
            problems.append("--cluster: a plan is for machines; --cluster=32x8xh100 would work, or --cluster=FILE.yaml")
        else:
            found = cluster_of(spec)
    except BadInput as error:
        problems += error.problems if cluster else predicted.problems(config)
    if problems or found is None:
        raise BadInput(problems)
    found = found if price is None else replace(found, price_per_gpu_hour=price)
    return Request(taken, config, found, fixed, groups)


def below_one(values: Mapping[str, Any]) -> list[str]:
    """Say which values of a layout are below 1, a sentence each.

    Args:
        values: by field of `Choice`.
    """
    degrees = {name: values.get(name) for name in ("pp", "tp", "dp", "micro_batch")}
    return [
        f"{KEYS[name]}={value}: must be at least 1; {KEYS[name]}=1 would work"
        for name, value in degrees.items()
        if value is not None and value < 1
    ]


def _fixed(arguments: Sequence[str], config: Config, groups: Mapping[str, str]) -> dict[str, Any]:
    """Return the keys that are to stay as they are: named by an override, or set by a file of the user's own."""
    options, overrides = split_options(arguments)
    folder = Options(OWN, options.config_dir).arguments
    presets = compose_overrides([*(f"{group}={name}" for group, name in groups.items()), *folder]).config
    named, found = {key_of(text) for text in overrides}, {}
    for name, key in KEYS.items():
        value = value_of(config, name)
        if value is not None and (key in named or value != value_of(presets, name)):
            found[name] = value
    return found


def value_of(config: Config, name: str) -> Any:
    """Return the value of a key that is searched, by its field of `Choice`."""
    return config.train.micro_batch if name == "micro_batch" else getattr(config.parallel, name)


def with_choice(config: Config, choice: Choice) -> Config:
    """Return a configuration with the values of a choice."""
    parallel = replace(config.parallel, **{name: getattr(choice, name) for name in SEARCHED})
    return replace(config, parallel=parallel, train=replace(config.train, micro_batch=choice.micro_batch))


def judge(config: Config, cluster: Cluster) -> Callable[[Choice], list[str]]:
    """Return a function that says why a choice would not run on a cluster, one sentence each."""
    gpus = cluster.gpus_per_node
    machine = Machine(gpus=gpus, local_processes=gpus, processes=cluster.world_size, elsewhere=True)

    def problems(choice: Choice) -> list[str]:
        return validate(with_choice(config, choice), machine)[1]

    return problems


def overrides_of(choice: Choice) -> list[str]:
    """Write a choice as overrides: its layout and its micro-batch, and of the rest what is not the default."""
    default = Choice(1, 1, 1, choice.schedule, replace(choice, virtual_stages=0).placement.virtual, 0)
    found = []
    for name, key in KEYS.items():
        value = getattr(choice, name)
        says = name in ("pp", "tp", "dp", "micro_batch") or (name == "schedule" and choice.pp > 1)
        if says or (name != "schedule" and value != getattr(default, name)):
            found.append(f"{key}={getattr(value, 'name', value)}")
    return found
