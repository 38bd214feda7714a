// What the selective scan's forward and backward share. Compiled at first use, for one dtype and number of states:
//   INPUT    0 float32, 1 bfloat16, 2 float16: u, dt, z and their gradients; states and sums are always float32
//   N        states of a channel: 16, 32 or 64
//   ENDS     1: only the state that each time segment reaches from zero (backward: the gradient that it hands back)
//   WARPS    of a block
//   BLOCKS   of the kernel that a multiprocessor shall hold at once
//
// A warp owns 16 channels with all their states; a thread N / 8 channels x 4 states, so that most of both sums, over
// states (y) and over channels (gradients of B and C), stays inside threads. Lane = r * Q + q: q counts groups of states,
// r groups of channels. Time is walked in tiles of 16 steps. In the elementwise phases of a tile a lane has one step
// (lane / 2) of eight channels, for 16-byte accesses; the recurrence alone runs in between.
//
// A thread's channels and states are stored in registers in an order that depends on the lane (register i holds channel
// i ^ q's low bits, register j state j ^ r's low bits): in each halving exchange over lanes the register to send is then
// the same on both sides, and no selects are needed.


#define TILE 16
#define THREADS (32 * WARPS)
#define WARP_CHANNELS 16
#define BLOCK_CHANNELS (WARPS * WARP_CHANNELS)

typedef unsigned int uint32;
typedef long long int64;

constexpr int Q = N / 4;            // lanes over states
constexpr int R = 32 / Q;           // lanes over channels
constexpr int CH = N / 8;           // channels of a thread
constexpr int COPIES = R / 2;       // of a tile's B and C, one for each order of states
constexpr int FOURS = 2 * Q * TILE; // 16-byte words of a tile's B and C
constexpr int FILLS = (FOURS + THREADS - 1) / THREADS;  // of a thread
constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;
constexpr float FORGET = 1e30f;     // a step size so large that the state before it is lost: a document begins

#if INPUT == 0
typedef float Element;
struct Eight { uint4 lo, hi; };     // eight elements as they lie in memory
struct States { float value[4 * CH]; };
#else
typedef unsigned short Element;
struct Eight { uint4 lo; };
struct States { uint32 pair[2 * CH]; };
#endif

__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float across(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// Two floats as the halves of a word, and back; bfloat16 for states whatever the 16-bit inputs are.
__device__ __forceinline__ uint32 pack_bf16(float low, float high) {
    uint32 word; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); return word;
}
__device__ __forceinline__ float low_bf16(uint32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bf16(uint32 word) { return __uint_as_float(word & 0xffff0000u); }

#if INPUT == 2
__device__ __forceinline__ uint32 pack(float low, float high) {
    uint32 word; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); return word;
}
__device__ __forceinline__ float half_to_float(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ __forceinline__ float low(uint32 word) { return half_to_float((unsigned short)word); }
__device__ __forceinline__ float high(uint32 word) { return half_to_float((unsigned short)(word >> 16)); }
#else
__device__ __forceinline__ uint32 pack(float low, float high) { return pack_bf16(low, high); }
__device__ __forceinline__ float low(uint32 word) { return low_bf16(word); }
__device__ __forceinline__ float high(uint32 word) { return high_bf16(word); }
#endif

__device__ __forceinline__ Eight load_eight(const Element* from, bool inside) {
    Eight x;
    const uint4 zero = make_uint4(0, 0, 0, 0);
    const uint4* words = reinterpret_cast<const uint4*>(from);
    x.lo = inside ? __ldg(words) : zero;
#if INPUT == 0
    x.hi = inside ? __ldg(words + 1) : zero;
#endif
    return x;
}

__device__ __forceinline__ void unpack(const Eight& x, float (&out)[8]) {
#if INPUT == 0
    out[0] = __uint_as_float(x.lo.x); out[1] = __uint_as_float(x.lo.y);
    out[2] = __uint_as_float(x.lo.z); out[3] = __uint_as_float(x.lo.w);
    out[4] = __uint_as_float(x.hi.x); out[5] = __uint_as_float(x.hi.y);
    out[6] = __uint_as_float(x.hi.z); out[7] = __uint_as_float(x.hi.w);
#else
    out[0] = low(x.lo.x); out[1] = high(x.lo.x); out[2] = low(x.lo.y); out[3] = high(x.lo.y);
    out[4] = low(x.lo.z); out[5] = high(x.lo.z); out[6] = low(x.lo.w); out[7] = high(x.lo.w);
#endif
}

__device__ __forceinline__ void store_eight(Element* to, const float (&x)[8]) {
    uint4* words = reinterpret_cast<uint4*>(to);
#if INPUT == 0
    words[0] = make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]), __float_as_uint(x[3]));
    words[1] = make_uint4(__float_as_uint(x[4]), __float_as_uint(x[5]), __float_as_uint(x[6]), __float_as_uint(x[7]));
#else
    words[0] = make_uint4(pack(x[0], x[1]), pack(x[2], x[3]), pack(x[4], x[5]), pack(x[6], x[7]));
#endif
}

// This lane's eight channels in an activation, [length, ...] of one sequence.
struct Column {
    const char* first;
    int row_bytes;
    __device__ __forceinline__ Column(const Element* x, int64 batch_stride, int time_stride, int channel)
        : first(reinterpret_cast<const char*>(x + blockIdx.y * batch_stride + channel)),
          row_bytes(time_stride * int(sizeof(Element))) {}
    __device__ __forceinline__ const Element* at(int time) const {
        return reinterpret_cast<const Element*>(first + int64(time) * row_bytes);
    }
    __device__ __forceinline__ Eight load(int time, bool inside) const { return load_eight(at(time), inside); }
    __device__ __forceinline__ void store(int time, const float (&x)[8]) const {
        store_eight(const_cast<Element*>(at(time)), x);
    }
};

__device__ __forceinline__ States pack_states(const float (&h)[CH][4]) {
    States packed;
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
#if INPUT == 0
            packed.value[4 * i + j] = h[i][j];
            packed.value[4 * i + j + 1] = h[i][j + 1];
#else
            packed.pair[2 * i + j / 2] = pack_bf16(h[i][j], h[i][j + 1]);
#endif
        }
    return packed;
}

__device__ __forceinline__ void unpack_states(const States& packed, float (&h)[CH][4]) {
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; j += 2) {
#if INPUT == 0
            h[i][j] = packed.value[4 * i + j];
            h[i][j + 1] = packed.value[4 * i + j + 1];
#else
            h[i][j] = low_bf16(packed.pair[2 * i + j / 2]);
            h[i][j + 1] = high_bf16(packed.pair[2 * i + j / 2]);
#endif
        }
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

// ln(1 + exp(x + bias)); with 16-bit inputs its error is below their rounding from steps of 1e-4 on.
__device__ __forceinline__ float softplus(float x, float bias) {
#if INPUT == 0
    x += bias;
    return x > 20.f ? x : log1pf(expf(x));
#else
    const float scaled = fmaf(x, LOG2E, bias * LOG2E), grown = log2_fast(1.f + exp2_fast(scaled));
    return LN2 * (scaled > 30.f ? scaled : grown);
#endif
}

// 1 / (1 + exp(-x)) of the x whose softplus is given: the derivative of softplus.
__device__ __forceinline__ float sigmoid_of_softplus(float step) {
#if INPUT == 0
    return -expm1f(-step);
#else
    return 1.f - exp2_fast(-LOG2E * step);
#endif
}

__device__ __forceinline__ float sigmoid(float x) {
#if INPUT == 0
    return 1.f / (1.f + expf(-x));
#else
    return reciprocal(1.f + exp2_fast(-x * LOG2E));
#endif
}

// An int and not a byte: the compiler would wait for a byte at once, to put it into its place in a register.
__device__ __forceinline__ int load_flag(const unsigned char* flags, int64 place, bool inside) {
    int flag = 0;
    if (flags && inside) flag = __ldg(flags + place);
    return flag;
}

// Where a thread stands in the recurrence.
struct Place {
    int lane, q, r, warp, order;
    int first_channel;  // of the warp
    __device__ __forceinline__ Place()
        : lane(threadIdx.x & 31), q(lane % Q), r(lane / Q), warp(threadIdx.x >> 5),
          order(R == 8 ? (r & 3) : R == 4 ? (r & 1) << 1 : 0),
          first_channel(blockIdx.x * BLOCK_CHANNELS + warp * WARP_CHANNELS) {}
    __device__ __forceinline__ int channel(int i) const { return CH * r + (i ^ (q & (CH - 1))); }  // in the warp
    __device__ __forceinline__ int state(int j) const { return 4 * q + (j ^ order); }
};

// A tile's B and C in shared memory, in each order of states that a lane may hold them in.
struct Projections {
    float4 b[TILE + 1][COPIES][Q];
    float4 shift[4];  // threads write B and C at once: this puts them into different banks
    float4 c[TILE + 1][COPIES][Q];
};

struct Fill { float4 value[FILLS]; };

__device__ __forceinline__ Fill load_projections(const float* bc, int64 first_row, int rows) {
    Fill fill;
#pragma unroll
    for (int k = 0; k < FILLS; ++k) {
        const int f = threadIdx.x + k * THREADS, step = f / (2 * Q);
        const float4* row = reinterpret_cast<const float4*>(bc + (first_row + step) * (2 * N));
        fill.value[k] = f < FOURS && step < rows ? __ldg(row + f % (2 * Q)) : make_float4(0.f, 0.f, 0.f, 0.f);
    }
    return fill;
}

__device__ __forceinline__ void store_projections(Projections& to, const Fill& fill) {
#pragma unroll
    for (int k = 0; k < FILLS; ++k) {
        const int f = threadIdx.x + k * THREADS, step = f / (2 * Q), place = f % (2 * Q);
        const float4 v = fill.value[k];
        if (FOURS % THREADS && f >= FOURS) break;
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
