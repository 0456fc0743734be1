/* Products of matrices of float32 on a CPU: C (+)= A B, where B is packed into panels of 16 columns, [depth][16] each. */

#include <stdint.h>
#include <string.h>

#include "../native/simd.h"

#define PANELS (2 / PARTS) /* that are gone through at a time */
#define TALL 12                 /* rows of a product summed in registers, over 8 columns */

typedef float four __attribute__((vector_size(16), aligned(4), may_alias));

INLINE vec pick(ints where, vec yes, vec no) { return (vec)((where & (ints)yes) | (~where & (ints)no)); }

/* C[high, 16 panels] (+)= A B, A(i, k) = a[i da + k dk], B(k, .) = b + 16 k, of a second panel `apart` behind that; the first
   `columns` columns of it. */
INLINE void block(const int high, const int panels, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                  int64_t apart, float *c, int64_t dc, int64_t columns, int add) {
  const int parts = panels * PARTS;
  reg sum[HIGH][2];
  UNROLL for (int i = 0; i < high; i++) sum[i][0] = sum[i][1] = (reg){0};
  for (int64_t k = 0; k < depth; k++, b += 16) {
    const reg left = *(const reg *)b, right = *(const reg *)(PARTS == 2 ? b + LANES : panels == 2 ? b + apart : b);
    UNROLL for (int i = 0; i < high; i++) {
      const float one = a[i * da + k * dk];
      sum[i][0] += one * left;
      if (parts == 2) sum[i][1] += one * right;
    }
  }
  const int whole = columns == 16 * panels;
  float own[HIGH * 2 * LANES];
  if (whole && add) {
    UNROLL for (int i = 0; i < high; i++)
      for (int j = 0; j < parts; j++) *(reg *)(c + i * dc + LANES * j) += sum[i][j];
    return;
  }
  UNROLL for (int i = 0; i < high; i++)
    for (int j = 0; j < parts; j++) *(reg *)((whole ? c + i * dc : own + i * 2 * LANES) + LANES * j) = sum[i][j];
  if (whole) return;
  for (int i = 0; i < high; i++)
    for (int64_t j = 0; j < columns; j++) c[i * dc + j] = add ? c[i * dc + j] + own[i * 2 * LANES + j] : own[i * 2 * LANES + j];
}

/* The same of a panel of 8 columns, B(k, .) = b + 8 k. */
INLINE void narrow_block(const int high, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b, float *c,
                         int64_t dc, int64_t columns, int add) {
  vec sum[TALL];
  for (int i = 0; i < high; i++) sum[i] = (vec){0};
  for (int64_t k = 0; k < depth; k++, b += 8) {
    const vec all = *(const vec *)b;
    for (int i = 0; i < high; i++) sum[i] += a[i * da + k * dk] * all;
  }
  for (int i = 0; i < high; i++) {
    float *row = c + i * dc;
    if (columns == 8) {
      if (add) *(vec *)row += sum[i];
      else *(vec *)row = sum[i];
    } else
      for (int64_t j = 0; j < columns; j++) row[j] = add ? row[j] + sum[i][j] : sum[i][j];
  }
}

/* Panels of C = A B, all their rows. */
INLINE void panel(const int panels, int64_t m, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                  int64_t apart, float *c, int64_t dc, int64_t columns, int add) {
  for (int64_t high; m; m -= high, a += high * da, c += high * dc) {
    high = next_high(m);
#define CALL(n) block(n, panels, depth, a, da, dk, b, apart, c, dc, columns, add)
    FOR_HIGH(high, CALL)
#undef CALL
  }
}

INLINE void narrow_panel(int64_t m, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b, float *c, int64_t dc,
                         int64_t columns, int add) {
  for (; m >= TALL; m -= TALL, a += TALL * da, c += TALL * dc) narrow_block(TALL, depth, a, da, dk, b, c, dc, columns, add);
  for (int64_t high; m; m -= high, a += high * da, c += high * dc) {
    high = least(m, 6);
#define CALL(n) narrow_block(n, depth, a, da, dk, b, c, dc, columns, add)
    FOR_HIGH(high, CALL)
#undef CALL
  }
}

/* C[m, n] (+)= A B, B packed with `tall` rows, of which the first `depth` count. */
static void product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b, int64_t tall,
                    float *c, int64_t dc, int add) {
  for (int64_t j = 0; j < n;) {
    const int64_t left = n - j;
    if (PANELS == 2 && left > 24) panel(PANELS, m, depth, a, da, dk, b, 16 * tall, c + j, dc, least(left, 32), add), j += 32, b += 32 * tall;
    else if (left > 8) panel(1, m, depth, a, da, dk, b, 0, c + j, dc, least(left, 16), add), j += 16, b += 16 * tall;
    else narrow_panel(m, depth, a, da, dk, b, c + j, dc, left, add), j += 8;
  }
}

/* Pack B(k, j) = b[k db + j] as rows at ... at + depth - 1 of panels with `tall`; the last panel is 8 wide where no more
   columns are left, the rest of a panel 0. */
static void pack_at(int64_t at, int64_t tall, int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
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
static void pack_turned(int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
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

/* Pack A(i, k) = a[k da + i] as rows at ... at + depth - 1 of panels of HIGH columns i with `tall`: for sums over many rows, in
   which rows as they lie would each be a page and fall into the same few lines of a cache. What is left of the last panel
   is not written. */
static void pack_high(int64_t at, int64_t tall, int64_t depth, int64_t m, const float *a, int64_t da, float *to) {
  const int64_t whole = m / HIGH * HIGH;
  for (int64_t first = 0; first < depth; first += 8) { /* few rows, that their lines stay until all panels have theirs */
    const int64_t rows = least(8, depth - first);
    for (int64_t i = 0; i < m; i += HIGH) {
      const float *from = a + first * da + i;
      float *row = to + i * tall + HIGH * (at + first);
      for (int64_t k = 0; k < rows; k++, row += HIGH, from += da)
        if (i < whole) memcpy(row, from, HIGH * sizeof *row);
        else
          for (int64_t j = 0; j < m - i; j++) row[j] = from[j];
    }
  }
}

/* Ask for what a block's sums are to be added to, which lies far away and is here when they are made. */
INLINE void ask_for(int64_t high, int64_t wide, const float *c, int64_t dc) {
  for (int64_t i = 0; i < high; i++)
    for (int64_t j = 0; j < wide; j += 16) __builtin_prefetch(c + i * dc + j, 1);
}

/* C[m, n] += A B of a whole depth, A packed by pack_high and B into panels. */
static void deep_product(int64_t m, int64_t n, int64_t depth, const float *a, const float *b, float *c, int64_t dc) {
  for (int64_t j = 0; j < n;) {
    const int64_t left = n - j, wide = PANELS == 2 && left > 24 ? 32 : left > 8 ? 16 : 8;
    for (int64_t i = 0; i < m; i += HIGH) {
      const int64_t high = least(HIGH, m - i);
      const float *from = a + i * depth;
      float *to = c + i * dc + j;
      ask_for(high, wide, to, dc);
      if (wide == 32) panel(PANELS, high, depth, from, 1, HIGH, b, 16 * depth, to, dc, least(left, 32), 1);
      else if (wide == 16) panel(1, high, depth, from, 1, HIGH, b, 0, to, dc, least(left, 16), 1);
      else narrow_panel(high, depth, from, 1, HIGH, b, to, dc, left, 1);
    }
    j += wide, b += wide * depth;
  }
}
