// What the selective scan's forward and backward share. Compiled at first use, for one dtype and number of states:
//   INPUT    of u, dt, z and their gradients (elements.cuh); states and sums are float32
//   N        states of a channel: 16, 32 or 64
//   ENDS     1: only the state that each time segment reaches from zero (backward: the gradient that it hands back)
//   GATED    1: the output is multiplied by SiLU(z); 0: there is no z
//   WARPS    of a block
//   BLOCKS   of the kernel that a multiprocessor shall hold at once
//   SHARED_BYTES  of dynamic shared memory that the kernel is launched with
//
// A warp owns 16 channels with all their states; a thread N / 8 channels x 4 states, so that most of both sums, over
// states (y) and over channels (gradients of B and C), stays inside threads. Lane = r * Q + q: q counts groups of states,
// r groups of channels. Time is walked in tiles of 16 steps. In the elementwise phases of a tile a lane has one step
// (lane / 2) of eight channels, for 16-byte accesses; the recurrence alone runs in between.
//
// A thread's channels are stored in registers in an order that depends on the lane, and in the backward its states too
// (register i holds channel i ^ q's low bits, register j state j ^ r's low bits): in each halving exchange over lanes the
// register to send is then the same on both sides, and no selects are needed. The forward has no sums over channels and
// keeps states as they are: lanes then read the same B and C, which lie in shared memory once.

#define TILE 16
#define THREADS (32 * WARPS)
#define WARP_CHANNELS 16
#define BLOCK_CHANNELS (WARPS * WARP_CHANNELS)

constexpr int Q = N / 4;            // lanes over states
constexpr int R = 32 / Q;           // lanes over channels
constexpr int CH = N / 8;           // channels of a thread
constexpr int FILLS = Q / WARPS;    // 16-byte loads of a thread for a tile's B and C
constexpr float FORGET = 1e30f;     // a step size so large that the state before it is lost: a document begins

struct States { float value[4 * CH]; };

__device__ __forceinline__ States pack_states(const float (&h)[CH][4]) {
    States states;
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) states.value[4 * i + j] = h[i][j];
    return states;
}

__device__ __forceinline__ void unpack_states(const States& states, float (&h)[CH][4]) {
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) h[i][j] = states.value[4 * i + j];
}

// States of a lane in memory, 16 bytes at a time with the lanes side by side.
constexpr int STATE_WORDS = sizeof(States) / 16;
__device__ __forceinline__ void store_states(uint4* to, const States& states, int lane) {
    const uint4* words = reinterpret_cast<const uint4*>(&states);
#pragma unroll
    for (int k = 0; k < STATE_WORDS; ++k) to[k * 32 + lane] = words[k];
}
__device__ __forceinline__ States load_states(const uint4* from, int lane) {
    States states;
    uint4* words = reinterpret_cast<uint4*>(&states);
#pragma unroll
    for (int k = 0; k < STATE_WORDS; ++k) words[k] = from[k * 32 + lane];
    return states;
}

// Where a thread stands in the recurrence, with its states ordered for sums over channels or as they are.
struct Place {
    int lane, q, r, warp, order;
    int first_channel;  // of the warp
    __device__ __forceinline__ explicit Place(bool ordered)
        : lane(threadIdx.x & 31), q(lane % Q), r(lane / Q), warp(threadIdx.x >> 5),
          order(!ordered ? 0 : R == 8 ? (r & 3) : R == 4 ? (r & 1) << 1 : 0),
          first_channel(blockIdx.x * BLOCK_CHANNELS + warp * WARP_CHANNELS) {}
    __device__ __forceinline__ int channel(int i) const { return CH * r + (i ^ (q & (CH - 1))); }  // in the warp
    __device__ __forceinline__ int state(int j) const { return 4 * q + (j ^ order); }
};

// A tile's B and C in shared memory, in each order of states that a lane may hold them in: 1, or R / 2 where these are
// ordered.
template <int COPIES> struct Projections {
    float4 b[TILE + 1][COPIES][Q];
    float4 shift[COPIES * Q == 4 ? 8 : 4];  // eight threads write B and C at once: this puts them into different banks
    float4 c[TILE + 1][COPIES][Q];
};

struct Fill { float4 value[FILLS]; };

__device__ __forceinline__ Fill load_projections(const float* bc, int64 first_row, int rows) {
    Fill fill;
#pragma unroll
    for (int k = 0; k < FILLS; ++k) {
        const int f = threadIdx.x + k * THREADS, step = f / (2 * Q);
        const float4* row = reinterpret_cast<const float4*>(bc + (first_row + step) * (2 * N));
        fill.value[k] = step < rows ? __ldg(row + f % (2 * Q)) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    return fill;
}

template <int COPIES>
__device__ __forceinline__ void store_projections(Projections<COPIES>& to, const Fill& fill) {
#pragma unroll
    for (int k = 0; k < FILLS; ++k) {
        const int f = threadIdx.x + k * THREADS, step = f / (2 * Q), place = f % (2 * Q);
        const float4 v = fill.value[k];
        float4(*rows)[Q] = place < Q ? to.b[step] : to.c[step];
        const int group = place % Q;
        rows[0][group] = v;
        if (COPIES == 2) rows[1][group] = make_float4(v.z, v.w, v.x, v.y);
        if (COPIES == 4) {
            rows[1][group] = make_float4(v.y, v.x, v.w, v.z);
            rows[2][group] = make_float4(v.z, v.w, v.x, v.y);
            rows[3][group] = make_float4(v.w, v.z, v.y, v.x);
        }
    }
}

__device__ __forceinline__ void load_four(const float4& from, float (&to)[4]) {
    to[0] = from.x; to[1] = from.y; to[2] = from.z; to[3] = from.w;
}

// An output, or its gradient, behind the gate.
__device__ __forceinline__ float gated(float value, float z) { return GATED ? value * z * sigmoid(z) : value; }

// A thread's states out of, or into, [..., channels, N].
__device__ __forceinline__ void read_states(const float* from, int64 first, const Place& at, int channels, float (&h)[CH][4]) {
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int channel = at.first_channel + at.channel(i);
            h[i][j] = from && channel < channels ? from[(first + channel) * N + at.state(j)] : 0.f;
        }
}
__device__ __forceinline__ void write_states(float* to, int64 first, const Place& at, int channels, const float (&h)[CH][4]) {
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const int channel = at.first_channel + at.channel(i);
            if (channel < channels) to[(first + channel) * N + at.state(j)] = h[i][j];
        }
}
