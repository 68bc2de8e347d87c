"""A cluster to plan for: its GPUs, what links them, and what they cost. Presets are in `conf/cluster/`."""

from dataclasses import dataclass, field


@dataclass
class Cluster:
    """A cluster of equal machines with equal GPUs. Figures are the data sheet's unless `measured` names them."""

    name: str = "unknown"
    """The name of the GPU."""
    nodes: int = 1
    """The number of machines."""
    gpus_per_node: int = 8
    """GPUs of a machine."""
    memory_gib: float = 80.0
    """Memory of a GPU that PyTorch can allocate, in GiB."""
    peak_tflops: float = 989.0
    """Dense bf16 TFLOP/s of a GPU by its data sheet, against which MFU is counted."""
    price_per_gpu_hour: float | None = None
    """What an hour of a GPU costs, in any currency; null says no cost."""
    measured: list[str] = field(default_factory=list)
    """The keys whose values were measured on this cluster (`deepnarrow bench --save`)."""

    @property
    def world_size(self) -> int:
        """The number of GPUs."""
        return self.nodes * self.gpus_per_node
