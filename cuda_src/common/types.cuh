// Types and conversions. No header of the CUDA toolkit is needed, so NVRTC alone compiles everything.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef long long i64;
typedef unsigned long long u64;

#define INLINE __device__ __forceinline__

// A constant as an argument: its value is decltype(argument)::value.
template <bool Value> struct Flag {
    static constexpr bool value = Value;
};
template <int Value> struct Number {
    static constexpr int value = Value;
};

// The element types, by the numbers that the host passes in #defines and arguments.
#define TYPE_INT8 0
#define TYPE_FLOAT8 1
#define TYPE_BFLOAT16 2
#define TYPE_FLOAT16 3
#define TYPE_FLOAT32 4
#define TYPE_FLOAT4 5  // e2m1, two a byte

// PTX ISA, "cvt": round to nearest even; overflow gives infinity.
INLINE u16 bfloat16_bits(float v) {
    u16 r;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
INLINE u16 float16_bits(float v) {
    u16 r;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}
INLINE float from_bfloat16(u16 bits) { return __uint_as_float((u32)bits << 16); }
INLINE float from_float16(u16 bits) {
    float r;
    asm("cvt.f32.f16 %0, %1;" : "=f"(r) : "h"(bits));
    return r;
}

// One element of an array of TYPE_BFLOAT16, TYPE_FLOAT16 or TYPE_FLOAT32, as float.
INLINE float load_float(const void* array, i64 index, i64 type) {
    if (type == TYPE_FLOAT32) return ((const float*)array)[index];
    u16 bits = ((const u16*)array)[index];
    return type == TYPE_BFLOAT16 ? from_bfloat16(bits) : from_float16(bits);
}

// The storage of an output type, and a float rounded to it.
template <int TYPE> struct Output {
    typedef u16 Storage;
    static INLINE u16 round(float v) { return TYPE == TYPE_BFLOAT16 ? bfloat16_bits(v) : float16_bits(v); }
    static INLINE u32 round2(float low, float high) {  // two at once, the first in the low half
        u32 r;
        if (TYPE == TYPE_BFLOAT16) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
        return r;
    }
};
template <> struct Output<TYPE_FLOAT32> {
    typedef float Storage;
    static INLINE float round(float v) { return v; }
    static INLINE u32 round2(float, float) { return 0; }  // never called
};
