"""What a plan assumes of devices and links, as data; docs/planning.md lists where each number comes from."""

from dataclasses import dataclass

SCAN_ELEMENTS = 4 * 5632 * 4096  # sequences x channels x tokens of the kernel measurements below


@dataclass(frozen=True)
class Hardware:
    """One kind of device and its links.

    The rates marked (H100) were measured on one H100 80GB; other devices scale them (`_scaled`).
    """

    name: str
    matrix_flops: float  # dense bf16 peak, FLOP/s
    matrix_efficiency: float  # achieved share of that peak, over a layer's matrix products
    attention_flops: float  # of windowed flash attention forward and backward, by flops.py's count, FLOP/s
    memory_bytes_per_s: float  # of a copy, read and write together
    scan_element_s: float  # mamba-ssm's scan, forward and backward, a channel and token
    conv_element_s: float  # causal-conv1d, forward and backward, a channel and token
    node_gpus: int
    node_bytes_per_s: float  # between devices of a node, each direction
    network_bytes_per_s: float  # between nodes, a device, each direction


H100 = Hardware(
    name="h100",
    matrix_flops=989e12,  # NVIDIA's data sheet
    matrix_efficiency=0.70,  # (H100) 8192^3 products ran at 701 to 798 TFLOP/s
    attention_flops=217e12,  # (H100) B4 H12 d128 L4096 W2048: 0.627 + 1.509 ms
    memory_bytes_per_s=3.0e12,  # (H100) 3.02 TB/s
    scan_element_s=(1.598e-3 + 6.739e-3) / SCAN_ELEMENTS,  # (H100) mamba-ssm 2.3.2, B4 D5632 L4096
    conv_element_s=(0.132e-3 + 0.289e-3) / SCAN_ELEMENTS,  # (H100) causal-conv1d 1.7.0, the same sizes
    node_gpus=8,
    node_bytes_per_s=450e9,  # NVLink 4
    network_bytes_per_s=50e9,  # a 400 Gbit/s adapter a device
)


def _scaled(
    name: str, *, matrix_flops: float, memory_bytes_per_s: float, node_bytes_per_s: float, vector_rate: float
) -> Hardware:
    """The H100's measurements on another device: matrix rates by its peak, the convolution by its memory.

    Args:
        memory_bytes_per_s: of its data sheet; the H100's achieved share of its own counts here too.
        vector_rate: multiprocessors times clock over the H100's, which the scan is bound by.
    """
    achieved_bytes_per_s = memory_bytes_per_s * H100.memory_bytes_per_s / H100_SHEET_BYTES_PER_S
    return Hardware(
        name=name,
        matrix_flops=matrix_flops,
        matrix_efficiency=H100.matrix_efficiency,
        attention_flops=H100.attention_flops * matrix_flops / H100.matrix_flops,
        memory_bytes_per_s=achieved_bytes_per_s,
        scan_element_s=H100.scan_element_s / vector_rate,
        conv_element_s=H100.conv_element_s * H100.memory_bytes_per_s / achieved_bytes_per_s,
        node_gpus=H100.node_gpus,
        node_bytes_per_s=node_bytes_per_s,
        network_bytes_per_s=H100.network_bytes_per_s,
    )


H100_SHEET_BYTES_PER_S = 3.35e12
A100_VECTOR_RATE = (108 * 1.41) / (132 * 1.98)  # multiprocessors and boost clock in GHz, by the data sheets

DEVICES = {
    "h100": H100,
    "h200": _scaled("h200", matrix_flops=989e12, memory_bytes_per_s=4.8e12, node_bytes_per_s=450e9, vector_rate=1.0),
    "a100": _scaled(
        "a100", matrix_flops=312e12, memory_bytes_per_s=2.04e12, node_bytes_per_s=300e9, vector_rate=A100_VECTOR_RATE
    ),
}

# Each saved activation byte is written, read by the next operation and read by the backward, and a gradient of its size
# is written and read: what the operations that are bound by memory move.
ACTIVATION_PASSES = 5
# AdamW reads weight, gradient and both moments and writes all but the gradient, in fp32.
ADAM_BYTES_PER_PARAMETER = 28
# Once a micro-batch: a weight is read in fp32 and written in bf16; its gradient is written in bf16, read, cast to fp32
# and added to the gradient so far.
CAST_BYTES_PER_PARAMETER = 4 + 2 + 2 + 2 + 4 + 4 + 8
# What computing again adds to forward and backward: the forward's share, (H100) from the times above; of memory traffic
# the write and the read of the forward.
RECOMPUTED_SHARE = {"scan": 1.598 / (1.598 + 6.739), "attention": 0.627 / (0.627 + 1.509), "elementwise": 2 / 5}
# The scan in plain PyTorch, which a cut sequence needs, launches kernels for each token: about 4 of 10 microseconds
# forward and backward. Beside them it passes over its [tokens, batch, d_state, channels] buffers. Both are assumed.
TORCH_SCAN_TOKEN_S = 40e-6
TORCH_SCAN_PASSES = 20
