/* Products of matrices of float32 on a CPU: C (+)= A B, where B is packed into panels of 16 columns, [depth][16] each. */

#include <stdint.h>
#include <string.h>

#define HIGH 6   /* rows of a product summed in registers, over 16 columns */
#define TALL 12  /* the same over 8 columns */

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));
typedef int32_t ints __attribute__((vector_size(32), aligned(4), may_alias));
typedef uint32_t bits __attribute__((vector_size(32), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define CLONES __attribute__((noinline, target_clones("arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define EXPORT __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))

INLINE int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }
INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
INLINE vec pick(ints where, vec yes, vec no) { return (vec)((where & (ints)yes) | (~where & (ints)no)); }

/* C[high, 8 wide] (+)= A B, A(i, k) = a[i da + k dk], B(k, .) = b + 8 wide k. */
INLINE void block(const int high, const int wide, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                  float *c, int64_t dc, int64_t columns, int add) {
  vec sum[TALL][2];
  for (int i = 0; i < high; i++)
    for (int j = 0; j < wide; j++) sum[i][j] = (vec){0};
  for (int64_t k = 0; k < depth; k++, b += 8 * wide) {
    const vec left = *(const vec *)b, right = *(const vec *)(b + 8 * (wide - 1));
    for (int i = 0; i < high; i++) {
      const float one = a[i * da + k * dk];
      sum[i][0] += one * left;
      if (wide == 2) sum[i][1] += one * right;
    }
  }
  for (int i = 0; i < high; i++) {
    float *row = c + i * dc;
    if (columns == 8 * wide)
      for (int j = 0; j < wide; j++) {
        vec *to = (vec *)row + j;
        if (add) *to += sum[i][j];
        else *to = sum[i][j];
      }
    else
      for (int64_t j = 0; j < columns; j++) {
        const float one = sum[i][j / 8][j % 8];
        row[j] = add ? row[j] + one : one;
      }
  }
}

#define ROWS_OF(n) \
  case n: block(n, wide, depth, a, da, dk, b, c, dc, columns, add); break

/* One panel of C = A B, all its rows. */
INLINE void panel(const int wide, int64_t m, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b, float *c,
                  int64_t dc, int64_t columns, int add) {
  const int most = wide == 2 ? HIGH : TALL;
  for (; m >= most; m -= most, a += most * da, c += most * dc) block(most, wide, depth, a, da, dk, b, c, dc, columns, add);
  if (wide == 1 && m >= 6) {
    block(6, 1, depth, a, da, dk, b, c, dc, columns, add);
    m -= 6, a += 6 * da, c += 6 * dc;
  }
  switch (m) {
    ROWS_OF(5);
    ROWS_OF(4);
    ROWS_OF(3);
    ROWS_OF(2);
    ROWS_OF(1);
  }
}

/* C[m, n] (+)= A B, B packed with `tall` rows, of which the first `depth` count. */
CLONES static void product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                           int64_t tall, float *c, int64_t dc, int add) {
  for (int64_t j = 0; j < n; j += 16, b += 16 * tall)
    if (n - j > 8) panel(2, m, depth, a, da, dk, b, c + j, dc, least(n - j, 16), add);
    else panel(1, m, depth, a, da, dk, b, c + j, dc, n - j, add);
}

/* Pack B(k, j) = b[k db + j]; the last panel is 8 wide where no more columns are left, the rest of a panel 0. */
CLONES static void pack(int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t wide = n - j > 8 ? 16 : 8, columns = least(n - j, wide);
    for (int64_t k = 0; k < depth; k++, to += wide) {
      if (columns == 16) memcpy(to, b + k * db + j, 64);
      else if (columns == 8) memcpy(to, b + k * db + j, 32);
      else
        for (int64_t i = 0; i < wide; i++) to[i] = i < columns ? b[k * db + j + i] : 0.0f;
    }
  }
}

/* Pack B(k, j) = b[j db + k]. */
CLONES static void pack_turned(int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t wide = n - j > 8 ? 16 : 8, columns = least(n - j, wide);
    for (int64_t i = 0; i < wide; i++)
      if (i < columns)
        for (int64_t k = 0; k < depth; k++) to[k * wide + i] = b[(j + i) * db + k];
      else
        for (int64_t k = 0; k < depth; k++) to[k * wide + i] = 0.0f;
    to += wide * depth;
  }
}
