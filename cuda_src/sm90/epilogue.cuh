// From accumulators to y: scales, bias, rounding, then through shared memory into 16-byte chunks of rows of y.
//
// A warpgroup holds 64 outputs (rows of D) of the tokens of a tile (columns of D). Thread 4 g + q of warp w holds, of group j of eight
// tokens, acc[4 j + r] = D[16 w + g + 8 (r >> 1), 8 j + 2 q + (r & 1)].
#pragma once
#include "sm90/smem.cuh"

// Scales of EPILOGUE_TOKENS tokens, spread over the warp: lane (g, q) holds those of its two tokens of groups g, g + 8, g + 16 ...
struct TokenScales {
    static constexpr int HELD = (EPILOGUE_TOKENS + 63) / 64;
    float held[HELD][2];

    INLINE void load(const float* scale_x, int m0, int m, int lane) {
#pragma unroll
        for (int i = 0; i < HELD; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) held[i][c] = scale_x[min(m0 + 64 * i + 2 * lane + c, m - 1)];
    }
    // The scale of token c of this lane's two of group j.
    INLINE float of(int j, int c, int lane) const { return __shfl_sync(0xffffffff, held[j / 8][c], 4 * (j % 8) + lane % 4); }
};

// Writes the 64 outputs from n0 of the EPILOGUE_TOKENS tokens from m0: y = acc * token * channel + offset.
//   Biased: offset is not zero. Whole: all of them are inside y, whose rows are aligned
//   acc, token, channel, offset: this thread's, of its sums, tokens and two outputs
//   y: [m, n]; y_pitch: elements from row to row; aligned: its rows start at multiples of 16 bytes
//   staging: two chunks of this warpgroup; thread: of the warpgroup; barrier: its bar.sync
// A chunk of tokens leaves shared memory while the next one is converted; with LOW_REGISTER_EPILOGUE it leaves before.
template <bool Biased, bool Whole>
INLINE void write_rows(const Accumulator (&acc)[EPILOGUE_TOKENS / 2], const TokenScales& token, const float (&channel)[2],
                       const float (&offset)[2], Out* __restrict__ y, i64 y_pitch, bool aligned, int m0, int n0, int m, int n, u8* staging,
                       int thread, int barrier) {
    constexpr int CHUNKS = EPILOGUE_TOKENS / CHUNK;
    constexpr int VECTOR = 16 / sizeof(Out), VECTORS = 64 / VECTOR;  // elements in 16 bytes; of these in a row of 64 outputs
    constexpr int PASSES = (CHUNK * VECTORS + 127) / 128;
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
    const int to_row = thread / VECTORS, to_vector = thread % VECTORS, to_n = n0 + to_vector * VECTOR;
    Out* const to = y + (i64)(m0 + to_row) * y_pitch + to_n;
    uint4 rows[PASSES];  // of the chunk before, on their way from shared memory to y

    auto store_rows = [&](int chunk) {
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int row = pass * (128 / VECTORS) + to_row;
            if (CHUNK * VECTORS < 128 && row >= CHUNK) continue;
            if (!Whole && (m0 + chunk * CHUNK + row >= m || to_n >= n)) continue;
            Out* at = to + (i64)(chunk * CHUNK + pass * (128 / VECTORS)) * y_pitch;
            if (Whole || (aligned && to_n + VECTOR <= n)) *(uint4*)at = rows[pass];
            else {
                const u32 words[4] = {rows[pass].x, rows[pass].y, rows[pass].z, rows[pass].w};
#pragma unroll
                for (int v = 0; v < VECTOR; v++)
                    if (to_n + v < n) {
                        if constexpr (OUT == TYPE_FLOAT32) at[v] = __uint_as_float(words[v]);
                        else at[v] = (Out)(words[v / 2] >> 16 * (v % 2));
                    }
            }
        }
    };
#pragma unroll
    for (int chunk = 0; chunk < CHUNKS; chunk++) {
        u8* const buffer = staging + chunk % 2 * CHUNK_BYTES;
        u32 pair[2][2];
#pragma unroll
        for (int j = 0; j < CHUNK / 8; j++) {
            const int group = chunk * (CHUNK / 8) + j;
            const float of_token[2] = {WIDE ? 1.0f : token.of(group, 0, lane), WIDE ? 1.0f : token.of(group, 1, lane)};
            float value[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                value[r] = as_float(acc[4 * group + r]);
                if (!WIDE) value[r] = __fmul_rn(__fmul_rn(value[r], of_token[r & 1]), channel[r >> 1]);
                if (Biased) value[r] = __fadd_rn(value[r], offset[r >> 1]);
            }
            if constexpr (OUT == TYPE_FLOAT32) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const int row = 8 * j + 2 * q + (r & 1), column = 16 * warp + g + 8 * (r >> 1);
                    ((float*)buffer)[row * 64 + (column ^ row % 8 * 4)] = value[r];
                }
            } else {
                pair[j % 2][0] = Output<OUT>::round2(value[0], value[1]);
                pair[j % 2][1] = Output<OUT>::round2(value[2], value[3]);
                // matrices: 8 tokens, each for 8 outputs and the next 8; then the next 8 tokens
                if constexpr (CHUNK == 8) {
                    const int row = lane % 8, vector = 2 * warp + lane / 8 % 2;
                    stmatrix_x2_trans(shared_address(buffer) + row * 128 + (vector ^ row) * 16, pair[0][0], pair[0][1]);
                } else if (j % 2) {
                    const int row = 8 * (j - 1) + lane / 16 * 8 + lane % 8, vector = 2 * warp + lane / 8 % 2;
                    stmatrix_x4_trans(shared_address(buffer) + row * 128 + (vector ^ row % 8) * 16, pair[0][0], pair[0][1], pair[1][0],
                                      pair[1][1]);
                }
            }
        }
        if (!LOW_REGISTER_EPILOGUE && chunk > 0) store_rows(chunk - 1);
        warpgroup_sync(barrier);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int row = pass * (128 / VECTORS) + to_row;
            if (CHUNK * VECTORS < 128 && row >= CHUNK) continue;
            rows[pass] = *(const uint4*)(buffer + row * (16 * VECTORS) + (to_vector ^ row % 8) * 16);
        }
        if (LOW_REGISTER_EPILOGUE) store_rows(chunk);
    }
    if (!LOW_REGISTER_EPILOGUE) store_rows(CHUNKS - 1);
    if (CHUNKS % 2) warpgroup_sync(barrier);  // the next tile starts with the buffer that was read last
}
