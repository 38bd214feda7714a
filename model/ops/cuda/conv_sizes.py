"""How our CUDA convolution (conv.py) is spread over a device, and what it holds. Needs no torch."""

STEPS, WARPS = 32, 4  # tokens of a thread, and warps of a block, which follow each other in time
WARP_CHANNELS = 32 * 8  # a thread has eight
# The backward's sums, of each tap and the bias, lie in the 48 KiB that a block has without asking: `sums` in conv.cu.
MAX_TAPS = 48 * 1024 // (4 * WARPS * WARP_CHANNELS) - 1
