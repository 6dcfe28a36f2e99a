// One PTX instruction per function, named after it, with its section of the PTX ISA manual: what sm_100a has beside sm_90's. Of the
// sections "TensorCore 5th Generation Instructions" of each; all are of a pair of thread blocks (cta_group::2).
#pragma once
#include "sm100/config.cuh"
#include "sm90/ptx.cuh"

// ---- threads and blocks ----------------------------------------------------------------------------------------------------------
// "Parallel Synchronization and Communication Instructions: elect.sync": true in one thread of a converged warp.
INLINE bool elect_one() {
    u32 mine;
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(mine));
    return mine;
}
// "Special Registers: %globaltimer", ns.
INLINE u64 globaltimer() {
    u64 r;
    asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(r));
    return r;
}
// "...: mbarrier.try_wait": until the phase of this parity is complete. A wait of LONGEST_WAIT is a deadlock: an error rather than a hang.
constexpr u64 LONGEST_WAIT = 20000000000;  // ns
INLINE bool mbarrier_try_wait(u32 b, u32 parity) {
    u32 done;
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done) : "r"(b), "r"(parity) : "memory");
    return done;
}
INLINE void mbarrier_wait_or_trap(u32 b, u32 parity) {
    if (mbarrier_try_wait(b, parity)) return;
    const u64 began = globaltimer();
#pragma unroll 1
    while (!mbarrier_try_wait(b, parity))
        if (globaltimer() - began > LONGEST_WAIT) __trap();
}
// "...: barrier.cluster": all threads of the pair; what they wrote before is seen after it.
INLINE void cluster_sync() { asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory"); }

// ---- tensor memory ---------------------------------------------------------------------------------------------------------------
// "tcgen05.alloc", "... dealloc": a warp of each block of the pair; the address is written to shared memory.
INLINE void tcgen05_alloc(u32 to, u32 columns) {
    asm volatile("tcgen05.alloc.cta_group::2.sync.aligned.shared::cta.b32 [%0], %1;" ::"r"(to), "r"(columns) : "memory");
    asm volatile("tcgen05.relinquish_alloc_permit.cta_group::2.sync.aligned;");
}
INLINE void tcgen05_dealloc(u32 address, u32 columns) {
    asm volatile("tcgen05.dealloc.cta_group::2.sync.aligned.b32 %0, %1;" ::"r"(address), "r"(columns));
}
// "tcgen05.cp", 128x128b: 128 rows of 16 bytes to the lanes of four columns; in both blocks, of the shared memory of each.
INLINE void tcgen05_cp(u32 to, u64 descriptor) {
    asm volatile("tcgen05.cp.cta_group::2.128x128b [%0], %1;" ::"r"(to), "l"(descriptor) : "memory");
}
// "tcgen05.ld", 32x32b.x32: register i of lane l = column + i of tensor lane l, of the 32 lanes that this warp may read; complete after
// "tcgen05.wait::ld".
INLINE void tcgen05_ld(u32 (&v)[32], u32 address) {
    asm volatile(
        "tcgen05.ld.sync.aligned.32x32b.x32.b32 {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,"
        "%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31}, [%32]; tcgen05.wait::ld.sync.aligned;"
        : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3]), "=r"(v[4]), "=r"(v[5]), "=r"(v[6]), "=r"(v[7]), "=r"(v[8]), "=r"(v[9]),
          "=r"(v[10]), "=r"(v[11]), "=r"(v[12]), "=r"(v[13]), "=r"(v[14]), "=r"(v[15]), "=r"(v[16]), "=r"(v[17]), "=r"(v[18]),
          "=r"(v[19]), "=r"(v[20]), "=r"(v[21]), "=r"(v[22]), "=r"(v[23]), "=r"(v[24]), "=r"(v[25]), "=r"(v[26]), "=r"(v[27]),
          "=r"(v[28]), "=r"(v[29]), "=r"(v[30]), "=r"(v[31])
        : "r"(address)
        : "memory");
}

// ---- multiplication --------------------------------------------------------------------------------------------------------------
// "tcgen05.mma.sp": D[256, TOKENS] (+)= A[256, 64 bytes of k] * B; D, A and B by halves in the two blocks, at the same addresses.
//   d, metadata: in tensor memory; a, b: shared memory descriptors; add: 0 for D = A * B
INLINE void tcgen05_mma_sp(u32 d, u64 a, u64 b, u32 metadata, u32 instruction, u32 add) {
    asm volatile("{.reg .pred add; setp.ne.b32 add, %5, 0; tcgen05.mma.sp.cta_group::2.kind::" KIND " [%0], %1, %2, [%3], %4, add;}"
                 ::"r"(d), "l"(a), "l"(b), "r"(metadata), "r"(instruction), "r"(add) : "memory");
}
// "tcgen05.commit": when all that this thread has issued is complete, arrive on the barrier at this address in both blocks.
INLINE void tcgen05_commit(u32 b) {
    asm volatile("tcgen05.commit.cta_group::2.mbarrier::arrive::one.shared::cluster.multicast::cluster.b64 [%0], %1;"
                 ::"r"(b), "h"((u16)3) : "memory");
}
// "tcgen05.fence": accesses to tensor memory before, or after, a synchronization of threads are ordered by it.
INLINE void tcgen05_fence_before_thread_sync() { asm volatile("tcgen05.fence::before_thread_sync;" ::: "memory"); }
INLINE void tcgen05_fence_after_thread_sync() { asm volatile("tcgen05.fence::after_thread_sync;" ::: "memory"); }
