// AdamW's step (arXiv 1711.05101) of many fp32 tensors in one launch; a block takes CHUNK elements of one of them.
//   THREADS  of a block
//   CHUNK    a multiple of 4 * THREADS
//   INPUT    of the rounded copies, in 16 bits

// A row for each tensor: addresses of weights, gradients, moments, the step's number, counted from 1, and the weights'
// rounded copy or null; elements; and the first of its blocks.
struct Row {
    float *weight; const float *gradient; float *first, *second; const float *step; unsigned short *rounded;
    int64 elements, block;
};

struct Factors { float decay, beta1, new1, beta2, new2, size, root, eps, scale; };

__device__ __forceinline__ void update(float& w, float g, float& m, float& v, const Factors& f) {
    g *= f.scale;
    m = f.beta1 * m + f.new1 * g;
    v = f.beta2 * v + f.new2 * g * g;
    w = f.decay * w - f.size * m / (sqrtf(v) * f.root + f.eps);
}

__device__ __forceinline__ bool aligned(const Row& row) {
    const int64 fp32 = (int64)row.weight | (int64)row.gradient | (int64)row.first | (int64)row.second;
    return (fp32 & 15) == 0 && ((int64)row.rounded & 7) == 0;
}

__device__ __forceinline__ const Row& row_of(const Row* rows, int tensors, int block) {
    int low = 0, high = tensors;  // the last row whose first block is not after this one
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        if (rows[middle].block <= block) low = middle; else high = middle;
    }
    return rows[low];
}

extern "C" __global__ void __launch_bounds__(THREADS) adamw(
    const Row* rows, int tensors, const float* grad_scale, const float* found_inf, double lr, double beta1, double beta2,
    double eps, double decay)
{
    if (found_inf && *found_inf) return;
    __shared__ Row row;
    __shared__ Factors f;
    if (threadIdx.x == 0) {
        row = row_of(rows, tensors, blockIdx.x);
        const double corrected1 = 1.0 - pow(beta1, (double)*row.step), corrected2 = 1.0 - pow(beta2, (double)*row.step);
        f = {(float)(1.0 - lr * decay), (float)beta1, (float)(1.0 - beta1), (float)beta2, (float)(1.0 - beta2),
             (float)(lr / corrected1), (float)rsqrt(corrected2), (float)eps, grad_scale ? 1.0f / *grad_scale : 1.0f};
    }
    __syncthreads();
    const int64 start = (blockIdx.x - row.block) * CHUNK, rest = row.elements - start;
    float* __restrict__ weight = row.weight + start;
    float* __restrict__ first = row.first + start;
    float* __restrict__ second = row.second + start;
    const float* __restrict__ gradient = row.gradient + start;
    unsigned short* __restrict__ rounded = row.rounded ? row.rounded + start : nullptr;
    if (rest >= CHUNK && aligned(row)) {
#pragma unroll
        for (int i = 4 * threadIdx.x; i < CHUNK; i += 4 * THREADS) {
            float4 w = *(float4*)(weight + i), m = *(float4*)(first + i), v = *(float4*)(second + i);
            const float4 g = __ldcs((const float4*)(gradient + i));
            update(w.x, g.x, m.x, v.x, f); update(w.y, g.y, m.y, v.y, f);
            update(w.z, g.z, m.z, v.z, f); update(w.w, g.w, m.w, v.w, f);
            *(float4*)(weight + i) = w; *(float4*)(first + i) = m; *(float4*)(second + i) = v;
            if (rounded) *(uint2*)(rounded + i) = make_uint2(pack(w.x, w.y), pack(w.z, w.w));
        }
        return;
    }
    const int elements = rest < CHUNK ? (int)rest : CHUNK;
    for (int i = threadIdx.x; i < elements; i += THREADS) {
        update(weight[i], gradient[i], first[i], second[i], f);
        if (rounded) rounded[i] = (unsigned short)pack(weight[i], 0.f);
    }
}
