// One PTX instruction per function, named after it, with its section of the PTX ISA manual. sm_90a.
#pragma once
#include "common/types.cuh"

// "Data Movement and Conversion Instructions: cvta": an address in the shared window.
INLINE u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
// "...: mov": the same number, which the compiler cannot see through, and so does not compute again wherever it is used.
INLINE u32 opaque(u32 v) {
    u32 r;
    asm volatile("mov.u32 %0, %1;" : "=r"(r) : "r"(v));
    return r;
}
// "Special Registers: %cluster_ctarank".
INLINE u32 cluster_rank() {
    u32 r;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}

// ---- shared memory --------------------------------------------------------------------------------------------------------------
// "Data Movement and Conversion Instructions: ld".
INLINE u32 ld_shared(u32 address) {
    u32 v;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(v) : "r"(address) : "memory");
    return v;
}
INLINE uint2 ld_shared2(u32 address) {
    uint2 v;
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(address) : "memory");
    return v;
}
INLINE uint4 ld_shared4(u32 address) {
    uint4 v;
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address) : "memory");
    return v;
}
// "...: st".
INLINE void st_shared(u32 address, u32 v) { asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
INLINE void st_shared4(u32 address, uint4 v) {
    asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w) : "memory");
}
// "Parallel Synchronization and Communication Instructions: red", .max: the larger of what is there and v.
INLINE void red_max_shared(u32 address, u32 v) { asm volatile("red.shared::cta.max.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory"); }
// "Parallel Synchronization and Communication Instructions: atom", .inc: returns the old value; one more, or 0 after `last`.
INLINE u32 atom_inc_shared(u32 address, u32 last) {
    u32 v;
    asm volatile("atom.acq_rel.cta.shared::cta.inc.u32 %0, [%1], %2;" : "=r"(v) : "r"(address), "r"(last) : "memory");
    return v;
}
// "...: membar / fence", .proxy.async: what this thread wrote to shared memory, instructions and copies read.
INLINE void fence_proxy_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
// "Warp-level Matrix Store Instruction: stmatrix": four or two 8 x 8 matrices of 16-bit elements, transposed; lane l gives the row of
// matrix l / 8.
INLINE void stmatrix_x4_trans(u32 to, u32 a, u32 b, u32 c, u32 d) {
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};"
                 ::"r"(to), "r"(a), "r"(b), "r"(c), "r"(d) : "memory");
}
INLINE void stmatrix_x2_trans(u32 to, u32 a, u32 b) {
    asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(a), "r"(b) : "memory");
}

// ---- mbarriers, by their addresses b in shared memory ----------------------------------------------------------------------------
// "Parallel Synchronization and Communication Instructions: mbarrier.init".
INLINE void mbarrier_init(u32 b, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(b), "r"(arrivals) : "memory");
}
// "...: membar / fence", .mbarrier_init: barriers of this thread are seen initialized by the cluster.
INLINE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// "...: mbarrier.arrive".
INLINE void mbarrier_arrive(u32 b) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(b) : "memory"); }
INLINE void mbarrier_arrive_expect_tx(u32 b, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(b), "r"(bytes) : "memory");
}
// On a barrier of another block. Not .release.cluster, which waits for all memory: only reads come before, and they are done.
INLINE void mbarrier_arrive_cluster(u32 b) { asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(b) : "memory"); }
// "...: mbarrier.try_wait": until the phase of this parity is complete.
INLINE void mbarrier_wait(u32 b, u32 parity) {
    asm volatile(
        "{.reg .pred done; retry: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1; @done bra end; bra retry; end: }"
        ::"r"(b), "r"(parity) : "memory");
}
// The same for a barrier that other blocks of the cluster arrive on, or send to.
INLINE void mbarrier_wait_cluster(u32 b, u32 parity) {
    asm volatile(
        "{.reg .pred done; retry: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], %1; @done bra end; bra retry; end: }"
        ::"r"(b), "r"(parity) : "memory");
}

// ---- copies that complete on an mbarrier -----------------------------------------------------------------------------------------
// "Data Movement and Conversion Instructions: cp.async.bulk": contiguous bytes, a multiple of 16, global to shared memory.
INLINE void cp_async_bulk(u32 to, const void* from, u32 bytes, u32 b) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(b) : "memory");
}
// The same, with "...: createpolicy": L2 evicts these bytes last.
INLINE void cp_async_bulk_evict_last(u32 to, const void* from, u32 bytes, u32 b) {
    u64 policy;
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0;" : "=l"(policy));
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;"
                 ::"r"(to), "l"(from), "r"(bytes), "r"(b), "l"(policy) : "memory");
}
// "...: mapa": the same place in the shared memory of another block of this cluster.
INLINE u32 mapa(u32 address, u32 rank) {
    u32 there;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
    return there;
}
// "...: st.async": 16 bytes to shared memory of a block of this cluster, counted by a barrier there.
INLINE void st_async(u32 to, u32 b, u32 x, u32 y, u32 z, u32 w) {
    asm volatile("st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%0], {%1,%2,%3,%4}, [%5];"
                 ::"r"(to), "r"(x), "r"(y), "r"(z), "r"(w), "r"(b) : "memory");
}

// ---- threads and kernels ---------------------------------------------------------------------------------------------------------
// "Parallel Synchronization and Communication Instructions: bar", among the first COUNT threads that arrive.
template <int COUNT> INLINE void threads_sync(int id) { asm volatile("bar.sync %0, %1;" ::"r"(id), "n"(COUNT) : "memory"); }
INLINE void warpgroup_sync(int id) { threads_sync<128>(id); }
// "...: barrier.cluster", all threads of a cluster; .relaxed orders nothing but what fence_mbarrier_init does.
INLINE void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed;" ::: "memory"); }
INLINE void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// "...: griddepcontrol" (PDL): the next kernel may start; wait until the kernels before are complete, and what they wrote is seen.
INLINE void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
INLINE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// "Miscellaneous Instructions: setmaxnreg": a whole warpgroup gives registers back, or takes them.
template <int REGISTERS> INLINE void setmaxnreg_dec() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> INLINE void setmaxnreg_inc() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }

// ---- maxima ----------------------------------------------------------------------------------------------------------------------
// "Integer Arithmetic Instructions: max", .u16x2: of halves.
INLINE u32 max_u16x2(u32 a, u32 b) {
    u32 r;
    asm("max.u16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
    return r;
}
// "Parallel Synchronization and Communication Instructions: redux.sync": of a warp.
INLINE u32 redux_max(u32 v) {
    u32 r;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(r) : "r"(v));
    return r;
}

// ---- wgmma -----------------------------------------------------------------------------------------------------------------------
// "Asynchronous Warpgroup Level Matrix Instructions: wgmma.fence", "wgmma.commit_group", "wgmma.wait_group".
INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING> INLINE void wgmma_wait_group() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }
// "...: Matrix Descriptor Format", K-major operand in swizzled rows of BYTES (64 or 128), base aligned to 8 rows:
//   bits 0-13 address / 16; 16-29 leading offset, unused; 32-45 bytes from 8 rows to the next / 16; 62-63 swizzle, 1: 128 B, 2: 64 B
template <int BYTES> INLINE u64 matrix_descriptor(u32 address) {
    return (u64)((address & 0x3FFFF) >> 4) | (u64)1 << 16 | (u64)(8 * BYTES >> 4) << 32 | (u64)(BYTES == 128 ? 1 : 2) << 62;
}
// The same without swizzle, 16-byte chunks of up to 8 rows: bits 16-29 bytes from a chunk of k to the next / 16. Rows are 16 bytes apart.
INLINE u64 plain_descriptor(u32 address, u32 chunk) { return (u64)((address & 0x3FFFF) >> 4) | (u64)(chunk >> 4) << 16; }
