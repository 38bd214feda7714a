// Elements of activations and the arithmetic on them.
//   INPUT    0 float32, 1 bfloat16, 2 float16

typedef unsigned int uint32;
typedef long long int64;

constexpr float LOG2E = 1.4426950408889634f;
constexpr float LN2 = 0.6931471805599453f;

#if INPUT == 0
typedef float Element;
struct Eight { uint4 lo, hi; };  // eight elements as they lie in memory
#else
typedef unsigned short Element;
struct Eight { uint4 lo; };
#endif

__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float log2_fast(float x) { float y; asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float reciprocal(float x) { float y; asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ float across(float x, int lanes) { return __shfl_xor_sync(0xffffffffu, x, lanes); }

// Two floats as the halves of a word, and back.
__device__ __forceinline__ uint32 pack_bf16(float low, float high) {
    uint32 word; asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); return word;
}
__device__ __forceinline__ float low_bf16(uint32 word) { return __uint_as_float(word << 16); }
__device__ __forceinline__ float high_bf16(uint32 word) { return __uint_as_float(word & 0xffff0000u); }
__device__ __forceinline__ uint32 pack_f16(float low, float high) {
    uint32 word; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low)); return word;
}
__device__ __forceinline__ float half_to_float(unsigned short x) { float y; asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x)); return y; }
__device__ __forceinline__ float low_f16(uint32 word) { return half_to_float((unsigned short)word); }
__device__ __forceinline__ float high_f16(uint32 word) { return half_to_float((unsigned short)(word >> 16)); }

#if INPUT == 2
__device__ __forceinline__ uint32 pack(float low, float high) { return pack_f16(low, high); }
__device__ __forceinline__ float low(uint32 word) { return low_f16(word); }
__device__ __forceinline__ float high(uint32 word) { return high_f16(word); }
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

// Where a thread's eight channels of a token lie, in bytes; the same for all activations that lie in memory alike.
struct Rows {
    int64 first;
    int row_bytes;
    __device__ __forceinline__ Rows(int64 batch_stride, int time_stride, int channel)
        : first((blockIdx.y * batch_stride + channel) * int(sizeof(Element))),
          row_bytes(time_stride * int(sizeof(Element))) {}
    __device__ __forceinline__ int64 at(int time) const { return first + int64(time) * row_bytes; }
};

__device__ __forceinline__ Eight load_at(const Element* x, int64 bytes, bool inside) {
    return load_eight(reinterpret_cast<const Element*>(reinterpret_cast<const char*>(x) + bytes), inside);
}
__device__ __forceinline__ void store_at(Element* x, int64 bytes, const float (&values)[8]) {
    store_eight(reinterpret_cast<Element*>(reinterpret_cast<char*>(x) + bytes), values);
}

// An int and not a byte: the compiler would wait for a byte at once, to put it into its place in a register.
__device__ __forceinline__ int load_flag(const unsigned char* flags, int64 place, bool inside) {
    int flag = 0;
    if (flags && inside) flag = __ldg(flags + place);
    return flag;
}

// ln(1 + exp(x + bias)) of a bias in units of SOFTPLUS_UNIT; with 16-bit inputs its error is below their rounding from
// steps of 1e-4 on.
#if INPUT == 0
constexpr float SOFTPLUS_UNIT = 1.f;
#else
constexpr float SOFTPLUS_UNIT = LOG2E;
#endif
__device__ __forceinline__ float softplus(float x, float bias) {
#if INPUT == 0
    x += bias;
    return x > 20.f ? x : log1pf(expf(x));
#else
    const float scaled = fmaf(x, LOG2E, bias), grown = log2_fast(1.f + exp2_fast(scaled));
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

