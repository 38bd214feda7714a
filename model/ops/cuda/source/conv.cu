// Mamba's causal depthwise convolution with SiLU. A thread walks STEPS tokens of eight channels with the last inputs in
// registers; a block's WARPS take stretches of time that follow each other, of 256 channels.
//   TAPS     of the convolution

#define THREADS (32 * WARPS)

constexpr int BEFORE = TAPS - 1;

// What a thread needs to know of where it is.
struct Stretch {
    int channel, first, last;  // the first of its eight channels; its tokens
    bool inside;               // whether there are such channels
    __device__ __forceinline__ Stretch(int length, int channels)
        : channel((blockIdx.x * 32 + (threadIdx.x & 31)) * 8),
          first((blockIdx.z * WARPS + (threadIdx.x >> 5)) * STEPS), last(min(length, first + STEPS)),
          inside(channel < channels) {}
};

// Whether there is such a token; stretches may begin after the last one.
__device__ __forceinline__ bool real(int time, int length) { return time >= 0 && time < length; }

__device__ __forceinline__ void load_weights(
    const float* weight, const float* bias, const Stretch& at, float (&w)[TAPS][8], float (&b)[8])
{
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        b[k] = at.inside ? bias[at.channel + k] : 0.f;
#pragma unroll
        for (int tap = 0; tap < TAPS; ++tap) w[tap][k] = at.inside ? weight[(at.channel + k) * TAPS + tap] : 0.f;
    }
}

// Moves the inputs in `seen`, the newest last, up by x; where a document begins those before it are forgotten.
__device__ __forceinline__ void see(float (&seen)[TAPS][8], const Eight& x, bool reset)
{
#pragma unroll
    for (int tap = 0; tap < BEFORE; ++tap)
#pragma unroll
        for (int k = 0; k < 8; ++k) seen[tap][k] = reset ? 0.f : seen[tap + 1][k];
    unpack(x, seen[BEFORE]);
}

__device__ __forceinline__ float convolve(const float (&seen)[TAPS][8], const float (&w)[TAPS][8], float bias, int k)
{
    float sum = bias;
#pragma unroll
    for (int tap = 0; tap < TAPS; ++tap) sum += w[tap][k] * seen[tap][k];
    return sum;
}

extern "C" __global__ void __launch_bounds__(THREADS) conv_forward(
    const Element* x,                       // [batch, length, channels] by strides
    const float* weight, const float* bias,  // [channels, TAPS], [channels]
    const unsigned char* resets,            // [batch, length] or null
    Element* out,                           // [batch, length, channels] by strides
    int length, int channels, int64 x_batch, int x_time, int64 out_batch, int out_time)
{
    const Stretch at(length, channels);
    const Rows x_rows(x_batch, x_time, at.channel), out_rows(out_batch, out_time, at.channel);
    const int64 row = int64(blockIdx.y) * length;
    float w[TAPS][8], b[8], seen[TAPS][8] = {};
    load_weights(weight, bias, at, w, b);
#pragma unroll
    for (int time = at.first - BEFORE; time < at.first; ++time) {
        const bool there = real(time, length);
        see(seen, load_at(x, x_rows.at(time), at.inside && there), load_flag(resets, row + time, there));
    }
#pragma unroll 4
    for (int time = at.first; time < at.last; ++time) {
        see(seen, load_at(x, x_rows.at(time), at.inside), load_flag(resets, row + time, true));
        float y[8];
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float sum = convolve(seen, w, b[k], k);
            y[k] = sum * sigmoid(sum);
        }
        if (at.inside) store_at(out, out_rows.at(time), y);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) conv_backward(
    const Element* x,                       // [batch, length, channels] by strides
    const float* weight, const float* bias,  // [channels, TAPS], [channels]
    const unsigned char* resets,            // [batch, length] or null
    const Element* grad_out,                // [batch, length, channels] by strides
    Element* grad_x,                        // [batch, length, channels] by strides
    float* grad_weight,                     // of weights, tap by tap, and bias: [batch, stretches of a block, TAPS + 1, channels]
    int length, int channels, int64 x_batch, int x_time, int64 grad_batch, int grad_time, int64 out_batch, int out_time)
{
    __shared__ float sums[WARPS][TAPS + 1][8][32];
    const Stretch at(length, channels);
    const Rows x_rows(x_batch, x_time, at.channel), grad_rows(grad_batch, grad_time, at.channel);
    const Rows out_rows(out_batch, out_time, at.channel);
    const int64 row = int64(blockIdx.y) * length;
    float w[TAPS][8], b[8], seen[TAPS][8] = {}, total[TAPS + 1][8] = {};
    float pending[TAPS][8] = {};  // gradients of the inputs in `seen`, so far
    int known = 0;                // how many of the inputs before the current one are of its document
    load_weights(weight, bias, at, w, b);
#pragma unroll
    for (int time = at.first - BEFORE; time < at.first; ++time) {
        const bool there = real(time, length), reset = load_flag(resets, row + time, there);
        see(seen, load_at(x, x_rows.at(time), at.inside && there), reset);
        known = reset ? 0 : known + (time > at.first - BEFORE);
    }
    // Tokens after the stretch see its last ones.
#pragma unroll 2
    for (int time = at.first; time < at.last + BEFORE; ++time) {
        const bool own = time < at.last, inside = at.inside && time < length;
        const bool reset = load_flag(resets, row + time, time < length);
        see(seen, load_at(x, x_rows.at(time), inside), reset);
        known = reset ? 0 : min(known + 1, BEFORE);
        float grad[8], ready[8];
        unpack(load_at(grad_out, grad_rows.at(time), inside), grad);
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            const float sum = convolve(seen, w, b[k], k), gate = sigmoid(sum);
            const float g = grad[k] * gate * (1.f + sum * (1.f - gate)), counted = own ? g : 0.f;
#pragma unroll
            for (int tap = 0; tap < BEFORE; ++tap) pending[tap][k] = pending[tap + 1][k];
            pending[BEFORE][k] = 0.f;
#pragma unroll
            for (int tap = 0; tap < TAPS; ++tap) {
                pending[tap][k] += BEFORE - tap <= known ? w[tap][k] * g : 0.f;
                total[tap][k] += counted * seen[tap][k];
            }
            total[TAPS][k] += counted;
            ready[k] = pending[0][k];
        }
        const int done = time - BEFORE;  // sees no later token
        if (at.inside && done >= at.first && done < at.last) store_at(grad_x, out_rows.at(done), ready);
    }

    const int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
#pragma unroll
    for (int tap = 0; tap <= TAPS; ++tap)
#pragma unroll
        for (int k = 0; k < 8; ++k) sums[warp][tap][k][lane] = total[tap][k];
    __syncthreads();
    for (int f = threadIdx.x; f < (TAPS + 1) * 256; f += THREADS) {
        const int tap = f / 256, place = f % 256, channel = blockIdx.x * 256 + place;
        float sum = 0.f;
#pragma unroll
        for (int other = 0; other < WARPS; ++other) sum += sums[other][tap][place % 8][place / 8];
        const int64 block = int64(blockIdx.y) * gridDim.z + blockIdx.z;
        if (channel < channels) grad_weight[(block * (TAPS + 1) + tap) * channels + channel] = sum;
    }
}
