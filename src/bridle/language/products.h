/* Products of matrices of float32 on a CPU: C (+)= A B, where B is packed into panels of 16 columns, [depth][16] each. */

#include <stdint.h>
#include <string.h>

#include "../native/simd.h"

#define HIGH 6   /* rows of a product summed in registers, over 16 columns */
#define TALL 12  /* the same over 8 columns */

typedef uint32_t bits __attribute__((vector_size(32), aligned(4), may_alias));
typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

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

/* Pack B(k, j) = b[k db + j] as rows at ... at + depth - 1 of panels with `tall`; the last panel is 8 wide where no more
   columns are left, the rest of a panel 0. */
CLONES static void pack_at(int64_t at, int64_t tall, int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t wide = n - j > 8 ? 16 : 8, columns = least(n - j, wide);
    float *row = to + wide * at;
    for (int64_t k = 0; k < depth; k++, row += wide) {
      if (columns == 16) memcpy(row, b + k * db + j, 64);
      else if (columns == 8) memcpy(row, b + k * db + j, 32);
      else
        for (int64_t i = 0; i < wide; i++) row[i] = i < columns ? b[k * db + j + i] : 0.0f;
    }
    to += wide * tall;
  }
}

INLINE void pack(int64_t depth, int64_t n, const float *b, int64_t db, float *to) { pack_at(0, depth, depth, n, b, db, to); }

/* to[k high + i] = from[i along + k], i and k < 8. */
INLINE void turn_eight(const float *from, int64_t along, float *to, int64_t high) {
  vec a[8], b[8];
  for (int i = 0; i < 8; i++) a[i] = *(const vec *)(from + i * along);
  for (int i = 0; i < 8; i += 2) {
    b[i] = SHUFFLE(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = SHUFFLE(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = i; j < i + 2; j++) {
      a[j] = SHUFFLE(b[j], b[j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      a[j + 2] = SHUFFLE(b[j], b[j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int i = 0; i < 4; i++) {
    *(vec *)(to + i * high) = SHUFFLE(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *(vec *)(to + (i + 4) * high) = SHUFFLE(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

/* Pack B(k, j) = b[j db + k]. */
CLONES static void pack_turned(int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
  const int64_t whole = depth / 8 * 8;
  for (int64_t j = 0; j < n; j += 16) {
    const int64_t wide = n - j > 8 ? 16 : 8, columns = least(n - j, wide), turned = columns / 8 * 8;
    for (int64_t i = 0; i < turned; i += 8)
      for (int64_t k = 0; k < whole; k += 8) turn_eight(b + (j + i) * db + k, db, to + k * wide + i, wide);
    for (int64_t i = 0; i < wide; i++)
      for (int64_t k = i < turned ? whole : 0; k < depth; k++) to[k * wide + i] = i < columns ? b[(j + i) * db + k] : 0.0f;
    to += wide * depth;
  }
}

/* Pack A(i, k) = a[k da + i] as rows at ... at + depth - 1 of panels of 6 columns i with `tall`: for sums over many rows, in
   which rows as they lie would each be a page and fall into the same few lines of a cache. What is left of the last panel
   is not written. */
CLONES static void pack_high(int64_t at, int64_t tall, int64_t depth, int64_t m, const float *a, int64_t da, float *to) {
  const int64_t whole = m / HIGH * HIGH;
  for (int64_t first = 0; first < depth; first += 8) { /* few rows, that their lines stay until all panels have theirs */
    const int64_t rows = least(8, depth - first);
    for (int64_t i = 0; i < m; i += HIGH) {
      const float *from = a + first * da + i;
      float *row = to + i * tall + HIGH * (at + first);
      if (i < whole)
        for (int64_t k = 0; k < rows; k++, row += HIGH, from += da) {
          *(four *)row = *(const four *)from;
          row[4] = from[4], row[5] = from[5];
        }
      else
        for (int64_t k = 0; k < rows; k++, row += HIGH, from += da)
          for (int64_t j = 0; j < m - i; j++) row[j] = from[j];
    }
  }
}

/* C[m, n] += A B of a whole depth, A packed by pack_high and B into panels. */
CLONES static void deep_product(int64_t m, int64_t n, int64_t depth, const float *a, const float *b, float *c, int64_t dc) {
  for (int64_t j = 0; j < n; j += 16, b += 16 * depth)
    for (int64_t i = 0; i < m; i += HIGH)
      if (n - j > 8) panel(2, least(HIGH, m - i), depth, a + i * depth, 1, HIGH, b, c + i * dc + j, dc, least(n - j, 16), 1);
      else panel(1, least(HIGH, m - i), depth, a + i * depth, 1, HIGH, b, c + i * dc + j, dc, n - j, 1);
}
