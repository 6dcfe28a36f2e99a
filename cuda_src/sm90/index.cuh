// Codes of masks -> index words of the instruction. A group keeps all of its columns but two, a < b: code b (b-1)/2 + a
// (arch/sm90_layout.py). A word holds the codes of the groups that 16 windows in a row belong to, the first lowest.
#pragma once
#include "common/types.cuh"
#include "sm90/ptx.cuh"

template <int Windows> struct Masks {
    static constexpr int COLUMNS = 2 * Windows + 2, CODES = COLUMNS * (COLUMNS - 1) / 2;
    static constexpr int BITS = CODES > 64 ? 7 : CODES > 32 ? 6 : CODES > 16 ? 5 : 4;  // of a code
    static constexpr int NIBBLES = 4 * Windows;                                       // bits of the nibbles of a group
    static constexpr int IN_A_WORD = (16 + (16 % Windows ? Windows - 1 : 0) + Windows - 1) / Windows;  // codes
    static_assert(BITS * IN_A_WORD <= 32 && NIBBLES <= 28, "codes of a word, nibbles of a group");

    // The nibbles of a group: the e-th column kept is the (e % 2 + (e >= a) + (e + 1 >= b))-th of window e / 2; two bits each.
    static INLINE u32 nibbles(u32 code) {
        constexpr u32 ONES = 0x55555555u >> (32 - NIBBLES), ODD = 0x44444444u >> (32 - NIBBLES), ALL = 0xFFFFFFFFu >> (32 - NIBBLES);
        u32 b = 1;
        while ((b + 1) * b / 2 <= code) b++;
        const u32 a = code - b * (b - 1) / 2;
        return ODD + (ONES << 2 * a & ALL) + (ONES << 2 * (b - 1) & ALL);
    }
    // Of code j of a word, from the table in shared memory.
    static INLINE u32 looked_up(u32 table, u32 word, u32 j) {
        constexpr u32 MASK = (1 << BITS) - 1;
        return ld_shared(table + 4 * (word >> BITS * j & MASK));
    }
};

// The nibbles of 16 windows of a row, the first of which is the skip-th of its group.
template <int Windows> INLINE void expand(u32 table, u32 word, u32 skip, u32 (&e)[2]) {
    typedef Masks<Windows> M;
    u32 part[4] = {};
#pragma unroll
    for (int j = 0; j < M::IN_A_WORD; j++) {
        const u32 group = M::looked_up(table, word, j);
        const int at = j * M::NIBBLES;
        part[at / 32] |= group << at % 32;
        if (at % 32 + M::NIBBLES > 32) part[at / 32 + 1] |= group >> (32 - at % 32);
    }
    if (16 % Windows == 0) e[0] = part[0], e[1] = part[1];
    else e[0] = __funnelshift_r(part[0], part[1], 4 * skip), e[1] = __funnelshift_r(part[1], part[2], 4 * skip);
}

// The nibbles of four windows of a row, in the low half; the first is the skip-th counted from the word's first group.
template <int Windows> INLINE u32 expand4(u32 table, u32 word, u32 skip) {
    typedef Masks<Windows> M;
    const u32 j = skip / Windows, inside = skip % Windows;
    const u32 low = M::looked_up(table, word, j);
    if (Windows % 4 == 0) return low >> 4 * inside;
    const u32 high = M::looked_up(table, word, j + 1);
    return __funnelshift_r(low | high << M::NIBBLES, high >> (32 - M::NIBBLES), 4 * inside);
}

// What a thread reads of each stage in turn: the index words of both instructions, made from codes.
//   Windows: of the pattern; Wide: 16-bit types, a word of which serves both instructions
template <int Windows, bool Wide> struct Index {
    static constexpr int CODES = Masks<Windows>::CODES, BYTES = Wide ? 256 : 512;  // of a strip and stage
    static constexpr u32 EVERY = Wide ? 16 : 32;                                   // windows of a row and stage
    u32 table, mine;  // nibbles of every code; in a stage, this thread's words: of its row and half, or of rows g and g + 8
    u32 quarter, skip;

    // strip: where the words of the thread's strip stand in a stage
    INLINE Index(u32 table, u32 strip, int thread) : table(table) {
        const int warp = thread / 32, g = thread % 32 / 4, q = thread % 4;
        mine = strip + 4 * (Wide ? 16 * warp + g : thread), quarter = Wide ? 4 * q : q / 2 * 16;
    }
    // By the first of `threads` threads, which then meet at a barrier.
    static INLINE void fill(u32 table, int thread, int threads) {
        for (int code = thread; code < CODES; code += threads) st_shared(table + 4 * code, Masks<Windows>::nibbles(code));
    }
    INLINE void start(int stage) { skip = (stage * EVERY + (Wide ? 0 : quarter)) % Windows; }
    INLINE void read(u32 stage, u32 (&e)[2]) {
        const u32 word = ld_shared(stage + mine);
        if constexpr (Wide) {
            const u32 low = expand4<Windows>(table, word, skip + quarter);
            const u32 high = expand4<Windows>(table, ld_shared(stage + mine + 32), skip + quarter);
            e[0] = e[1] = __byte_perm(low, high, 0x5410);
        } else expand<Windows>(table, word, skip, e);
        skip += EVERY % Windows;
        if (skip >= Windows) skip -= Windows;
    }
};

// The same of index words as they are.
template <bool Wide> struct Index<0, Wide> {
    static constexpr int CODES = 0, BYTES = Wide ? 512 : 1024;
    u32 mine;

    INLINE Index(u32, u32 strip, int thread) : mine(strip + thread * (Wide ? 4 : 8)) {}
    static INLINE void fill(u32, int, int) {}
    INLINE void start(int) {}
    INLINE void read(u32 stage, u32 (&e)[2]) {
        if constexpr (Wide) e[0] = e[1] = ld_shared(stage + mine);
        else {
            const uint2 both = ld_shared2(stage + mine);
            e[0] = both.x, e[1] = both.y;
        }
    }
};
