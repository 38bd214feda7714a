// What the CUDA C++ sources take from CUDA, for a C++ compiler: a kernel's threads run on the CPU, one at a time, each up
// to its next barrier. host_cuda.py puts sources behind this, and behind them HOST_KERNEL of each kernel.

#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <utility>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __align__(bytes) __attribute__((aligned(bytes)))
// Blocks run one after the other: what they share is static, in a section of its own to be poisoned before each.
#define __shared__ static __attribute__((section("host_shared")))

struct dim3 { unsigned x, y, z; };
static dim3 gridDim, blockDim, blockIdx, threadIdx;

struct __align__(8) float2 { float x, y; };
struct __align__(16) float4 { float x, y, z, w; };
struct __align__(8) uint2 { unsigned x, y; };
struct __align__(16) uint4 { unsigned x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
static inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
static inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

static inline int min(int a, int b) { return a < b ? a : b; }
#define rsqrt(x) (1 / sqrt(x))  // newer C libraries have a function of that name

template <typename To, typename From> static inline To same_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "");
    To to;
    memcpy(&to, &from, sizeof(to));
    return to;
}
static inline float __uint_as_float(unsigned x) { return same_bits<float>(x); }
static inline unsigned __float_as_uint(float x) { return same_bits<unsigned>(x); }

static inline unsigned __byte_perm(unsigned low, unsigned high, unsigned selector) {
    const uint64_t bytes = uint64_t(high) << 32 | low;
    unsigned result = 0;
    for (int k = 0; k < 4; ++k) result |= unsigned(bytes >> 8 * (selector >> 4 * k & 7) & 0xff) << 8 * k;
    return result;
}

template <typename T> static inline T __ldg(const T* from) { return *from; }
template <typename T> static inline T __ldcs(const T* from) { return *from; }

// Instructions that the sources have as asm, by their names in PTX.

static inline float flushed(float x) { return fabsf(x) < 0x1p-126f ? copysignf(0.f, x) : x; }
static inline float ex2_approx_ftz_f32(float x) { return flushed(exp2f(flushed(x))); }
static inline float lg2_approx_ftz_f32(float x) { return log2f(flushed(x)); }
static inline float rcp_approx_ftz_f32(float x) { return flushed(1 / flushed(x)); }

static inline unsigned to_bf16(float x) {
    const unsigned bits = __float_as_uint(x);
    return x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
static inline unsigned cvt_rn_bf16x2_f32(float high, float low) { return to_bf16(high) << 16 | to_bf16(low); }

static inline unsigned to_f16(float x) {
    const unsigned sign = signbit(x) ? 0x8000 : 0;
    if (x != x) return 0x7fff;
    x = fabsf(x);
    if (x >= 65520) return sign | 0x7c00;
    const int exponent = x < 0x1p-14f ? -14 : ilogbf(x);
    // The implicit bit counts as one of the exponent; a mantissa rounded up to 2 carries into it too.
    return sign + (unsigned(exponent + 14) << 10) + unsigned(nearbyintf(ldexpf(x, 10 - exponent)));
}
static inline unsigned cvt_rn_f16x2_f32(float high, float low) { return to_f16(high) << 16 | to_f16(low); }
static inline float cvt_f32_f16(unsigned short x) {
    const int exponent = x >> 10 & 31, mantissa = x & 1023;
    const float size = exponent == 31  ? (mantissa ? NAN : INFINITY)
                       : exponent == 0 ? ldexpf(mantissa, -24)
                                       : ldexpf(1024 + mantissa, exponent - 25);
    return x & 0x8000 ? -size : size;
}

namespace host {

constexpr int WARP = 32, STACK_BYTES = 256 * 1024;
enum State { RUNS, AT_SHUFFLE, AT_WARP, AT_BLOCK, RETURNED };
enum Problem { NONE, ARGUMENTS = -1, DIVERGED = -2 };  // or a signal

struct Fiber {
    ucontext_t start;
    jmp_buf at;
    bool started;
    State state;
    float sent[2];  // in turns: others still read the last one
    int turn;
};

// As host_cuda.py has it.
struct Report {
    int problem;
    unsigned block[3], thread;
    uint64_t address;
};

static Fiber* fibers;
static Fiber* current;
static jmp_buf scheduler;
static sigjmp_buf escape;
static Report* report;
static void** arguments;
static char* dynamic_memory;
static void (*run_thread)();

[[noreturn]] static void fail(int problem, const void* address) {
    *report = {problem, {blockIdx.x, blockIdx.y, blockIdx.z}, threadIdx.x, reinterpret_cast<uint64_t>(address)};
    siglongjmp(escape, 1);
}
static void on_signal(int signal, siginfo_t* info, void*) { fail(signal, info->si_addr); }

static __attribute__((noinline)) void wait_at(State barrier) {
    current->state = barrier;
    if (!_setjmp(current->at)) _longjmp(scheduler, 1);
}

static void enter() {
    run_thread();
    current->state = RETURNED;
    _longjmp(scheduler, 1);
}

static void resume(int thread) {
    current = &fibers[thread];
    threadIdx.x = thread;
    if (_setjmp(scheduler)) return;
    if (current->started) _longjmp(current->at, 1);
    current->started = true;
    setcontext(&current->start);
}

// Runs a warp until its threads have returned or wait for the block.
static void run_warp(int first, int threads, bool backwards) {
    for (;;) {
        for (int k = 0; k < threads; ++k) {
            const int thread = first + (backwards ? threads - 1 - k : k);
            if (fibers[thread].state == RUNS) resume(thread);
        }
        State common = RETURNED;  // of the threads that have not returned
        for (int thread = first; thread < first + threads; ++thread) {
            const State state = fibers[thread].state;
            if (state == RETURNED) continue;
            if (common != RETURNED && state != common) fail(DIVERGED, nullptr);
            common = state;
        }
        if (common == RETURNED || common == AT_BLOCK) return;
        for (int thread = first; thread < first + threads; ++thread)
            if (fibers[thread].state == common) fibers[thread].state = RUNS;
    }
}

static void run_block(char* stacks, bool backwards) {
    const int threads = blockDim.x;
    for (int thread = 0; thread < threads; ++thread) {
        Fiber& fiber = fibers[thread];
        fiber.state = RUNS;
        fiber.started = false;
        fiber.turn = 0;
        getcontext(&fiber.start);
        fiber.start.uc_stack.ss_sp = stacks + size_t(thread) * STACK_BYTES;
        fiber.start.uc_stack.ss_size = STACK_BYTES;
        fiber.start.uc_link = nullptr;
        makecontext(&fiber.start, enter, 0);
    }
    for (bool left = true; left;) {
        const int warps = (threads + WARP - 1) / WARP;
        for (int k = 0; k < warps; ++k) {
            const int first = (backwards ? warps - 1 - k : k) * WARP;
            run_warp(first, min(WARP, threads - first), backwards);
        }
        left = false;
        for (int thread = 0; thread < threads; ++thread)
            if (fibers[thread].state == AT_BLOCK) fibers[thread].state = RUNS, left = true;
    }
}

extern "C" char __start_host_shared[] __attribute__((weak, visibility("hidden")));
extern "C" char __stop_host_shared[] __attribute__((weak, visibility("hidden")));

static void run_grid(char* stacks, int dynamic_bytes, bool backwards) {
    for (blockIdx.z = 0; blockIdx.z < gridDim.z; ++blockIdx.z)
        for (blockIdx.y = 0; blockIdx.y < gridDim.y; ++blockIdx.y)
            for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {
                // Bytes of NaN.
                memset(__start_host_shared, 0xff, __stop_host_shared - __start_host_shared);
                memset(dynamic_memory, 0xff, dynamic_bytes);
                run_block(stacks, backwards);
            }
}

// Whether a kernel takes arguments of these sizes.
template <typename... A> static bool takes(void (*)(A...), const int* sizes, int count) {
    const int wanted[] = {int(sizeof(A))...};
    return count == int(sizeof...(A)) && !memcmp(sizes, wanted, sizeof(wanted));
}

template <typename... A, size_t... K> static void call(void (*kernel)(A...), std::index_sequence<K...>) {
    kernel(*static_cast<A*>(arguments[K])...);
}
template <typename... A> static void call(void (*kernel)(A...)) { call(kernel, std::index_sequence_for<A...>()); }

// Runs the grid; signals are the caller's again afterwards.
static void launch(const int* grid, int threads, int dynamic_bytes, bool backwards) {
    constexpr int SIGNALS[] = {SIGSEGV, SIGBUS, SIGILL, SIGTRAP};
    struct sigaction before[4], action = {};
    action.sa_sigaction = on_signal;
    action.sa_flags = SA_SIGINFO;
    gridDim = {unsigned(grid[0]), unsigned(grid[1]), unsigned(grid[2])};
    blockDim = {unsigned(threads), 1, 1};
    const size_t bytes = size_t(threads) * STACK_BYTES;
    char* stacks = static_cast<char*>(mmap(nullptr, bytes, PROT_READ | PROT_WRITE,
                                           MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    fibers = new Fiber[threads];
    for (int k = 0; k < 4; ++k) sigaction(SIGNALS[k], &action, &before[k]);
    if (!sigsetjmp(escape, 1)) run_grid(stacks, dynamic_bytes, backwards);
    for (int k = 0; k < 4; ++k) sigaction(SIGNALS[k], &before[k], nullptr);
    delete[] fibers;
    munmap(stacks, bytes);
}

}  // namespace host

static inline void __syncthreads() { host::wait_at(host::AT_BLOCK); }
static inline void __syncwarp() { host::wait_at(host::AT_WARP); }
static inline float __shfl_xor_sync(unsigned, float x, int lanes) {
    const int turn = host::current->turn;
    host::current->sent[turn] = x;
    host::current->turn = 1 - turn;
    host::wait_at(host::AT_SHUFFLE);
    const host::Fiber& other = host::fibers[threadIdx.x ^ lanes];
    if (other.state == host::RETURNED && other.turn == turn) host::fail(host::DIVERGED, nullptr);
    return other.sent[turn];
}

// grid: of three; values and sizes: of the kernel's arguments; memory: dynamic_bytes of shared memory.
#define HOST_KERNEL(kernel)                                                                                           \
    extern "C" __attribute__((visibility("default"))) void launch_##kernel(                                           \
        const int* grid, int threads, void** values, const int* sizes, int count, char* memory, int dynamic_bytes,    \
        int backwards, host::Report* report)                                                                          \
    {                                                                                                                 \
        host::report = report;                                                                                        \
        host::arguments = values;                                                                                     \
        host::dynamic_memory = memory;                                                                                \
        host::run_thread = [] { host::call(kernel); };                                                                \
        report->problem = host::takes(kernel, sizes, count) ? host::NONE : host::ARGUMENTS;                           \
        if (!report->problem) host::launch(grid, threads, dynamic_bytes, backwards);                                  \
    }
