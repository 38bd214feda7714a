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

// The states before a tile, as the forward keeps them for the backward. With 16-bit inputs they take 16 bits too: integers,
// in units of a 32767th of a power of two that is above a thread's states of the channel, and at most twice the largest.
// Of an infinite state nothing is kept, but the outputs after it are infinite or no numbers as well.
#if INPUT != 0
struct Border {
    uint4 words[CH / 2];
    int exponents[CH];  // of the power of two, as an fp32 number has it
};
constexpr int BORDER_BYTES = 32 * (sizeof(Border::words) + CH);
constexpr float UNITS = 32767.f;
constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: the bits of a sum with it end with an integer

__device__ __forceinline__ float power(int exponent) { return __uint_as_float(uint32(exponent) << 23); }

// In the order of registers that the backward has (Place).
__device__ __forceinline__ Border pack_border(const float (&h)[CH][4], int order) {
    Border border;
    const uint32 halves = 0x3210 ^ order * 0x2222;  // of two words, which to take as bytes of the first
    uint32* words = reinterpret_cast<uint32*>(border.words);
#pragma unroll
    for (int i = 0; i < CH; ++i) {
        float largest = 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) largest = fmaxf(largest, fabsf(h[i][j]));
        const int above = (__float_as_uint(largest) >> 23) + 1;
        border.exponents[i] = above > 16 ? above : 16;  // that units and their reciprocals are normal numbers
        const float scale = power(254 - border.exponents[i]) * UNITS;
        uint32 integers[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) integers[j] = __float_as_uint(fmaf(h[i][j], scale, ROUND));
        const uint32 first = __byte_perm(integers[0], integers[1], 0x5410);
        const uint32 second = __byte_perm(integers[2], integers[3], 0x5410);
        words[2 * i] = __byte_perm(first, second, halves);
        words[2 * i + 1] = __byte_perm(first, second, halves ^ 0x4444);
    }
    return border;
}

__device__ __forceinline__ void unpack_border(const Border& border, float (&h)[CH][4]) {
    const uint32* words = reinterpret_cast<const uint32*>(border.words);
#pragma unroll
    for (int i = 0; i < CH; ++i) {
        const float unit = power(border.exponents[i]) * (1.f / UNITS);
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
            const uint32 pair = words[2 * i + j / 2];
            h[i][j] = unit * short(pair);
            h[i][j + 1] = unit * short(pair >> 16);
        }
    }
}

__device__ __forceinline__ void store_border(char* to, const Border& border, int lane) {
    unsigned char* exponents = reinterpret_cast<unsigned char*>(to + 32 * sizeof(border.words));
#pragma unroll
    for (int k = 0; k < CH / 2; ++k) reinterpret_cast<uint4*>(to)[k * 32 + lane] = border.words[k];
#pragma unroll
    for (int i = 0; i < CH; ++i) exponents[i * 32 + lane] = border.exponents[i];
}

__device__ __forceinline__ Border load_border(const char* from, int lane) {
    const unsigned char* exponents = reinterpret_cast<const unsigned char*>(from + 32 * sizeof(Border::words));
    Border border;
#pragma unroll
    for (int k = 0; k < CH / 2; ++k) border.words[k] = reinterpret_cast<const uint4*>(from)[k * 32 + lane];
#pragma unroll
    for (int i = 0; i < CH; ++i) border.exponents[i] = exponents[i * 32 + lane];
    return border;
}
#else
typedef States Border;
constexpr int BORDER_BYTES = 32 * sizeof(Border);

__device__ __forceinline__ Border pack_border(const float (&h)[CH][4], int order) {
    Border border = pack_states(h);
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const Border before = border;
#pragma unroll
        for (int k = 0; k < 4 * CH; ++k) border.value[k] = order & bit ? before.value[k ^ bit] : before.value[k];
    }
    return border;
}
__device__ __forceinline__ void unpack_border(const Border& border, float (&h)[CH][4]) { unpack_states(border, h); }
__device__ __forceinline__ void store_border(char* to, const Border& border, int lane) {
    store_states(reinterpret_cast<uint4*>(to), border, lane);
}
__device__ __forceinline__ Border load_border(const char* from, int lane) {
    return load_states(reinterpret_cast<const uint4*>(from), lane);
}
#endif

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
