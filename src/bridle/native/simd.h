/* What all compiled code is written in: numbers of float32 eight at a time, and sixteen where the processor it is compiled for
   has registers of them (x86-64-v4, see compiling.py). Sums run in the same order for both, so that numbers are the same. */

#pragma once

#include <stdint.h>

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(32), aligned(4), may_alias));

/* What a register holds, and rows of a product that are summed in registers: two registers of each. */
#ifdef __AVX512F__
#define LANES 16
#define HIGH 8
#else
#define LANES 8
#define HIGH 6
#endif
#define PARTS (16 / LANES) /* registers of sixteen numbers */
typedef float reg __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int32_t flags __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef uint32_t patterns __attribute__((vector_size(4 * LANES), aligned(4), may_alias));

#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define UNROLL _Pragma("GCC unroll 8") /* so that sums stay in registers */

/* Eight of the sixteen numbers of a and b, by their places. */
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (ints){__VA_ARGS__})
#endif

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* Of `left` rows the next to be summed at a time: HIGH, but halves of what is between HIGH and twice as many, for a block of one
   or two rows waits for its own sums. */
INLINE int64_t next_high(int64_t left) { return left <= HIGH ? left : left < 2 * HIGH ? (left + 1) / 2 : HIGH; }

/* Call a macro with `high`, of HIGH at most, as a constant. */
#if HIGH == 8
#define HIGHER(call)      \
  case 8: call(8); break; \
  case 7: call(7); break;
#else
#define HIGHER(call)
#endif
#define FOR_HIGH(high, call) \
  switch (high) {            \
    HIGHER(call)             \
    case 6: call(6); break;  \
    case 5: call(5); break;  \
    case 4: call(4); break;  \
    case 3: call(3); break;  \
    case 2: call(2); break;  \
    case 1: call(1); break;  \
  }

INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; } /* to whole panels of 16 columns */
