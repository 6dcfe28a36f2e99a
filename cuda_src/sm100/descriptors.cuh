// Descriptors of tcgen05 and addresses in tensor memory. The host says them (arch/sm100_layout.py); here they are asserted.
#pragma once
#include "sm100/config.cuh"

// "Matrix Descriptors: Shared memory descriptor", K-major rows of ROW_BYTES at address 0; address and strides in units of 16 bytes:
//   bits 0-13 address; 16-29 leading offset, unused; 32-45 from 8 rows to the next; 46-48 version, 1; 61-63 swizzle: 0 none, 2: 128 B, 4: 64 B
constexpr u64 shared_descriptor(int row_bytes, int swizzle) {
    return (u64)1 << 16 | (u64)(8 * row_bytes >> 4) << 32 | (u64)1 << 46 | (u64)swizzle << 61;
}
// "...: Instruction descriptor", kinds f16, f8f6f4, i8:
//   bits 0-1 selector of the metadata; 2 sparse; 4-5 type of D: 1 f32, 2 s32; 7-9, 10-12 types of A, B: in kind f16 0 f16, 1 bf16; in f8f6f4
//   0 e4m3; in i8 1 s8; 17-22 N / 8; 24-28 M / 16
constexpr u32 instruction_descriptor() {
    const u32 operand = DTYPE == TYPE_INT8 || DTYPE == TYPE_BFLOAT16, sums = DTYPE == TYPE_INT8 ? 2 : 1;
    return 1u << 2 | sums << 4 | operand << 7 | operand << 10 | (u32)(TOKENS / 8) << 17 | (u32)(2 * ROWS / 16) << 24;
}

#ifndef INSTRUCTION_DESCRIPTOR
#define ACTIVATIONS_DESCRIPTOR shared_descriptor(128, 2)
#define VALUES_DESCRIPTOR shared_descriptor(64, 4)
#define METADATA_DESCRIPTOR shared_descriptor(16, 0)
#define INSTRUCTION_DESCRIPTOR instruction_descriptor()
#define STEPS {0, 0, 0, 0}, {4, 2, 2, 0}
#define SECOND_COLUMN 224
#define METADATA_COLUMN 480
#endif
static_assert(ACTIVATIONS_DESCRIPTOR == shared_descriptor(128, 2), "rows of 128 bytes, 128-byte swizzle");
static_assert(VALUES_DESCRIPTOR == shared_descriptor(64, 4), "rows of 64 bytes, 64-byte swizzle");
static_assert(METADATA_DESCRIPTOR == shared_descriptor(16, 0), "rows of 16 bytes, not swizzled");
static_assert(INSTRUCTION_DESCRIPTOR == instruction_descriptor() && (INSTRUCTION_DESCRIPTOR & 4), "sparse, 256 outputs x TOKENS");

// What instruction i of a k-tile adds: to the descriptors of activations and values; to the column of the metadata; to the instruction's.
struct Step {
    u32 activations, values, column, selector;
};
__device__ constexpr Step step_of[] = {STEPS};
constexpr bool steps_are_right() {
    for (int i = 0; i < INSTRUCTIONS; i++) {
        const Step& s = step_of[i];
        if (s.activations != i / 2 * (BLOCK_BYTES / 16) + i % 2 * 4u || s.values != i / 2 * (VALUE_BYTES / 16) + i % 2 * 2u) return false;
        if (s.column != (WIDE ? i / 2 * 2u : i * 2u) || s.selector != (WIDE ? i % 2u : 0u)) return false;
    }
    return true;
}
static_assert(sizeof(step_of) == INSTRUCTIONS * sizeof(Step) && steps_are_right(), "64 bytes of activations, 32 of values, a step");

// Tensor memory: 512 columns of 128 lanes x 32 bits. An address is lane << 16 | column.
//
//   sums 0    columns 0 ... TOKENS - 1                        D[output = lane, token = column]
//   sums 1    columns SECOND_COLUMN ... + TOKENS - 1          of every second tile
//   metadata  columns METADATA_COLUMN + 4 slot ... + 3        16 bytes of each output
//
// Of 256 tokens the last CHUNK columns of sums 0 are the first of sums 1.
constexpr int TENSOR_COLUMNS = 512, CHUNK = 32, METADATA_COLUMNS = METADATA_BYTES / ROWS / 4;
static_assert(TOKENS <= SECOND_COLUMN + CHUNK && SECOND_COLUMN + TOKENS <= METADATA_COLUMN, "sums share one chunk at most");
static_assert(METADATA_COLUMN % 4 == 0 && METADATA_COLUMN + METADATA_COLUMNS * STAGES <= TENSOR_COLUMNS, "every slot has its metadata");
