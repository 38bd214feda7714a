"""What a plan assumes of devices and links, as data; docs/planning.md lists where each number comes from."""

from dataclasses import dataclass

from sambalm.model.flops import PEAK_FLOPS


@dataclass(frozen=True)
class Hardware:
    """One kind of device and its links.

    The rates marked (H100) were measured on one H100 80GB; other devices scale them (`_scaled`).
    """

    name: str
    matrix_flops: float  # dense bf16 peak, FLOP/s
    matrix_efficiency: float  # achieved share of that peak, over a layer's matrix products
    memory_bytes_per_s: float  # of a copy, read and write together
    multiprocessors: int
    clock_ghz: float  # boost, by NVIDIA's data sheet
    node_gpus: int
    node_bytes_per_s: float  # between devices of a node, each direction
    network_bytes_per_s: float  # between nodes, a device, each direction
    has_fp8: bool = True

    @property
    def vector_rate(self) -> float:
        """The speed of kernels that neither products nor memory bind, over an H100's."""
        return self.multiprocessors * self.clock_ghz / (H100.multiprocessors * H100.clock_ghz)


H100 = Hardware(
    name="h100",
    matrix_flops=PEAK_FLOPS["H100"],
    matrix_efficiency=0.73,  # (H100) 720 TFLOP/s over a step of 421M, 736 over one of 1.3B
    memory_bytes_per_s=3.0e12,  # (H100) 3.02 TB/s
    multiprocessors=132,
    clock_ghz=1.98,
    node_gpus=8,
    node_bytes_per_s=450e9,  # NVLink 4
    network_bytes_per_s=50e9,  # a 400 Gbit/s adapter a device
)


def _scaled(
    name: str,
    *,
    matrix_flops: float,
    memory_bytes_per_s: float,
    multiprocessors: int,
    clock_ghz: float,
    node_bytes_per_s: float,
    has_fp8: bool = True,
) -> Hardware:
    """The H100's measurements on another device: matrix rates by its peak, memory by the same share of its data sheet.

    Other kernels scale by its multiprocessors and their clock.
    """
    return Hardware(
        name=name,
        matrix_flops=matrix_flops,
        matrix_efficiency=H100.matrix_efficiency,
        memory_bytes_per_s=memory_bytes_per_s * H100.memory_bytes_per_s / H100_SHEET_BYTES_PER_S,
        multiprocessors=multiprocessors,
        clock_ghz=clock_ghz,
        node_gpus=H100.node_gpus,
        node_bytes_per_s=node_bytes_per_s,
        network_bytes_per_s=H100.network_bytes_per_s,
        has_fp8=has_fp8,
    )


H100_SHEET_BYTES_PER_S = 3.35e12

DEVICES = {
    "h100": H100,
    "h200": _scaled(
        "h200",
        matrix_flops=PEAK_FLOPS["H200"],
        memory_bytes_per_s=4.8e12,
        multiprocessors=132,
        clock_ghz=1.98,
        node_bytes_per_s=450e9,
    ),
    "a100": _scaled(
        "a100",
        matrix_flops=PEAK_FLOPS["A100"],
        memory_bytes_per_s=2.04e12,
        multiprocessors=108,
        clock_ghz=1.41,
        node_bytes_per_s=300e9,
        has_fp8=False,
    ),
    # By its data sheet, which gives no clock: that is an H100's. Nothing has been measured on one.
    "b200": _scaled(
        "b200",
        matrix_flops=PEAK_FLOPS["B200"],
        memory_bytes_per_s=8.0e12,
        multiprocessors=148,
        clock_ghz=1.98,
        node_bytes_per_s=900e9,
    ),
}

# Share of a copy's rate that fused kernels and plain sums achieve: SwiGLU, norms and residual sums of 421M and 1.3B on
# an H100.
FUSED_SHARE = 0.84
# Of PyTorch's single operations, many of them strided or on small pieces: from a step of 421M on one H100 with them,
# whose other parts are measured. Multiprocessors bind them rather than memory: an H200 is hardly faster.
SINGLE_BYTES_PER_S = 1.68e12
# Of a micro-batch's time, with a forward that takes a third of forward and backward: assumed.
BACKWARD_SHARE = {"none": 2 / 3, "selective": 2 / 3, "full": 3 / 4}

# Launching a micro-batch's kernels one by one, forward and backward, on the host: of a sublayer, and what each of its
# messages adds. From 421M on H100: micro-batches of one sequence on one GPU, and steps of two under TP2 + SP and CP2.
HOST_SUBLAYER_S = 2.6e-3
HOST_MESSAGE_S = {"tensor": 0.33e-3, "context": 1.57e-3}
# Between a sublayer's kernels, forward and backward, the device does nothing even where they are a CUDA graph: from a
# profile of 1.3B on one H100; in one of 421M they were 106e-6.
KERNEL_GAPS_S = 80e-6
RECOMPUTED_PASSES = 4 / 3  # of both, with the forward again as a third of forward and backward: assumed

# Of a message: NCCL's start on both sides, and the share of a link's rate that large ones achieve. Assumed.
MESSAGE_S = 20e-6
LINK_SHARE = 0.75
# What ranks besides wait for each other at a message of the context dimension, of which a mixer has several between
# its kernels: what was left of CP2 of 421M, as CUDA graphs, on two H100 and on two H200.
CONTEXT_WAIT_S = 0.25e-3

# The scan in plain PyTorch launches kernels for each token, three forward and backward, of 17 microseconds of the host
# with the views that they work on: from the step of two H200 under context parallelism. Beside them it passes over its
# [tokens, batch, d_state, channels] buffers; how often is assumed.
TORCH_SCAN_TOKEN_S = 50e-6
TORCH_SCAN_PASSES = 20

# Bytes of a parameter that are moved once a step: of a rank's share under ZeRO the division by the ranks, the norm,
# AdamW (weight, gradient and moments read; all but the gradient written) and the copy of the new weights, rounded to
# bf16; without replicas the norm and AdamW.
SHARE_BYTES = 8 + 4 + 28 + 6
SINGLE_REPLICA_BYTES = 4 + 28
