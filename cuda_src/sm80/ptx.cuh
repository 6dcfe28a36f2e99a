// One PTX instruction per function, named after it, with its section of the PTX ISA manual.
#pragma once
#include "common/types.cuh"

// "Warp-level matrix multiply-accumulate with sparse matrix A": mma.sp::ordered_metadata, D[16, 8] += A[16, k] * B[k, 8].
// lane = 4 g + q. A is the compressed matrix, four registers: rows g + 8 (r & 1), half r >> 1 of k. B: column g.
// D: row g + 8 (r >> 1), column 2 q + (r & 1). e: index nibbles; SELECTOR: which lane pair of a quad holds them (16-bit only).
// k = 64 for 8-bit types, 32 for 16-bit types. Ordered: i0 < i1 in every nibble, or the result is undefined.
#define MMA_SP(NAME, SHAPE, TYPES, ACC, C)                                                                       \
    template <int SELECTOR> INLINE void NAME(ACC (&d)[4], const uint4& a, const u32 (&b)[4], u32 e) {            \
        asm("mma.sp::ordered_metadata.sync.aligned." SHAPE ".row.col." TYPES                                     \
            " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, %13;"                           \
            : "+" C(d[0]), "+" C(d[1]), "+" C(d[2]), "+" C(d[3])                                                 \
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "n"(SELECTOR)); \
    }
MMA_SP(mma_sp_s8, "m16n8k64", "s32.s8.s8.s32", int, "r")
MMA_SP(mma_sp_e4m3, "m16n8k64", "f32.e4m3.e4m3.f32", float, "f")
MMA_SP(mma_sp_bf16, "m16n8k32", "f32.bf16.bf16.f32", float, "f")
MMA_SP(mma_sp_f16, "m16n8k32", "f32.f16.f16.f32", float, "f")

// The same with block scaling, .kind::mxf8f6f4, of sm_120a and sm_121a only: A and B times powers of two, one for every row or
// column and 64 of k (scale_vec::1X, ue8m0). Of a quad, lanes 0 and 1 give the scales of A's rows g and g + 8, lane 0 that of B's
// column g, as byte 0 of a word: the selectors {0, 0}. All scales are 1, 0x7f, in every byte and lane, so that none is read amiss.
// GeForce GPUs accumulate these products in float32 at twice the rate of mma_sp_e4m3 (docs/kernels.md).
INLINE void mma_sp_mxf8_unscaled(float (&d)[4], const uint4& a, const u32 (&b)[4], u32 e) {
    asm("mma.sp::ordered_metadata.sync.aligned.m16n8k64.row.col.kind::mxf8f6f4.block_scale.scale_vec::1X.f32.e4m3.e4m3.f32.ue8m0"
        " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0, %13, {0, 0}, %13, {0, 0};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "r"(0x7f7f7f7f));
}

// k = 128 pairwise, .kind::mxf4nvf4 of sm_120a and sm_121a only: operands are those of k = 64 with a pair of e2m1, low nibble first,
// for a byte; index nibbles name pairs. A and B times scales, one for every row or column and 32 of k (scale_vec::4X, ue4m3) or 64
// (2X, ue8m0): byte BYTE + i of a word is that of the i-th. Lanes 0 and 1 of a quad give the words of A's rows g and g + 8, lane 0
// that of B's column g. BYTE is 0, of 2X also 2.
#define MMA_SP_FP4(NAME, FORM)                                                                                                       \
    template <int BYTE> INLINE void NAME(float (&d)[4], const uint4& a, const u32 (&b)[4], u32 e, u32 scale_a, u32 scale_b) {        \
        asm("mma.sp::ordered_metadata.sync.aligned.m16n8k128.row.col.kind::mxf4nvf4.block_scale.scale_vec::" FORM                    \
            " {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9,%10,%11}, {%0,%1,%2,%3}, %12, 0, %13, {%15, 0}, %14, {%15, 0};"                   \
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                                                         \
            : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e), "r"(scale_a),              \
              "r"(scale_b), "n"(BYTE));                                                                                              \
    }
MMA_SP_FP4(mma_sp_nvf4, "4X.f32.e2m1.e2m1.f32.ue4m3")
MMA_SP_FP4(mma_sp_mxf4, "2X.f32.e2m1.e2m1.f32.ue8m0")

// "Warp-level matrix load: ldmatrix", .x4: register r of lane 4 g + q is word q of the 16 bytes that lane 8 r + g points to.
INLINE void ldmatrix_x4(u32* w, const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"((u32)__cvta_generic_to_shared(row))
                 : "memory");
}

// "Data Movement: cp.async": if `when`, 16 bytes from global to shared memory past the L1 cache (.cg); zeros, with nothing read,
// unless `valid` (the operand ignore-src). Predicates, because a branch would cut the loop where instructions overlap.
INLINE void cp_async_16(bool when, void* shared, const void* global, bool valid = true) {
    u32 to = (u32)__cvta_generic_to_shared(shared);
    asm volatile(
        "{ .reg .pred p, q; setp.ne.b32 p, %0, 0; setp.eq.b32 q, %1, 0; @p cp.async.cg.shared.global [%2], [%3], 16, q; }" ::"r"(
            (int)when),
        "r"((int)valid), "r"(to), "l"(global)
        : "memory");
}
// Closes a group of copies; waits until at most PENDING groups are still under way.
INLINE void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> INLINE void cp_async_wait_group() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// "Data Movement: ld", .cg: from the L2 cache, where another block may just have written.
INLINE uint4 ld_global_cg(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p) : "memory");
    return v;
}
