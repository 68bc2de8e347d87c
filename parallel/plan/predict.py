"""The time of a training step of a job on a cluster, and where it goes."""

from dataclasses import dataclass, field
from functools import cached_property

from parallel.plan.cluster import Cluster
from parallel.plan.job import Job
from parallel.schedules import orders
from parallel.simulation import Costs, Timeline, simulate

ERROR = 0.15
"""The mean relative error against published steps (docs/planner.md): layouts that are closer than that are equal."""


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a step, and where it goes, averaged over the ranks of a pipeline.

    The parts add up: products, attention, traffic, tp, pp, dp, optimizer and waiting are `seconds`.

    Attributes:
        job: the job.
        cluster: the cluster.
        seconds: of a step.
        compute: seconds by kind of operation, ``products``, ``attention`` and ``traffic`` (kernels that are bound by
            memory), recomputation included.
        exposed: seconds by kind of message, ``tp``, ``pp`` and ``dp``, in which nothing is computed.
        optimizer: seconds of the gradient's norm and the update of the master weights.
        waiting: seconds in which a rank waits for others, by the schedule and by uneven stages.
        costs: the seconds of each stage's passes.
        error: the relative error that predictions have had.
    """

    job: Job
    cluster: Cluster
    seconds: float
    compute: dict[str, float]
    exposed: dict[str, float]
    optimizer: float
    waiting: float
    costs: Costs = field(repr=False)
    error: float = ERROR

    @property
    def bubble(self) -> float:
        """The share of the step in which ranks wait for others."""
        return self.waiting / self.seconds

    @property
    def tokens_per_second_per_gpu(self) -> float:
        """Tokens of all replicas a second, over the GPUs of the layout."""
        return self.job.tokens_per_step / self.seconds / self.job.layout.world_size

    @property
    def mfu(self) -> float:
        """The share of the GPUs' bf16 peak, by the FLOPs that the model needs with causal attention halved."""
        return self._share(self.job.model.flops_per_token(self.job.settings.seq_len))

    @property
    def mfu_whole_attention(self) -> float:
        """The same with causal attention counted whole."""
        return self._share(self.job.model.flops_per_token_whole_attention(self.job.settings.seq_len))

    def _share(self, flops_per_token: int) -> float:
        return self.tokens_per_second_per_gpu * flops_per_token / (self.cluster.peak_tflops * 1e12)

    @cached_property
    def timeline(self) -> Timeline:
        """The passes of a whole step on every rank of a pipeline, simulated when first asked for."""
        settings = self.job.settings
        made = orders(settings.schedule, self.job.placement, settings.accumulation)
        return simulate(made, self.job.placement, self.costs)


def predict(job: Job, cluster: Cluster) -> Prediction:
    """Predict the time of a training step.

    Args:
        job: the job, whose layout `parallel.layout.problems` accepts.
        cluster: the cluster, which has at least as many GPUs as the layout.
    """
    model, settings, layout = job.model, job.settings, job.layout
    tokens = settings.micro_batch * settings.seq_len
    rate = cluster.product_share * 1e12 * (cluster.peak_tflops if settings.bf16 else cluster.peak_fp32_tflops)
    layers = model.layer_flops(settings.seq_len)
    forward = [sum(layers[stage.start : stage.stop]) * tokens / layout.tp / rate for stage in job.stages]
    costs = Costs(forward, forward, forward)
    made = orders(settings.schedule, job.placement, settings.accumulation)
    timeline = simulate(made, job.placement, costs)
    products = 3 * settings.accumulation * sum(forward) / layout.pp
    waiting = timeline.seconds - products
    compute = {"products": products, "attention": 0.0, "traffic": 0.0}
    return Prediction(job, cluster, timeline.seconds, compute, {"tp": 0.0, "pp": 0.0, "dp": 0.0}, 0.0, waiting, costs)
