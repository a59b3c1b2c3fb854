"""A cluster: GPUs, nodes, links, and how long a number of bytes takes between ranks."""

from dataclasses import dataclass

GIGA, TERA, GIB = 10**9, 10**12, 2**30


@dataclass(frozen=True)
class Gpu:
    """One GPU by its vendor's data sheet.

    Attributes:
        memory_gib: as the driver reports it.
        peak_tflops: bf16 matrix products without sparsity.
        memory_gbs: GB/s of its memory.
        link_gbs: GB/s to the other GPUs of its node, one direction (half of what data sheets say of NVLink).
    """

    memory_gib: float
    peak_tflops: float
    memory_gbs: float
    link_gbs: float


GPUS = {
    "a100": Gpu(79.0, 312.0, 2039.0, 300.0),
    "h100": Gpu(79.6, 989.0, 3352.0, 450.0),
    "h200": Gpu(139.8, 989.0, 4800.0, 450.0),
    "b200": Gpu(178.0, 2250.0, 8000.0, 900.0),
}


@dataclass(frozen=True)
class Cluster:
    """
    Attributes:
        gpus: in all.
        gpus_per_node: ranks with consecutive numbers share a node.
        fraction: of the peak that matrix products reach in a training step, between communications. Whole steps of
            Megatron-Core reach 0.39 to 0.49 on H100 with everything (arXiv 2504.14960).
        intra_gbs, inter_gbs: GB/s of one GPU, one direction, inside its node and to other nodes.
    """

    gpu: Gpu
    gpus: int
    gpus_per_node: int
    fraction: float
    intra_gbs: float
    inter_gbs: float

    @property
    def usable_bytes(self) -> float:
        """Memory that a layout may fill: the rest is for CUDA, NCCL and what the allocator cannot use."""
        return 0.9 * self.gpu.memory_gib * GIB

    @property
    def flops_per_second(self) -> float:
        """Of one GPU, as reached."""
        return self.gpu.peak_tflops * TERA * self.fraction

    def members_per_node(self, size: int, stride: int) -> int:
        """Ranks of a group of `size` ranks, `stride` apart, that share a node."""
        return min(size, max(1, self.gpus_per_node // stride))

    def ring_seconds(self, sent: float, size: int, stride: int) -> float:
        """Seconds of a ring collective in which each rank sends `sent` bytes to its neighbour.

        NCCL runs one ring for each network card: of m ranks on a node each carries 1/m of what leaves it.
        """
        members = self.members_per_node(size, stride)
        within = sent / (self.intra_gbs * GIGA) if members > 1 else 0.0
        between = sent / members / (self.inter_gbs * GIGA) if size > members else 0.0
        return max(within, between)

    def exchange_seconds(self, sent: float, size: int, stride: int) -> float:
        """Seconds of an all-to-all in which each rank sends `sent` bytes, evenly to all others."""
        if size == 1:
            return 0.0
        members = self.members_per_node(size, stride)
        share = (size - members) / (size - 1)
        return max(sent * (1 - share) / (self.intra_gbs * GIGA), sent * share / (self.inter_gbs * GIGA))

    def send_seconds(self, sent: float, stride: int) -> float:
        """Seconds in which a rank sends bytes to the rank `stride` further on."""
        rate = self.intra_gbs if stride < self.gpus_per_node else self.inter_gbs
        return sent / (rate * GIGA)

    def off_node(self, sent: float, size: int, stride: int, *, ring: bool) -> float:
        """Bytes of `sent` that leave the node, per rank."""
        members = self.members_per_node(size, stride)
        if size == members:
            return 0.0
        return sent / members if ring else sent * (size - members) / (size - 1)
