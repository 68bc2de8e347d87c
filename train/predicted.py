"""The plan's seconds of a step beside the measured ones, as long as a run lasts, and which of its terms were off."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from conf.clusters import cluster_of, presets
from conf.schema import Config
from model.problems import BadInput
from parallel.layout import Layout
from parallel.plan.cluster import Cluster
from parallel.plan.job import Job
from parallel.plan.predict import ERROR, Prediction, predict
from parallel.processes import local_processes
from parallel.schedules import Pass
from train.job import engine_settings
from train.length import Length, StepSize
from train.metrics import known_gpu
from train.timeline import seconds_of

_TERMS = {
    "forward": "forward_seconds",
    "backward": "backward_seconds",
    "weights": "weight_seconds",
    "waiting": "wait_seconds",
    "optimizer": "optimizer_seconds",
}
"""The terms of a step, and what a record calls them: lists by rank of the pipeline, of which the mean counts, but for
the last."""
_KEPT = 1000
"""The most steps of which the measurements are kept: the last ones."""


def problems(config: Config) -> list[str]:
    """Say why the cluster that a run names is none, in a sentence each."""
    if config.cluster is None:
        return []
    try:
        cluster_of(config.cluster)
    except BadInput as error:
        return [problem.replace("--cluster=", "cluster=", 1) for problem in error.problems]
    return []


def cluster_here(config: Config, layout: Layout, device: torch.device) -> tuple[Cluster | None, str]:
    """Return the cluster that a run is predicted for, and what it is called.

    Its machines are those that the run is on, whatever size was named with it.

    Args:
        config: of the run; without `cluster`, the preset of the GPU is taken, where there is one of its name.
        layout: the rank grid.
        device: of this rank.

    Returns:
        The cluster, None where none is known; and a name for it, or the device's that there is no preset for.
    """
    spec = config.cluster
    if spec is None:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPUs"
        spec = (known_gpu(name) or "").lower()
        if spec not in presets():
            return None, name
    cluster = cluster_of(spec)
    here = local_processes() or min(layout.world_size, cluster.gpus_per_node)
    cluster.nodes, cluster.gpus_per_node = -(-layout.world_size // here), here
    if cluster.devices_per_node is not None:
        cluster.devices_per_node = min(cluster.devices_per_node, here)
    figures = {"products", "product_share"}
    source = "measured" if figures & set(cluster.measured) else "data sheet"
    return cluster, f"{cluster.name} ({source})"


@dataclass(frozen=True)
class _Measured:
    """A step: its size, its seconds, and the seconds of each term where there are several stages."""

    size: tuple[int, int]
    seconds: float
    terms: dict[str, float]


class Expected:
    """The predicted steps of a run, and the measured ones of which they are reminded.

    Args:
        config: of the run.
        layout: the rank grid.
        bf16: whether the stages compute in bf16.
        cluster: what the run is predicted for; None predicts nothing.
        name: what that is called, or the device that no cluster is known of.
    """

    def __init__(self, config: Config, layout: Layout, bf16: bool, cluster: Cluster | None, name: str):
        self._config, self._layout, self._bf16 = config, layout, bf16
        self._cluster, self._name = cluster, name
        self._predictions: dict[tuple[int, int], Prediction] = {}
        self._measured: list[_Measured] = []

    @staticmethod
    def of(config: Config, layout: Layout, bf16: bool, device: torch.device) -> "Expected":
        """Return what a run on this device should expect."""
        return Expected(config, layout, bf16, *cluster_here(config, layout, device))

    @staticmethod
    def nothing(config: Config, layout: Layout) -> "Expected":
        """Return what a rank has that does not record: no predictions."""
        return Expected(config, layout, False, None, "")

    @property
    def price_per_hour(self) -> float | None:
        """What an hour of all ranks costs, in the currency of the cluster's price; None where it has none."""
        price = self._cluster.price_per_gpu_hour if self._cluster is not None else None
        return None if price is None else price * self._layout.world_size

    def announced(self, length: Length) -> str:
        """Say what the steps of a run should take, or why that is not said."""
        if self._cluster is None:
            return (
                f"steps are not predicted: no preset of a cluster is known for {self._name}; cluster=FILE.yaml of "
                "deepnarrow bench --save and deepnarrow check --save would be"
            )
        sizes = dict.fromkeys((span.first.global_batch, span.first.seq_len) for span in length.planned())
        seconds = [f"{self._prediction(size).seconds:.3g} s" for size in sizes]
        return (
            f"a step is predicted to take {', later '.join(seconds)} on {self._name}; steps of others were predicted "
            f"with an error of {ERROR:.0%} (docs/planner.md)"
        )

    def compared(self, record: dict[str, Any], size: StepSize, counts: bool) -> dict[str, float]:
        """Return what is predicted of a step, for its record.

        Args:
            record: of the step, as measured.
            size: of it.
            counts: whether it is a step like any other: the first, and one that is traced, are not.
        """
        if self._cluster is None:
            return {}
        key = size.global_batch, size.seq_len
        if counts:
            self._measured.append(_Measured(key, record["seconds"], _terms_of(record)))
            del self._measured[:-_KEPT]
        return {"predicted_seconds": self._prediction(key).seconds}

    def said(self) -> list[str]:
        """Say how the steps of the size that came last were predicted, and which term was off; nothing without any."""
        if not self._measured:
            return []
        size = self._measured[-1].size
        steps, prediction = [one for one in self._measured if one.size == size], self._prediction(size)
        measured = median(one.seconds for one in steps)
        ratio = measured / prediction.seconds
        lines = [
            f"{measured:.3g} s a step, predicted {prediction.seconds:.3g} on {self._name}: {ratio:.2f} times as long"
        ]
        if not steps[-1].terms:
            return lines
        if prediction.shares_devices:
            return [*lines, "ranks share cores: passes are longer while others compute, and are not compared"]
        expected = predicted_terms(prediction)
        found = {name: median(one.terms[name] for one in steps) for name in steps[-1].terms}
        shown = (f"{name} {found[name]:.3g} ({expected[name]:.3g})" for name in found)
        most = max(found, key=lambda name: abs(found[name] - expected[name]))
        off = found[most] - expected[most]
        lines.append(f"mean of the ranks, s (predicted): {', '.join(shown)}")
        return [*lines, f"most off: {most}, {abs(off):.3g} s {'longer' if off > 0 else 'shorter'} than predicted"]

    def _prediction(self, size: tuple[int, int]) -> Prediction:
        if size not in self._predictions:
            assert self._cluster is not None
            batch, seq_len = size
            settings = engine_settings(self._config, self._layout, bf16=self._bf16, global_batch=batch)
            cut_at = self._config.train.seq_len
            job = Job(self._config.model, self._layout, replace(settings, seq_len=seq_len), cut_at)
            self._predictions[size] = predict(job, self._cluster)
        return self._predictions[size]


def predicted_terms(prediction: Prediction) -> dict[str, float]:
    """Return the predicted seconds of each term of a step, as a record has them: the mean over a pipeline's ranks.

    Waiting is for other stages and their messages; what replicas exchange is the optimizer's where no pass hides it.
    """
    timeline = prediction.timeline
    ranks = len(timeline.spans)
    terms = {
        name: sum(seconds_of(what, spans) for spans in timeline.spans) / ranks
        for name, what in (("forward", Pass.F), ("backward", Pass.B), ("weights", Pass.W))
    }
    waiting = timeline.seconds - sum(terms.values())
    return {**terms, "waiting": waiting, "optimizer": prediction.seconds - timeline.seconds}


def _terms_of(record: dict[str, Any]) -> dict[str, float]:
    """Return the seconds of each term that a record has; none where there is one stage alone."""
    if _TERMS["forward"] not in record:
        return {}
    return {name: _mean(record[key]) for name, key in _TERMS.items() if key in record}


def _mean(value: float | Sequence[float]) -> float:
    return sum(value) / len(value) if isinstance(value, list) else float(value)  # type: ignore[arg-type]
