// How elements of each type are stored, and how one becomes another.
#pragma once
#include "common/types.cuh"

template <int TYPE> struct Element { typedef u16 Storage; };
template <> struct Element<TYPE_INT8> { typedef u8 Storage; };
template <> struct Element<TYPE_FLOAT8> { typedef u8 Storage; };
template <> struct Element<TYPE_FLOAT32> { typedef u32 Storage; };

// SOURCE -> TARGET, rounded to nearest even; the same type, or float32, bfloat16 and float16 into a 16-bit type.
template <int SOURCE, int TARGET> INLINE typename Element<TARGET>::Storage convert(typename Element<SOURCE>::Storage bits) {
    if constexpr (SOURCE == TARGET) return bits;
    else if constexpr (SOURCE == TYPE_FLOAT32) return Output<TARGET>::round(__uint_as_float(bits));
    else return Output<TARGET>::round(SOURCE == TYPE_BFLOAT16 ? from_bfloat16(bits) : from_float16(bits));
}
