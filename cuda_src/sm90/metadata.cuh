// Metadata: two bits for each non-zero of a window, which of its four columns it is; a nibble a window.
//
//   expanded   words as the instruction reads them
//   compact    the number of a mask for each group: all of its columns but two, a < b, number b (b-1)/2 + a (arch/sm90_layout.py). A word
//              holds the numbers of the groups that 16 windows in a row belong to, the first lowest. A table in shared memory gives the
//              nibbles of every mask
#pragma once
#include "sm90/ptx.cuh"

template <int Windows> struct Mask {
    static constexpr int COLUMNS = 2 * Windows + 2, COUNT = COLUMNS * (COLUMNS - 1) / 2;
    static constexpr int BITS = COUNT > 64 ? 7 : COUNT > 32 ? 6 : COUNT > 16 ? 5 : 4;  // of a number
    static constexpr int NIBBLE_BITS = 4 * Windows;                                   // of a group
    static constexpr int PER_WORD = (16 + (16 % Windows ? Windows - 1 : 0) + Windows - 1) / Windows;  // numbers
    static_assert(BITS * PER_WORD <= 32 && NIBBLE_BITS <= 28, "the numbers of a word, and the nibbles of a group, fit into 32 bits");

    // The nibbles of a group: its e-th non-zero is column e % 2 + (e >= a) + (e + 1 >= b) of window e / 2.
    static INLINE u32 nibbles(u32 number) {
        constexpr u32 ONES = 0x55555555u >> (32 - NIBBLE_BITS), ODD = 0x44444444u >> (32 - NIBBLE_BITS);
        constexpr u32 ALL = 0xFFFFFFFFu >> (32 - NIBBLE_BITS);
        u32 b = 1;
        while ((b + 1) * b / 2 <= number) b++;
        const u32 a = number - b * (b - 1) / 2;
        return ODD + (ONES << 2 * a & ALL) + (ONES << 2 * (b - 1) & ALL);
    }
    // Those of the j-th number of a word, from the table.
    static INLINE u32 looked_up(u32 table, u32 word, u32 j) {
        constexpr u32 LOW = (1 << BITS) - 1;
        return ld_shared(table + 4 * (word >> BITS * j & LOW));
    }
};

// The nibbles of 16 windows of a row, the first of which is the skip-th of its group.
template <int Windows> INLINE void expand16(u32 table, u32 word, u32 skip, u32 (&e)[2]) {
    typedef Mask<Windows> M;
    u32 part[4] = {};
#pragma unroll
    for (int j = 0; j < M::PER_WORD; j++) {
        const u32 group = M::looked_up(table, word, j);
        const int at = j * M::NIBBLE_BITS;
        part[at / 32] |= group << at % 32;
        if (at % 32 + M::NIBBLE_BITS > 32) part[at / 32 + 1] |= group >> (32 - at % 32);
    }
    if (16 % Windows == 0) e[0] = part[0], e[1] = part[1];
    else e[0] = __funnelshift_r(part[0], part[1], 4 * skip), e[1] = __funnelshift_r(part[1], part[2], 4 * skip);
}

// The nibbles of four windows of a row, in the low half; the first is the skip-th counted from the word's first group.
template <int Windows> INLINE u32 expand4(u32 table, u32 word, u32 skip) {
    typedef Mask<Windows> M;
    const u32 j = skip / Windows, inside = skip % Windows;
    const u32 low = M::looked_up(table, word, j);
    if (Windows % 4 == 0) return low >> 4 * inside;
    const u32 high = M::looked_up(table, word, j + 1);
    return __funnelshift_r(low | high << M::NIBBLE_BITS, high >> (32 - M::NIBBLE_BITS), 4 * inside);
}

// What a thread reads from each stage in turn: e[i], the metadata of instruction i of the stage, from compact metadata.
//   Windows: of a group; Wide: 16-bit types, whose two instructions share a word
template <int Windows, bool Wide> struct Metadata {
    static constexpr int MASKS = Mask<Windows>::COUNT, BYTES = Wide ? 256 : 512;  // bytes of a row tile and stage
    static constexpr u32 STAGE_WINDOWS = Wide ? 16 : 32;                          // of a row
    u32 table, mine;    // the table; offset of this thread's word in a stage, of its row and half, or of row g (and + 8)
    u32 quarter, skip;  // this thread's first window in the word; windows of the word's first group that precede the word

    // row_tile: offset of this warpgroup's metadata in a stage.
    INLINE Metadata(u32 table, u32 row_tile, int thread) : table(table) {
        const int warp = thread / 32, g = thread % 32 / 4, q = thread % 4;
        mine = row_tile + 4 * (Wide ? 16 * warp + g : thread), quarter = Wide ? 4 * q : q / 2 * 16;
    }
    // Fills the table by the first `threads` threads, which then synchronize.
    static INLINE void fill(u32 table, int thread, int threads) {
        for (int number = thread; number < MASKS; number += threads) st_shared(table + 4 * number, Mask<Windows>::nibbles(number));
    }
    INLINE void start(int stage) { skip = (stage * STAGE_WINDOWS + (Wide ? 0 : quarter)) % Windows; }
    // From this thread's word; `below` returns that of 8 rows below, for 16-bit types.
    template <class Below> INLINE void decode(u32 word, Below below, u32 (&e)[2]) const {
        if constexpr (Wide) {
            const u32 low = expand4<Windows>(table, word, skip + quarter);
            const u32 high = expand4<Windows>(table, below(), skip + quarter);
            e[0] = e[1] = __byte_perm(low, high, 0x5410);
        } else expand16<Windows>(table, word, skip, e);
    }
    INLINE void read(u32 stage, u32 (&e)[2]) {
        decode(ld_shared(stage + mine), [&] { return ld_shared(stage + mine + 32); }, e);
        skip += STAGE_WINDOWS % Windows;
        if (skip >= Windows) skip -= Windows;
    }
};

// The same from expanded metadata: one word a thread, or two of 8-bit types.
template <bool Wide> struct Metadata<0, Wide> {
    static constexpr int MASKS = 0, BYTES = Wide ? 512 : 1024;
    u32 mine;

    INLINE Metadata(u32, u32 row_tile, int thread) : mine(row_tile + thread * (Wide ? 4 : 8)) {}
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
