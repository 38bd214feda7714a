// The state at the start of each time segment, from what each segment reaches from zero; with `backwards` the gradient
// that reaches each segment's end, from what each hands back. One thread a channel and state.
extern "C" __global__ void scan_combine(
    const float* reached,  // [batch, segments, channels, N]; the last to be taken is not used
    const float* steps,    // sum of dt, [batch, segments, channels]; likewise
    const float* A,        // [channels, N]
    const float* start,    // [batch, channels, N] or null: zeros
    float* at_start,       // [batch, segments, channels, N]
    int segments, int channels, int backwards)
{
    const int index = blockIdx.x * blockDim.x + threadIdx.x, batch = blockIdx.y;
    if (index >= channels * N) return;
    const float rate = A[index] * LOG2E;
    float h = start ? start[int64(batch) * channels * N + index] : 0.f;
    for (int k = 0; k < segments; ++k) {
        const int64 segment = int64(batch) * segments + (backwards ? segments - 1 - k : k);
        at_start[segment * channels * N + index] = h;
        h = exp2_fast(rate * steps[segment * channels + index / N]) * h + reached[segment * channels * N + index];
    }
}
