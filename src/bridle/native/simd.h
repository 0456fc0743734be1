/* What all compiled code is written in: numbers of float32 eight at a time, and functions of which the machine picks the better
   of two: for any processor of its kind, and for one with AVX2 and FMA (x86-64-v3). */

#pragma once

#include <stdint.h>

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((noinline, target_clones("arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 6") /* so that sums stay in registers */

/* Eight of the sixteen numbers of a and b, by their places. */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; } /* to whole panels of 16 columns */
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
