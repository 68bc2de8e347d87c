"""A cluster to plan for: its GPUs, what links them, and what they cost. Presets are in `conf/clusters/`."""

from dataclasses import dataclass, field


@dataclass
class Cluster:
    """A cluster of equal machines with equal GPUs. Figures are the data sheet's unless `measured` names them.

    A machine without GPUs is one as well: its ranks are its GPUs, and `devices_per_node` the cores that they share.
    """

    name: str = "unknown"
    """The name of the GPU."""
    nodes: int = 1
    """The number of machines."""
    gpus_per_node: int = 8
    """GPUs of a machine, with a rank on each."""
    devices_per_node: float | None = None
    """How many ranks of a machine compute at full speed at the same time, where they share cores; null: all of them."""
    crowded_share: float = 1.0
    """The share of the speed that a device has alone which it has while all of its machine compute, where ranks share
    cores: these share caches, memory and clock. Its other figures are those of a crowded one."""
    memory_gib: float = 80.0
    """Memory of a GPU that PyTorch can allocate, in GiB."""
    reserved_gib: float = 4.0
    """Memory of a GPU, in GiB, that no plan counts and every run needs: CUDA's context, NCCL's buffers, what the
    allocator's blocks leave unused. An assumption, the same for all GPUs."""
    peak_tflops: float = 989.0
    """Dense bf16 TFLOP/s of a GPU by its data sheet, against which MFU is counted."""
    peak_fp32_tflops: float = 67.0
    """TFLOP/s of a GPU in fp32 without TF32, for runs with train.precision=fp32."""
    product_share: float = 0.8
    """The share of the peak that the best large matrix product sustains on data that training has."""
    tile_units: int = 132
    """Multiprocessors of a GPU: a product is cut into tiles, which run in waves of as many, and the last wave is seldom
    full. 0 where products are not cut so (a CPU)."""
    slowest_share: float = 1.0
    """The share of a usual GPU's speed that the slowest of a cluster computes with: all wait for it. GPUs of one model
    differ by 8 % (arXiv 2208.11035), so that presets have 0.96."""
    products: list[list[float]] = field(default_factory=list)
    """Measured products as [m, k, n, TFLOP/s] of bf16, or of fp32 where the cluster computes in it; where given, the
    rate of the nearest shape takes the place of `product_share` and `tile_units`."""
    attention_forward_share: float = 0.66
    """The share of the peak that attention's forward kernel reaches on long sequences, its causal half counted."""
    attention_backward_share: float = 0.52
    """The share of the peak that attention's backward kernel reaches on long sequences."""
    attention_half_length: float = 500.0
    """Tokens of a sequence with which attention reaches half of that."""
    hbm_gb_per_s: float = 3350.0
    """Bandwidth of a GPU's memory by its data sheet, in GB/s."""
    hbm_share: float = 0.85
    """The share of it that norms, additions and the optimizer reach."""
    launch_us: float = 2.0
    """Microseconds between two kernels on a GPU that has its work queued."""
    host_us: float = 25.0
    """Microseconds for which a host is busy with each operation, forward or backward: a pass takes no less than that
    for all of its operations."""
    message_units: int = 16
    """Multiprocessors of `tile_units` that a message takes from what is computed beside it: the blocks of NCCL."""
    intra_gb_per_s: float = 450.0
    """Bandwidth of a GPU to others of its machine, in GB/s in one direction, by the data sheet."""
    intra_share: float = 0.8
    """The share of it that collectives reach with large messages (bus bandwidth of nccl-tests)."""
    inter_gb_per_s: float = 50.0
    """A GPU's part of its machine's bandwidth to other machines, in GB/s in one direction, by the data sheet."""
    inter_share: float = 0.9
    """The share of it that messages between machines reach."""
    protocols: list[list[float]] = field(default_factory=lambda: [[1.0, 8.4, 3.4, 14.0], [0.92, 14.0, 1.9, 4.0]])
    """Ways to send a message, of which the fastest is taken, as [share of the bandwidth, microseconds before the first
    step of a ring, of each step within a machine, of each step between machines]: NCCL's own figures for its protocols
    Simple and LL128 (`src/graph/tuning.cc`)."""
    price_per_gpu_hour: float | None = None
    """What an hour of a GPU costs, in any currency; null says no cost."""
    measured: list[str] = field(default_factory=list)
    """The keys whose values were measured on this cluster (`deepnarrow bench --save`)."""

    @property
    def world_size(self) -> int:
        """The number of GPUs."""
        return self.nodes * self.gpus_per_node

    @property
    def has_gpus(self) -> bool:
        """Whether there are GPUs: only ranks on a CPU share devices, and these compute in fp32 by default."""
        return self.devices_per_node is None

    @property
    def allocatable_gib(self) -> float:
        """The memory that a plan may fill, in GiB."""
        return self.memory_gib - self.reserved_gib

    @property
    def allocatable_bytes(self) -> float:
        """The memory that a plan may fill, in bytes."""
        return self.allocatable_gib * 2**30

    def problems(self, key: str = "cluster") -> list[str]:
        """Return what no cluster can have, a sentence each with key, value and what would work.

        Args:
            key: what the cluster was given by, which begins each sentence.
        """
        above_0 = ["nodes", "gpus_per_node", "memory_gib", "peak_tflops", "peak_fp32_tflops", "hbm_gb_per_s"]
        above_0 += ["intra_gb_per_s", "inter_gb_per_s"]
        shares = ["product_share", "attention_forward_share", "attention_backward_share", "hbm_share"]
        shares += ["crowded_share", "intra_share", "inter_share", "slowest_share"]
        times = ["launch_us", "host_us", "attention_half_length", "reserved_gib"]
        limits = [(name, f"must be above 0; {_default(name)} would work") for name in above_0]
        found = [f"{key}.{name}={getattr(self, name)}: {said}" for name, said in limits if not getattr(self, name) > 0]
        found += [
            f"{key}.{name}={value}: is a share, above 0 and at most 1; {_default(name)} would work"
            for name in shares
            if not 0 < (value := getattr(self, name)) <= 1
        ]
        not_below_0 = [
            *times,
            *(["price_per_gpu_hour"] if self.price_per_gpu_hour is not None else []),
            "tile_units",
            "message_units",
        ]
        found += [
            f"{key}.{name}={value}: must be at least 0; {_default(name) or 0} would work"
            for name in not_below_0
            if not (value := getattr(self, name)) >= 0
        ]
        if self.devices_per_node is not None and not 0 < self.devices_per_node <= self.gpus_per_node:
            found.append(
                f"{key}.devices_per_node={self.devices_per_node}: is above 0 and at most the ranks of a machine "
                f"(gpus_per_node={self.gpus_per_node}); null would work where each has a device of its own"
            )
        if self.memory_gib > 0 and not self.memory_gib > self.reserved_gib:
            found.append(
                f"{key}.memory_gib={self.memory_gib}: is above {key}.reserved_gib={self.reserved_gib}, which no plan "
                f"fills; {_default('memory_gib')} would work"
            )
        for row in self.products:
            if len(row) != 4 or not all(value > 0 for value in row):
                found.append(f"{key}.products={row}: is [m, k, n, TFLOP/s]; [8192, 8192, 8192, 800] would work")
        for row in self.protocols:
            if len(row) != 4 or not 0 < row[0] <= 1 or not all(value >= 0 for value in row[1:]):
                found.append(
                    f"{key}.protocols={row}: is [share of the bandwidth, microseconds at first, of a step within a "
                    "machine, between machines]; [1.0, 8.4, 3.4, 14.0] would work"
                )
        if not self.protocols:
            found.append(f"{key}.protocols=[]: messages need one; [[1.0, 8.4, 3.4, 14.0]] would work")
        return found


def _default(name: str) -> object:
    return getattr(Cluster(), name)


def size_problems(spec: str, nodes: str, gpus: str) -> list[str]:
    """Return why a cluster's size, as in ``32x8xh100``, is none, a sentence each.

    Args:
        spec: as it was given, for the sentence.
        nodes, gpus: the number of machines, and of GPUs in each, as text.
    """
    found = []
    for what, text in (("machines", nodes), ("GPUs of a machine", gpus)):
        if not text.isdecimal() or int(text) < 1:
            found.append(f"--cluster={spec}: {text!r} is no number of {what}; 1 or more would work, as in 32x8xh100")
    return found
