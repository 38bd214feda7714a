// {step for the decay, dt * u, gradient of y, dt} of a channel and step, then {sum of g B, sum of g h' A, y} in the same
// place; the halves of a row are shifted against bank conflicts.
struct BackwardRow {
    float4 channel[WARP_CHANNELS + 2];
    __device__ __forceinline__ float4& at(int k) { return channel[k + (k >= 8)]; }
};

struct BackwardShared {
    Projections projections[2];
    BackwardRow slots[WARPS][TILE];
    uint4 states[WARPS][TILE][32 * STATE_WORDS];  // after each step; then the warp's gradients of B and C at that step
};

// Gradients of B and C summed over the warp's channels: a lane gets 8 / R of the 2 N sums.
__device__ __forceinline__ void add_over_channels(
    float* to, const Place& at, const float (&grad_b)[4], const float (&grad_c)[4])
{
    const bool top = at.r & (R / 2);
    float v[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = (top ? grad_c[j] : grad_b[j]) + across(top ? grad_b[j] : grad_c[j], R / 2 * Q);
#pragma unroll
    for (int m = 2, lanes = R / 4 * Q; lanes >= Q; m /= 2, lanes /= 2)
#pragma unroll
        for (int j = 0; j < m; ++j) v[j] += across(v[j + m], lanes);
#pragma unroll
    for (int j = 0; j < 8 / R; ++j) to[(top ? N : 0) + at.state(j)] = v[j];
}

// The elementwise work before the recurrence, on one step of eight channels.
__device__ __forceinline__ void before_tile(
    BackwardRow& row, int half, const Eight& raw_u, const Eight& raw_dt, const Eight& raw_z, const Eight& raw_grad,
    const float (&bias)[8], bool here, bool reset)
{
    float u[8], x[8], z[8], grad[8];
    unpack(raw_u, u); unpack(raw_dt, x); unpack(raw_z, z); unpack(raw_grad, grad);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float step = here ? softplus(x[k] + bias[k]) : 0.f;
        row.at(8 * half + k) = make_float4(reset ? FORGET : step, step * u[k], grad[k] * z[k] * sigmoid(z[k]), step);
    }
}

// The states after each step of a tile, again, from those before it; h holds the last.
__device__ __forceinline__ void states_of_tile(
    BackwardRow* slot, uint4 (*states)[32 * STATE_WORDS], const Projections& projection, const Place& at, int copy,
    const float (&a)[CH][4], float (&h)[CH][4])
{
#pragma unroll 4
    for (int t = 0; t < TILE; ++t) {
        float b[4];
        load_four(projection.b[t][copy][at.q], b);
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            const float4 in = slot[t].at(at.channel(i));
#pragma unroll
            for (int j = 0; j < 4; ++j) h[i][j] = exp2_fast(in.x * a[i][j]) * h[i][j] + in.y * b[j];
        }
        store_states(states[t], pack_states(h), at.lane);
    }
}

// The recurrence of the gradient, backwards through a tile. carry: the gradient that reaches the state after the tile,
// and then the one before it.
__device__ __forceinline__ void gradients_of_tile(
    BackwardRow* slot, uint4 (*states)[32 * STATE_WORDS], const States& border, const Projections& projection,
    const Place& at, int copy, const float (&a)[CH][4], float (&h)[CH][4], float (&carry)[CH][4], float (&sum_a)[CH][4])
{
    float4 in[CH];
    float b[4], c[4];
#pragma unroll
    for (int i = 0; i < CH; ++i) in[i] = slot[TILE - 1].at(at.channel(i));
    load_four(projection.b[TILE - 1][copy][at.q], b);
    load_four(projection.c[TILE - 1][copy][at.q], c);
    States before = load_states(states[TILE - 2], at.lane);
#pragma unroll 2
    for (int t = TILE - 1; t >= 0; --t) {
        // What the next turn needs is read ahead of this one's writes, which the compiler could not do.
        const int next = t > 0 ? t - 1 : 0;
        float4 next_in[CH];
#pragma unroll
        for (int i = 0; i < CH; ++i) next_in[i] = slot[next].at(at.channel(i));
        const float4 next_b = projection.b[next][copy][at.q], next_c = projection.c[next][copy][at.q];
        const States next_before = load_states(states[t > 1 ? t - 2 : 0], at.lane);

        float previous[CH][4], grad_b[4] = {}, grad_c[4] = {}, over_states[3][CH];
        unpack_states(before, previous);
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            float grad_input = 0.f, grad_decay = 0.f, y = 0.f;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const float g = c[j] * in[i].z + carry[i][j];
                y += c[j] * h[i][j];
                grad_c[j] += h[i][j] * in[i].z;
                grad_b[j] += g * in[i].y;
                grad_input += g * b[j];
                carry[i][j] = exp2_fast(in[i].x * a[i][j]) * g;
                const float through = carry[i][j] * previous[i][j];
                grad_decay += through * a[i][j];
                sum_a[i][j] += through * in[i].x;
                h[i][j] = previous[i][j];
            }
            over_states[0][i] = grad_input;
            over_states[1][i] = grad_decay;
            over_states[2][i] = y;
        }
        float* sums = reinterpret_cast<float*>(states[t]);  // read before, by all lanes
        add_over_channels(sums, at, grad_b, grad_c);
#pragma unroll
        for (int k = 0; k < 3; ++k) {
#pragma unroll
            for (int m = CH / 2; m >= 1; m /= 2)
#pragma unroll
                for (int i = 0; i < m; ++i) over_states[k][i] += across(over_states[k][i + m], m);
#pragma unroll
            for (int m = CH; m < Q; m *= 2) over_states[k][0] += across(over_states[k][0], m);
        }
        float4& result = slot[t].at(at.channel(0));
        if (at.q < CH) *reinterpret_cast<float2*>(&result.x) = make_float2(over_states[0][0], over_states[1][0]);
        else if (at.q < 2 * CH) result.z = over_states[2][0];
        load_four(next_b, b);
        load_four(next_c, c);
#pragma unroll
        for (int i = 0; i < CH; ++i) in[i] = next_in[i];
        before = t > 1 ? next_before : border;
    }
}

struct Gradients { float u[8], dt[8], z[8]; };

// The elementwise work after the recurrence.
__device__ __forceinline__ void after_tile(
    BackwardRow& row, int half, const Eight& raw_u, const Eight& raw_z, const Eight& raw_grad, const float (&skip)[8],
    bool here, Gradients& g, float (&sum_skip)[8], float (&sum_bias)[8])
{
    float u[8], z[8], grad[8];
    unpack(raw_u, u); unpack(raw_z, z); unpack(raw_grad, grad);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float4 found = row.at(8 * half + k);
        const float step = found.w, gate = sigmoid(z[k]), grad_y = grad[k] * z[k] * gate;
        g.u[k] = found.x * step + skip[k] * grad_y;
        g.dt[k] = (found.x * u[k] + LN2 * found.y) * sigmoid_of_softplus(step);
        g.z[k] = grad[k] * (found.z + skip[k] * u[k]) * gate * (1.f + z[k] * (1.f - gate));
        sum_skip[k] += grad_y * u[k];
        sum_bias[k] += here ? g.dt[k] : 0.f;
    }
}

// The block's sums over channels for the steps of a tile.
__device__ __forceinline__ void add_over_warps(float* to, const uint4 (*states)[TILE][32 * STATE_WORDS], int rows)
{
#pragma unroll
    for (int k = 0; k < FILLS; ++k) {
        const int f = threadIdx.x + k * THREADS, step = f / (2 * Q), place = f % (2 * Q);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            const float4 part = reinterpret_cast<const float4*>(states[warp][step])[place];
            sum.x += part.x; sum.y += part.y; sum.z += part.z; sum.w += part.w;
        }
        if (step < rows) reinterpret_cast<float4*>(to + step * (2 * N))[place] = sum;
    }
}

// Sums over the 16 lanes that have the same channels.
__device__ __forceinline__ void add_over_steps(float (&x)[8])
{
#pragma unroll
    for (int k = 0; k < 8; ++k)
#pragma unroll
        for (int lanes = 2; lanes < 32; lanes *= 2) x[k] += across(x[k], lanes);
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(
    const Element* u, const Element* dt, const Element* z,  // [batch, length, channels] by strides
    const float* bc,                                       // [batch, length, 2, N]
    const float* A, const float* D, const float* dt_bias,  // [channels, N], [channels], [channels]
    const unsigned char* resets,                           // [batch, length] or null
    const uint4* borders,                                  // of the forward
    const Element* grad_out,                               // [batch, length, channels] by strides
    const float* grad_end,  // of the state after each segment, [batch, segments, channels, N], or null: zeros
    Element* grad_u, Element* grad_dt, Element* grad_z,     // [batch, length, channels] by strides
    float* grad_bc,                                        // [blocks of channels, batch, length, 2, N]
    float* grad_A,                                         // [batch, segments, channels, N]
    float* grad_D, float* grad_bias,                       // [batch, segments, channels]
    float* grad_start,                                     // [batch, channels, N]; ENDS: [batch, segments, channels, N]
    int length, int channels, int segment_tiles,
    int64 u_batch, int64 u_time, int64 dt_batch, int64 dt_time, int64 z_batch, int64 z_time, int64 g_batch,
    int64 g_time, int64 o_batch, int64 o_time)
{
    extern __shared__ __align__(16) char memory[];
    BackwardShared& shared = *reinterpret_cast<BackwardShared*>(memory);

    const Place at;
    const int batch = blockIdx.y, segment = blockIdx.z, segments = gridDim.z;
    const int row = at.lane >> 1, half = at.lane & 1;
    const int eight = at.first_channel + 8 * half;
    const bool has_channels = eight < channels;
    const int copy = at.r & (COPIES - 1);
    BackwardRow* slot = shared.slots[at.warp];
    uint4(*states)[32 * STATE_WORDS] = shared.states[at.warp];

    float a[CH][4], carry[CH][4], sum_a[CH][4], bias[8], skip[8], sum_skip[8], sum_bias[8];
    read_states(A, 0, at, channels, a);
    read_states(grad_end, int64(batch * segments + segment) * channels, at, channels, carry);
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) { a[i][j] *= LOG2E; sum_a[i][j] = 0.f; }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        bias[k] = has_channels ? dt_bias[eight + k] : 0.f;
        skip[k] = has_channels ? D[eight + k] : 0.f;
        sum_skip[k] = sum_bias[k] = 0.f;
    }

    const int tiles = (length + TILE - 1) / TILE, warps = (channels + 15) / 16;
    const int first_tile = segment * segment_tiles, last_tile = min(tiles, first_tile + segment_tiles) - 1;
    const int64 row_of_batch = int64(batch) * length;
    int time = last_tile * TILE + row;
    bool inside = has_channels && time < length;
    Eight next_u = load_eight(u + batch * u_batch + time * u_time + eight, inside);
    Eight next_dt = load_eight(dt + batch * dt_batch + time * dt_time + eight, inside);
    Eight next_z = load_eight(z + batch * z_batch + time * z_time + eight, inside);
    Eight next_grad = load_eight(grad_out + batch * g_batch + time * g_time + eight, inside);
    unsigned char next_reset = resets && time < length ? resets[row_of_batch + time] : 0;
    Fill fill = load_projections(bc, row_of_batch + last_tile * TILE, length - last_tile * TILE);

    for (int tile = last_tile; tile >= first_tile; --tile) {
        Projections& projection = shared.projections[tile & 1];
        store_projections(projection, fill);
        const Eight raw_u = next_u, raw_dt = next_dt, raw_z = next_z, raw_grad = next_grad;
        const bool reset = next_reset, here = inside;
        const int64 now = time;
        States border;
        float h[CH][4];
        if (!ENDS && at.first_channel < channels) {
            const int64 place = (int64(batch) * tiles + tile) * warps + at.first_channel / 16;
            border = load_states(borders + place * (32 * STATE_WORDS), at.lane);
        } else {
            border = States();
        }
        __syncthreads();

        time -= TILE;
        inside = has_channels && tile > first_tile;
        next_u = load_eight(u + batch * u_batch + time * u_time + eight, inside && !ENDS);
        next_dt = load_eight(dt + batch * dt_batch + time * dt_time + eight, inside);
        next_z = load_eight(z + batch * z_batch + time * z_time + eight, inside);
        next_grad = load_eight(grad_out + batch * g_batch + time * g_time + eight, inside);
        next_reset = resets && inside ? resets[row_of_batch + time] : 0;
        fill = load_projections(bc, row_of_batch + (tile - 1) * TILE, tile > first_tile ? TILE : 0);

        before_tile(slot[row], half, raw_u, raw_dt, raw_z, raw_grad, bias, here, reset);
        __syncwarp();
#if ENDS
#pragma unroll 4
        for (int t = TILE - 1; t >= 0; --t) {
            float c[4];
            load_four(projection.c[t][copy][at.q], c);
#pragma unroll
            for (int i = 0; i < CH; ++i) {
                const float4 in = slot[t].at(at.channel(i));
#pragma unroll
                for (int j = 0; j < 4; ++j) carry[i][j] = exp2_fast(in.x * a[i][j]) * (c[j] * in.z + carry[i][j]);
            }
        }
        __syncwarp();
#else
        unpack_states(border, h);
        states_of_tile(slot, states, projection, at, copy, a, h);
        gradients_of_tile(slot, states, border, projection, at, copy, a, h, carry, sum_a);
        __syncwarp();
        Gradients g;
        after_tile(slot[row], half, raw_u, raw_z, raw_grad, skip, here, g, sum_skip, sum_bias);
        if (here) {
            const int64 to = batch * o_batch + now * o_time + eight;
            store_eight(grad_u + to, g.u);
            store_eight(grad_dt + to, g.dt);
            store_eight(grad_z + to, g.z);
        }
        __syncthreads();
        add_over_warps(grad_bc + (int64(blockIdx.x) * gridDim.y * length + row_of_batch + tile * TILE) * (2 * N),
                       shared.states, length - tile * TILE);
#endif
    }

    const int64 place = int64(batch * segments + segment) * channels;
#if ENDS
    write_states(grad_start, place, at, channels, carry);
#else
    if (segment == 0) write_states(grad_start, int64(batch) * channels, at, channels, carry);
    write_states(grad_A, place, at, channels, sum_a);
    add_over_steps(sum_skip);
    add_over_steps(sum_bias);
    if (row == 0 && has_channels)
#pragma unroll
        for (int k = 0; k < 8; ++k) {
            grad_D[place + eight + k] = sum_skip[k];
            grad_bias[place + eight + k] = sum_bias[k];
        }
#endif
}
