// From accumulators to y: scales, bias, rounding, then through shared memory into 16-byte pieces of rows of y.
//
// A warpgroup holds 64 outputs (rows of D) of all tokens of the tile (columns of D); thread 4 g + q of warp w has, of the eight tokens
// of group j, outputs 16 w + g and + 8 of tokens 8 j + 2 q and + 1: acc[4 j + r], r & 1 the token, r >> 1 the output.
#pragma once
#include "common/types.cuh"
#include "sm90/ptx.cuh"

INLINE float as_float(int v) { return __int2float_rn(v); }
INLINE float as_float(float v) { return v; }

template <bool Value> struct Flag {
    static constexpr bool value = Value;
};

// The scales of a tile's tokens, spread over the warp: lane (g, q) keeps those of its two tokens of groups g, g + 8, g + 16 ...
template <int Tokens> struct TokenScales {
    static constexpr int HELD = (Tokens + 63) / 64;
    float held[HELD][2];

    INLINE void load(const float* scale, int m0, int m, int lane) {
#pragma unroll
        for (int i = 0; i < HELD; i++)
#pragma unroll
            for (int c = 0; c < 2; c++) held[i][c] = scale[min(m0 + 64 * i + 2 * lane + c, m - 1)];
    }
    // of this lane's two tokens of group j
    INLINE float of(int j, int c, int lane) const { return __shfl_sync(0xffffffff, held[j / 8][c], 4 * (j % 8) + lane % 4); }
};

template <int Type, int Tokens> struct Rows {
    typedef typename Output<Type>::Storage Out;
    static constexpr int CHUNK = Tokens % 32 == 0 && Type != TYPE_FLOAT32 ? 32 : Tokens % 16 == 0 ? 16 : 8;  // tokens at a time
    static constexpr int CHUNKS = Tokens / CHUNK;
    static constexpr int BYTES = CHUNK * 64 * sizeof(Out);  // of staging; there are two, so that one barrier a chunk is enough
    static constexpr int VECTOR = 16 / sizeof(Out), PIECES = 64 / VECTOR;  // elements of a piece; pieces in a row of 64 outputs
};

// Writes the 64 outputs from n0 of the Tokens tokens from m0.
//   Scaled: 8-bit types, acc * token scale * channel scale. Whole: all lie inside y, whose rows are 16-byte aligned.
//   Lean: with few registers. Otherwise a chunk leaves shared memory while the next one is converted.
template <int Type, int Tokens, bool Lean, bool Scaled, bool Biased, bool Whole, class Accumulator>
INLINE void write_rows(const Accumulator (&acc)[Tokens / 2], const TokenScales<Tokens>& token, const float (&channel)[2],
                       const float (&offset)[2], typename Output<Type>::Storage* __restrict__ y, i64 y_pitch, bool aligned, int m0, int n0,
                       int m, int n, u8* staging, int thread, int barrier) {
    typedef Rows<Type, Tokens> R;
    typedef typename R::Out Out;
    const int warp = thread / 32, lane = thread % 32, g = lane / 4, q = lane % 4;
    const int to_row = thread / R::PIECES, to_piece = thread % R::PIECES, to_n = n0 + to_piece * R::VECTOR;
    Out* const to = y + (i64)(m0 + to_row) * y_pitch + to_n;
    constexpr int PASSES = (R::CHUNK * R::PIECES + 127) / 128;
    uint4 rows[PASSES];  // of the chunk before, on their way from shared memory to y

    auto store_rows = [&](int chunk) {
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int row = pass * (128 / R::PIECES) + to_row;
            if (R::CHUNK * R::PIECES < 128 && row >= R::CHUNK) continue;
            if (!Whole && (m0 + chunk * R::CHUNK + row >= m || to_n >= n)) continue;
            Out* at = to + (i64)(chunk * R::CHUNK + pass * (128 / R::PIECES)) * y_pitch;
            if (Whole || (aligned && to_n + R::VECTOR <= n)) *(uint4*)at = rows[pass];
            else {
                const u32 words[4] = {rows[pass].x, rows[pass].y, rows[pass].z, rows[pass].w};
#pragma unroll
                for (int v = 0; v < R::VECTOR; v++)
                    if (to_n + v < n) {
                        if constexpr (Type == TYPE_FLOAT32) at[v] = __uint_as_float(words[v]);
                        else at[v] = (Out)(words[v / 2] >> 16 * (v % 2));
                    }
            }
        }
    };
#pragma unroll
    for (int chunk = 0; chunk < R::CHUNKS; chunk++) {
        u8* const buffer = staging + chunk % 2 * R::BYTES;
        u32 pair[2][2];
#pragma unroll
        for (int j = 0; j < R::CHUNK / 8; j++) {
            const int group = chunk * (R::CHUNK / 8) + j;
            const float of_token[2] = {Scaled ? token.of(group, 0, lane) : 1.0f, Scaled ? token.of(group, 1, lane) : 1.0f};
            float value[4];
#pragma unroll
            for (int r = 0; r < 4; r++) {
                value[r] = as_float(acc[4 * group + r]);
                if (Scaled) value[r] = __fmul_rn(__fmul_rn(value[r], of_token[r & 1]), channel[r >> 1]);
                if (Biased) value[r] = __fadd_rn(value[r], offset[r >> 1]);
            }
            if constexpr (Type == TYPE_FLOAT32) {
#pragma unroll
                for (int r = 0; r < 4; r++) {
                    const int row = 8 * j + 2 * q + (r & 1), column = 16 * warp + g + 8 * (r >> 1);
                    ((float*)buffer)[row * 64 + (column ^ row % 8 * 4)] = value[r];
                }
            } else {
                pair[j % 2][0] = Output<Type>::round2(value[0], value[1]);
                pair[j % 2][1] = Output<Type>::round2(value[2], value[3]);
                // matrices: 8 tokens, each for 8 outputs and the next 8; then the next 8 tokens
                if constexpr (R::CHUNK == 8) {
                    const int row = lane % 8, piece = 2 * warp + lane / 8 % 2;
                    stmatrix_x2_trans(shared_address(buffer) + row * 128 + (piece ^ row) * 16, pair[0][0], pair[0][1]);
                } else if (j % 2) {
                    const int row = 8 * (j - 1) + lane / 16 * 8 + lane % 8, piece = 2 * warp + lane / 8 % 2;
                    stmatrix_x4_trans(shared_address(buffer) + row * 128 + (piece ^ row % 8) * 16, pair[0][0], pair[0][1], pair[1][0],
                                      pair[1][1]);
                }
            }
        }
        if (!Lean && chunk > 0) store_rows(chunk - 1);
        warpgroup_sync(barrier);
#pragma unroll
        for (int pass = 0; pass < PASSES; pass++) {
            const int row = pass * (128 / R::PIECES) + to_row;
            if (R::CHUNK * R::PIECES < 128 && row >= R::CHUNK) continue;
            rows[pass] = *(const uint4*)(buffer + row * (16 * R::PIECES) + (to_piece ^ row % 8) * 16);
        }
        if (Lean) store_rows(chunk);
    }
    if (!Lean) store_rows(R::CHUNKS - 1);
    if (R::CHUNKS % 2) warpgroup_sync(barrier);  // the next tile starts with the buffer that was read last
}
