// Two parts of y of a channel and step, and its decay and input before: two floats a channel, padded against bank
// conflicts.
struct ForwardRow { float2 channel[WARP_CHANNELS + 2]; };

// The recurrence through a tile, some steps at a time: their writes come after their reads, which the compiler could not
// bring forward.
__device__ __forceinline__ void walk_tile(
    ForwardRow* slot, const Projections<1>& projection, const Place& at, const float (&a)[CH][4], float (&h)[CH][4],
    float (&sum)[CH])
{
    constexpr int STEPS = CH > 2 ? 2 : 4;
    // Lanes whose q differ by CH have sums over half the states each, which are added when y is used.
    float* part = reinterpret_cast<float*>(&slot->channel[at.channel(0)]) + (at.q < CH ? 0 : 1);
    for (int first = 0; first < TILE; first += STEPS) {
        float y[STEPS][CH];
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
            const int t = first + k;
            float b[4], c[4];
            load_four(projection.b[t][0][at.q], b);
            if (!ENDS) load_four(projection.c[t][0][at.q], c);
#pragma unroll
            for (int i = 0; i < CH; ++i) {
                const float2 in = slot[t].channel[at.channel(i)];
                y[k][i] = 0.f;
                if (ENDS) sum[i] += in.x;
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    h[i][j] = exp2_fast(in.x * a[i][j]) * h[i][j] + in.y * b[j];
                    if (!ENDS) y[k][i] += c[j] * h[i][j];
                }
            }
        }
        if (ENDS) continue;
#pragma unroll
        for (int k = 0; k < STEPS; ++k) {
#pragma unroll
            for (int m = CH / 2; m >= 1; m /= 2)
#pragma unroll
                for (int i = 0; i < m; ++i) y[k][i] += across(y[k][i + m], m);
        }
#pragma unroll
        for (int k = 0; k < STEPS; ++k) part[(first + k) * int(sizeof(ForwardRow) / sizeof(float))] = y[k][0];
    }
}

extern "C" __global__ void __launch_bounds__(THREADS, BLOCKS) scan_forward(
    const Element* u, const Element* dt, const Element* z,  // [batch, length, channels] by strides; u, dt and out alike
    const float* bc,                                       // [batch, length, 2, N]
    const float* A, const float* D, const float* dt_bias,  // [channels, N], [channels], [channels]
    const unsigned char* resets,                           // [batch, length] or null
    const float* start,                                    // [batch, segments, channels, N] or null: zeros
    Element* out,                                          // [batch, length, channels]
    char* borders,                                         // the states before each tile, for the backward, or null
    float* end,                                            // [batch, channels, N]; ENDS: [batch, segments, channels, N]
    float* steps,                                          // ENDS: sum of dt, [batch, segments, channels]
    int length, int channels, int segments, int segment_tiles,
    int64 batch_stride, int time_stride, int64 z_batch, int z_time)
{
    __shared__ Projections<1> projections[2];
    __shared__ __align__(16) ForwardRow slots[WARPS][TILE];

    const Place at(false);
    const int backward_order = Place(true).order;
    const int batch = blockIdx.y, segment = blockIdx.z;  // ENDS: of all but the last
    const int row = at.lane >> 1, half = at.lane & 1;
    const int eight = at.first_channel + 8 * half;  // the first of this lane's channels in the elementwise phases
    const bool has_channels = eight < channels;
    ForwardRow* slot = slots[at.warp];

    float a[CH][4], h[CH][4], bias[8], skip[8], sum[CH];
    read_states(A, 0, at, channels, a);
    read_states(start, int64(batch * segments + segment) * channels, at, channels, h);
#pragma unroll
    for (int i = 0; i < CH; ++i) {
        sum[i] = 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) a[i][j] *= LOG2E;
    }
#pragma unroll
    for (int k = 0; k < 8; ++k) {
        bias[k] = has_channels ? dt_bias[eight + k] * SOFTPLUS_UNIT : 0.f;
        skip[k] = has_channels ? D[eight + k] : 0.f;
    }

    const int tiles = (length + TILE - 1) / TILE;
    const int first_tile = segment * segment_tiles, last_tile = min(tiles, first_tile + segment_tiles);
    int time = first_tile * TILE + row;
    bool inside = has_channels && time < length;
    const Rows rows(batch_stride, time_stride, eight), z_rows(z_batch, z_time, eight);
    int64 bytes = rows.at(time);
    Eight next_u = load_at(u, bytes, inside), next_dt = load_at(dt, bytes, inside);
    Eight next_z = load_at(z, z_rows.at(time), inside && GATED && !ENDS);
    int next_reset = load_flag(resets, int64(batch) * length + time, inside);
    Fill fill = load_projections(bc, int64(batch) * length + first_tile * TILE, length - first_tile * TILE);

    for (int tile = first_tile; tile < last_tile; ++tile) {
        Projections<1>& projection = projections[tile & 1];
        store_projections(projection, fill);
        const Eight raw_u = next_u, raw_dt = next_dt, raw_z = next_z;
        const bool reset = next_reset, here = inside;
        const int64 now = bytes;
        __syncthreads();

        time += TILE;
        inside = has_channels && time < length && tile + 1 < last_tile;
        bytes = rows.at(time);
        next_u = load_at(u, bytes, inside), next_dt = load_at(dt, bytes, inside);
        next_z = load_at(z, z_rows.at(time), inside && GATED && !ENDS);
        next_reset = load_flag(resets, int64(batch) * length + time, inside);
        fill = load_projections(bc, int64(batch) * length + (tile + 1) * TILE, length - (tile + 1) * TILE);

        if (borders && at.first_channel < channels) {
            const int64 place = (int64(batch) * tiles + tile) * ((channels + 15) / 16) + at.first_channel / 16;
            store_border(borders + place * BORDER_BYTES, pack_border(h, backward_order), at.lane);
        }

        float x[8], step[8];
        unpack(raw_u, x);
        unpack(raw_dt, step);
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            float s0 = softplus(step[k], bias[k]), s1 = softplus(step[k + 1], bias[k + 1]);
            s0 = here ? s0 : 0.f;
            s1 = here ? s1 : 0.f;
            *reinterpret_cast<float4*>(&slot[row].channel[8 * half + k]) =
                make_float4(reset ? FORGET : s0, s0 * x[k], reset ? FORGET : s1, s1 * x[k + 1]);
        }
        __syncwarp();

        walk_tile(slot, projection, at, a, h, sum);
        if (ENDS) { __syncwarp(); continue; }
        __syncwarp();

        float gate[8], result[8];
        unpack(raw_z, gate);
#pragma unroll
        for (int k = 0; k < 8; k += 2) {
            const float4 pair = *reinterpret_cast<const float4*>(&slot[row].channel[8 * half + k]);
            result[k] = gated(pair.x + pair.y + skip[k] * x[k], gate[k]);
            result[k + 1] = gated(pair.z + pair.w + skip[k + 1] * x[k + 1], gate[k + 1]);
        }
        if (here) store_at(out, now, result);
        __syncwarp();
    }

    if (ENDS) {
        write_states(end, int64(batch * segments + segment) * channels, at, channels, h);
#pragma unroll
        for (int i = 0; i < CH; ++i) {
            const int channel = at.first_channel + at.channel(i);
            if (at.q < CH && i == 0 && channel < channels) steps[int64(batch * segments + segment) * channels + channel] = sum[0];
        }
    } else if (segment == segments - 1) {
        write_states(end, int64(batch) * channels, at, channels, h);
    }
}
