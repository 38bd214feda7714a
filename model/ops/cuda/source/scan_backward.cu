// {step for the decay, dt * u, gradient of y, dt} of a channel and step, then {sum of g B, sum of g h' A, y} in the same
// place; the halves of a row are shifted against bank conflicts.
struct BackwardRow {
    float4 channel[WARP_CHANNELS + 2];
    __device__ __forceinline__ static int place(int k) { return k + k / 8; }
};

constexpr int COPIES = R / 2;  // of a tile's B and C, one for each order of states
typedef Projections<COPIES> TileProjections;
typedef uint4 StateRow[32 * STATE_WORDS];

struct BackwardShared {
    // First, so that there is a row before the projections' first.
    __align__(16) float bias[BLOCK_CHANNELS];
    __align__(16) float skip[BLOCK_CHANNELS];
    TileProjections projections[2];
    BackwardRow slots[WARPS][TILE];
    // Before each pair of a tile's steps; then there the warp's gradients of B and C at these.
    StateRow states[WARPS][TILE / 2];
};

static_assert(sizeof(BackwardShared) == SHARED_BYTES, "cuda_scan_sizes.backward_shared_bytes has another size");

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

__device__ __forceinline__ void load_eight_floats(const float4* from, float (&to)[8]) {
    const float4 first = from[0], second = from[1];
    to[0] = first.x; to[1] = first.y; to[2] = first.z; to[3] = first.w;
    to[4] = second.x; to[5] = second.y; to[6] = second.z; to[7] = second.w;
}

// The elementwise work before the recurrence, on one step of eight channels.
__device__ __forceinline__ void before_tile(
    float4* eight, const Eight& raw_u, const Eight& raw_dt, const Eight& raw_z, const Eight& raw_grad,
    const float4* bias4, bool here, bool reset)
{
    float u[8], x[8], z[8], grad[8], bias[8];
    load_eight_floats(bias4, bias);
    unpack(raw_u, u); unpack(raw_dt, x); unpack(raw_z, z); unpack(raw_grad, grad);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        float step = softplus(x[k], bias[k]);
        step = here ? step : 0.f;
        eight[k] = make_float4(reset ? FORGET : step, step * u[k], gated(grad[k], z[k]), step);
    }
}

// The states of a tile again, from those before it: h ends as the last, and those before each pair of steps are stored.
__device__ __forceinline__ void states_of_tile(
    BackwardRow* slot, StateRow* states, const TileProjections& projection, const Place& at, int copy,
    const int (&places)[CH], const float (&a)[CH][4], float (&h)[CH][4])
{
    constexpr int PAIRS = CH > 2 ? 1 : 2;  // at a time: the writes of these come after their reads
    for (int first = 0; first < TILE / 2; first += PAIRS) {
        States found[PAIRS];
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) {
            found[pair] = pack_states(h);
#pragma unroll
            for (int k = 0; k < 2; ++k) {
                const int t = 2 * (first + pair) + k;
                float b[4];
                load_four(projection.b[t][copy][at.q], b);
#pragma unroll
                for (int i = 0; i < CH; ++i) {
                    const float2 in = *reinterpret_cast<const float2*>(&slot[t].channel[places[i]]);
#pragma unroll
                    for (int j = 0; j < 4; ++j) h[i][j] = exp2_fast(in.x * a[i][j]) * h[i][j] + in.y * b[j];
                }
            }
        }
#pragma unroll
        for (int pair = 0; pair < PAIRS; ++pair) store_states(states[first + pair], found[pair], at.lane);
    }
}

// What a thread takes from shared memory at a step.
struct Step {
    float4 in[CH], b, c;
    __device__ __forceinline__ Step(
        const BackwardRow* slot, const TileProjections& projection, const Place& at, int copy, const int (&places)[CH],
        int t)
        : b(projection.b[t][copy][at.q]), c(projection.c[t][copy][at.q])
    {
#pragma unroll
        for (int i = 0; i < CH; ++i) in[i] = slot[t].channel[places[i]];
    }
};

// A step of the gradient's recurrence. carry: the gradient that reaches the state h from later steps, and then the one of
// the state before it. Of a step's sums the first lanes get those for u and dt of their channel, the others those for z.
__device__ __forceinline__ void gradients_of_step(
    const Step& step, const Place& at, const float (&a)[CH][4], const float (&decay)[CH][4], const float (&before)[CH][4],
    const float (&h)[CH][4], float (&carry)[CH][4], float (&sum_a)[CH][4], float* grad_bc, float2* result)
{
    const bool first_lanes = at.q < CH;
    float b[4], c[4], grad_b[4] = {}, grad_c[4] = {}, over_states[3][CH];
    load_four(step.b, b);
    load_four(step.c, c);
#pragma unroll
    for (int i = 0; i < CH; ++i) {
        float grad_input = 0.f, grad_decay = 0.f, y = 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) {
            const float g = c[j] * step.in[i].z + carry[i][j];
            y += c[j] * h[i][j];
            grad_c[j] += h[i][j] * step.in[i].z;
            grad_b[j] += g * step.in[i].y;
            grad_input += g * b[j];
            carry[i][j] = decay[i][j] * g;
            const float through = carry[i][j] * before[i][j];
            grad_decay += through * a[i][j];
            sum_a[i][j] += through * step.in[i].x;
        }
        over_states[0][i] = grad_input;
        over_states[1][i] = grad_decay;
        over_states[2][i] = y;
    }
    add_over_channels(grad_bc, at, grad_b, grad_c);
#pragma unroll
    for (int k = 0; k < 3; ++k)
#pragma unroll
        for (int m = CH / 2; m >= 1; m /= 2)
#pragma unroll
            for (int i = 0; i < m; ++i) over_states[k][i] += across(over_states[k][i + m], m);
    // One exchange is left, between the first lanes and the others.
    const float sent = first_lanes ? over_states[2][0] : over_states[0][0];
    const float kept = first_lanes ? over_states[0][0] : over_states[2][0];
    const float input_or_y = kept + across(sent, CH);
    const float grad_decay = over_states[1][0] + across(over_states[1][0], CH);
    *result = make_float2(input_or_y, first_lanes ? grad_decay : step.in[0].w);
}

__device__ __forceinline__ void decays(const Step& step, const float (&a)[CH][4], float (&decay)[CH][4]) {
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) decay[i][j] = exp2_fast(step.in[i].x * a[i][j]);
}

// The recurrence of the gradient, backwards through a tile. carry: the gradient that reaches the state after the tile,
// and then the one before it. states: before each pair of steps; h: after the last. The states between the steps of a
// pair are computed again, with the decays that the gradient's recurrence needs as well.
__device__ __forceinline__ void gradients_of_tile(
    BackwardRow* slot, StateRow* states, const TileProjections& projection, const Place& at, int copy,
    const int (&places)[CH], const float (&a)[CH][4], float (&h)[CH][4], float (&carry)[CH][4], float (&sum_a)[CH][4])
{
    float2* result = reinterpret_cast<float2*>(&slot[TILE - 1].channel[places[0]]) + (at.q < CH ? 0 : 1);
    constexpr int ROW = sizeof(BackwardRow) / sizeof(float2);
    Step second(slot, projection, at, copy, places, TILE - 1);
    States stored = load_states(states[TILE / 2 - 1], at.lane);
#pragma unroll 2
    for (int pair = TILE / 2 - 1; pair >= 0; --pair) {
        // What the next turn needs is read ahead of this one's writes, which the compiler could not do. Before the tile
        // it reads rows that are not used.
        const Step first(slot, projection, at, copy, places, 2 * pair);
        float* grad_bc = reinterpret_cast<float*>(states[pair]);
        float before[CH][4], between[CH][4], decay[CH][4], second_decay[CH][4];
        unpack_states(stored, before);
        decays(first, a, decay);
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            float b[4];
            load_four(first.b, b);
#pragma unroll
            for (int j = 0; j < 4; ++j) between[i][j] = decay[i][j] * before[i][j] + first.in[i].y * b[j];
        }
        decays(second, a, second_decay);
        gradients_of_step(second, at, a, second_decay, between, h, carry, sum_a, grad_bc + 2 * N, result);
        result -= ROW;
        second = Step(slot, projection, at, copy, places, 2 * pair - 1);
        stored = load_states(states[pair - 1], at.lane);
        gradients_of_step(first, at, a, decay, before, between, carry, sum_a, grad_bc, result);
        result -= ROW;
#pragma unroll
        for (int i = 0; i < CH; ++i)
#pragma unroll
            for (int j = 0; j < 4; ++j) h[i][j] = before[i][j];
    }
}

struct Gradients { float u[8], dt[8], z[8]; };

// The elementwise work after the recurrence.
__device__ __forceinline__ void after_tile(
    const float4* eight, const Eight& raw_u, const Eight& raw_z, const Eight& raw_grad, const float4* skip4,
    Gradients& g, float (&sum_skip)[8], float (&sum_bias)[8])
{
    float u[8], z[8], grad[8], skip[8];
    load_eight_floats(skip4, skip);
    unpack(raw_u, u); unpack(raw_z, z); unpack(raw_grad, grad);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        const float4 found = eight[k];
        const float step = found.w, gate = sigmoid(z[k]), grad_y = GATED ? grad[k] * z[k] * gate : grad[k];
        g.u[k] = found.x * step + skip[k] * grad_y;
        g.dt[k] = (found.x * u[k] + LN2 * found.y) * sigmoid_of_softplus(step);
        g.z[k] = grad[k] * (found.z + skip[k] * u[k]) * gate * (1.f + z[k] * (1.f - gate));
        sum_skip[k] += grad_y * u[k];
        sum_bias[k] += g.dt[k];  // zero beyond the sequence, where steps are
    }
}

// The block's sums over channels for the steps of a tile.
__device__ __forceinline__ void add_over_warps(float* to, const StateRow (*states)[TILE / 2], int rows)
{
#pragma unroll
    for (int k = 0; k < FILLS; ++k) {
        const int f = threadIdx.x + k * THREADS, step = f / (2 * Q), place = f % (2 * Q);
        float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
#pragma unroll
        for (int warp = 0; warp < WARPS; ++warp) {
            const float4 part = reinterpret_cast<const float4*>(states[warp][step / 2])[f % (4 * Q)];
            sum.x += part.x; sum.y += part.y; sum.z += part.z; sum.w += part.w;
        }
        if (step < rows) reinterpret_cast<float4*>(to + step * (2 * N))[place] = sum;
    }
}

// Sums over the 16 lanes that have the same channels, of which one writes.
__device__ __forceinline__ void write_over_steps(float* to, float (&x)[8], bool writes)
{
#pragma unroll
    for (int k = 0; k < 8; ++k) {
#pragma unroll
        for (int lanes = 2; lanes < 32; lanes *= 2) x[k] += across(x[k], lanes);
        if (writes) to[k] = x[k];
    }
}

// The states before a tile, which the forward has stored.
__device__ __forceinline__ Border border_of_tile(const char* borders, const Place& at, int channels, int64 tile)
{
    if (at.first_channel >= channels) return Border();
    const int64 place = tile * ((channels + 15) / 16) + at.first_channel / 16;
    return load_border(borders + place * BORDER_BYTES, at.lane);
}

// ENDS: the recurrence of the gradient alone, backwards through a tile.
__device__ __forceinline__ void hand_back_through_tile(
    const BackwardRow* slot, const TileProjections& projection, const Place& at, int copy, const int (&places)[CH],
    const float (&a)[CH][4], float (&carry)[CH][4], float (&sum_steps)[CH])
{
#pragma unroll 4
    for (int t = TILE - 1; t >= 0; --t) {
        float c[4];
        load_four(projection.c[t][copy][at.q], c);
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            const float4 in = slot[t].channel[places[i]];
            sum_steps[i] += in.x;
#pragma unroll
            for (int j = 0; j < 4; ++j) carry[i][j] = exp2_fast(in.x * a[i][j]) * (c[j] * in.z + carry[i][j]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_backward(
    // [batch, length, channels] by strides: all alike but z
    const Element* u, const Element* dt, const Element* z,
    const float* bc,                                       // [batch, length, 2, N]
    const float* A, const float* D, const float* dt_bias,  // [channels, N], [channels], [channels]
    const unsigned char* resets,                           // [batch, length] or null
    const char* borders,                                   // of the forward
    const Element* grad_out,                               // [batch, length, channels]
    const float* grad_end,  // of the state after each segment, [batch, segments, channels, N], or null: zeros
    Element* grad_u, Element* grad_dt, Element* grad_z,     // [batch, length, channels]
    float* grad_bc,                                        // [blocks of channels, batch, length, 2, N]
    float* grad_A,                                         // [batch, segments, channels, N]
    float* grad_D, float* grad_bias,                       // [batch, segments, channels]; ENDS: none and the sum of dt
    float* grad_start,                                     // [batch, channels, N]; ENDS: [batch, segments, channels, N]
    int length, int channels, int segments, int segment_tiles,
    int64 batch_stride, int time_stride, int64 z_batch, int z_time)
{
    extern __shared__ __align__(16) char memory[];
    BackwardShared& shared = *reinterpret_cast<BackwardShared*>(memory);

    const Place at(true);
    const int batch = blockIdx.y, segment = blockIdx.z + ENDS;  // ENDS: of all but the first
    const int row = at.lane >> 1, half = at.lane & 1;
    const int eight = at.first_channel + 8 * half;
    const int first_of_block = blockIdx.x * BLOCK_CHANNELS;
    const bool has_channels = eight < channels;
    const int copy = at.r & (COPIES - 1);
    BackwardRow* slot = shared.slots[at.warp];
    float4* mine = &slot[row].channel[BackwardRow::place(8 * half)];
    StateRow* states = shared.states[at.warp];
    int places[CH];
#pragma unroll
    for (int i = 0; i < CH; ++i) places[i] = BackwardRow::place(at.channel(i));
    const float4* bias = reinterpret_cast<const float4*>(shared.bias + (eight - first_of_block));
    const float4* skip = reinterpret_cast<const float4*>(shared.skip + (eight - first_of_block));

    float a[CH][4], carry[CH][4], sum_a[CH][4], sum_skip[8], sum_bias[8], sum_steps[CH] = {};
    read_states(A, 0, at, channels, a);
    read_states(grad_end, int64(batch * segments + segment) * channels, at, channels, carry);
#pragma unroll
    for (int i = 0; i < CH; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) { a[i][j] *= LOG2E; sum_a[i][j] = 0.f; }
#pragma unroll
    for (int k = 0; k < 8; ++k) sum_skip[k] = sum_bias[k] = 0.f;
    if (threadIdx.x < BLOCK_CHANNELS) {
        const int channel = first_of_block + threadIdx.x;
        shared.bias[threadIdx.x] = channel < channels ? dt_bias[channel] * SOFTPLUS_UNIT : 0.f;
        shared.skip[threadIdx.x] = channel < channels ? D[channel] : 0.f;
    }

    const int tiles = (length + TILE - 1) / TILE;
    const int first_tile = segment * segment_tiles, last_tile = min(tiles, first_tile + segment_tiles) - 1;
    const int64 row_of_batch = int64(batch) * length;
    int time = last_tile * TILE + row;
    bool inside = has_channels && time < length;
    const Rows rows(batch_stride, time_stride, eight), z_rows(z_batch, z_time, eight);
    int64 bytes = rows.at(time);
    Eight next_u = load_at(u, bytes, inside), next_dt = load_at(dt, bytes, inside);
    Eight next_z = load_at(z, z_rows.at(time), inside && GATED), next_grad = load_at(grad_out, bytes, inside);
    int next_reset = load_flag(resets, row_of_batch + time, inside);
    Fill fill = load_projections(bc, row_of_batch + last_tile * TILE, length - last_tile * TILE);

    for (int tile = last_tile; tile >= first_tile; --tile) {
        TileProjections& projection = shared.projections[tile & 1];
        store_projections(projection, fill);
        const Eight raw_u = next_u, raw_dt = next_dt, raw_z = next_z, raw_grad = next_grad;
        const bool reset = next_reset, here = inside;
        const int64 now = bytes;
#if !ENDS
        const Border border = border_of_tile(borders, at, channels, int64(batch) * tiles + tile);
#endif
        __syncthreads();

        time -= TILE;
        inside = has_channels && tile > first_tile;
        bytes = rows.at(time);
        next_u = load_at(u, bytes, inside && !ENDS), next_dt = load_at(dt, bytes, inside);
        next_z = load_at(z, z_rows.at(time), inside && GATED), next_grad = load_at(grad_out, bytes, inside);
        next_reset = load_flag(resets, row_of_batch + time, inside);
        fill = load_projections(bc, row_of_batch + (tile - 1) * TILE, tile > first_tile ? TILE : 0);

        before_tile(mine, raw_u, raw_dt, raw_z, raw_grad, bias, here, reset);
        __syncwarp();
#if ENDS
        hand_back_through_tile(slot, projection, at, copy, places, a, carry, sum_steps);
        __syncwarp();
#else
        float h[CH][4];
        unpack_border(border, h);
        states_of_tile(slot, states, projection, at, copy, places, a, h);
        gradients_of_tile(slot, states, projection, at, copy, places, a, h, carry, sum_a);
        __syncwarp();
        Gradients g;
        after_tile(mine, raw_u, raw_z, raw_grad, skip, g, sum_skip, sum_bias);
        if (here) {
            store_at(grad_u, now, g.u);
            store_at(grad_dt, now, g.dt);
            if (GATED) store_at(grad_z, now, g.z);
        }
        __syncthreads();
        add_over_warps(grad_bc + (int64(blockIdx.x) * gridDim.y * length + row_of_batch + tile * TILE) * (2 * N),
                       shared.states, length - tile * TILE);
#endif
    }

    const int64 place = int64(batch * segments + segment) * channels;
#if ENDS
    write_states(grad_start, place, at, channels, carry);
    const int channel = at.first_channel + at.channel(0);
    if (at.q < CH && channel < channels) grad_bias[place + channel] = sum_steps[0];
#else
    if (segment == 0) write_states(grad_start, int64(batch) * channels, at, channels, carry);
    write_states(grad_A, place, at, channels, sum_a);
    write_over_steps(grad_D + place + eight, sum_skip, row == 0 && has_channels);
    write_over_steps(grad_bias + place + eight, sum_bias, row == 0 && has_channels);
#endif
}
