/* Products of weights and of what goes through them: of float32 as they are, or, where HALVES is defined, of both rounded to
   bfloat16 and summed in float32, two multiplications to a lane. What is packed is then rounded: each panel keeps its place and
   fills half of it, [depth / 2] rows of pairs, with a 0 where the depth is odd. products.h comes before. */

#ifndef HALVES

INLINE void halve(int64_t depth, int64_t n, float *packed) { (void)depth, (void)n, (void)packed; }
INLINE void halve_high(int64_t depth, int64_t m, float *packed) { (void)depth, (void)m, (void)packed; }

/* Pack B(k, j) = b[k db + j], and B(k, j) = b[j db + k], for linear_product. */
INLINE void linear_pack(int64_t depth, int64_t n, const float *b, int64_t db, float *to) { pack(depth, n, b, db, to); }
INLINE void linear_pack_turned(int64_t depth, int64_t n, const float *b, int64_t db, float *to) { pack_turned(depth, n, b, db, to); }

/* C[m, n] (+)= A B of rows of A and all of what is packed. */
static void linear_product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, const float *b, float *c, int64_t dc,
                           int add) {
  product(m, n, depth, a, da, 1, b, depth, c, dc, add);
}

/* C[m, n] += A B of a whole depth, A packed by pack_high and B into panels. */
INLINE void linear_deep(int64_t m, int64_t n, int64_t depth, const float *a, const float *b, float *c, int64_t dc) {
  deep_product(m, n, depth, a, b, c, dc);
}

#else

#include <immintrin.h>

#define PAIRS 512 /* pairs of a row of A that are rounded at a time */
#define FEW 48    /* rows of them */

typedef uint32_t pair __attribute__((may_alias, aligned(4)));

/* Pairs of two rows, sixteen or eight numbers each; `odd`: there is no second row. */
INLINE __m512i pairs_of(const float *row, const float *next, int odd) {
  const __m512i low = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(row)));
  if (odd) return low;
  return _mm512_or_si512(low, _mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(next))), 16));
}

INLINE __m256i narrow_pairs_of(const float *row, const float *next, int odd) {
  const __m256i low = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(row)));
  if (odd) return low;
  return _mm256_or_si256(low, _mm256_slli_epi32(_mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(_mm256_loadu_ps(next))), 16));
}

/* Round panels of B where they lie. */
static void halve(int64_t depth, int64_t n, float *packed) {
  for (int64_t j = 0; j < n; j += 16) {
    if (n - j > 8)
      for (int64_t k = 0; k < depth; k += 2)
        _mm512_storeu_si512(packed + 8 * k, pairs_of(packed + 16 * k, packed + 16 * (k + 1), k + 1 == depth));
    else
      for (int64_t k = 0; k < depth; k += 2)
        _mm256_storeu_si256((__m256i *)(packed + 4 * k), narrow_pairs_of(packed + 8 * k, packed + 8 * (k + 1), k + 1 == depth));
    packed += 16 * depth;
  }
}

/* Round panels of A, packed by pack_high, where they lie. */
static void halve_high(int64_t depth, int64_t m, float *packed) {
  for (int64_t i = 0; i < m; i += HIGH, packed += HIGH * depth)
    for (int64_t k = 0; k < depth; k += 2)
      _mm256_storeu_si256((__m256i *)(packed + 4 * k), narrow_pairs_of(packed + 8 * k, packed + 8 * (k + 1), k + 1 == depth));
}

/* Round rows of A, `depth` numbers of each, to rows of PAIRS. */
static void halve_rows(int64_t rows, int64_t depth, const float *a, int64_t da, pair *to) {
  for (int64_t i = 0; i < rows; i++, a += da, to += PAIRS)
    for (int64_t k = 0; k < depth; k += 32) {
      const int64_t left = depth - k;
      const __mmask16 first = left >= 16 ? 0xffff : (1u << left) - 1;
      const __mmask16 second = left >= 32 ? 0xffff : left > 16 ? (1u << (left - 16)) - 1 : 0;
      const __m512 low = _mm512_maskz_loadu_ps(first, a + k), high = _mm512_maskz_loadu_ps(second, a + k + 16);
      _mm512_storeu_si512(to + k / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

/* Pack B(k, j) = b[k db + j] in pairs; what no whole panel of 16 is filled by as everywhere. */
static void linear_pack(int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
  const int64_t whole = n / 16 * 16;
  for (int64_t j = 0; j < whole; j += 16, to += 16 * depth)
    for (int64_t k = 0; k < depth; k += 2)
      _mm512_storeu_si512(to + 8 * k, pairs_of(b + k * db + j, b + (k + 1) * db + j, k + 1 == depth));
  if (whole < n) pack(depth, n - whole, b + whole, db, to), halve(depth, n - whole, to);
}

/* The same of B(k, j) = b[j db + k]: pairs lie side by side there, and are turned over eight by eight. */
static void linear_pack_turned(int64_t depth, int64_t n, const float *b, int64_t db, float *to) {
  const int64_t whole = n / 16 * 16;
  pair rounded[16 * PAIRS];
  for (int64_t j = 0; j < whole; j += 16, to += 16 * depth)
    for (int64_t k = 0; k < depth; k += 2 * PAIRS) {
      const int64_t pairs = (least(2 * PAIRS, depth - k) + 1) / 2;
      halve_rows(16, least(2 * PAIRS, depth - k), b + j * db + k, db, rounded);
      pair *rows = (pair *)to + 8 * k;
      for (int64_t i = 0; i < 16; i += 8)
        for (int64_t p = 0; p < pairs; p += 8)
          if (p + 8 <= pairs) turn_eight((const float *)(rounded + i * PAIRS + p), PAIRS, (float *)(rows + 16 * p + i), 16);
          else
            for (int64_t q = p; q < pairs; q++)
              for (int64_t l = i; l < i + 8; l++) rows[16 * q + l] = rounded[l * PAIRS + q];
    }
  if (whole < n) pack_turned(depth, n - whole, b + whole * db, db, to), halve(depth, n - whole, to);
}

/* C[high, 16 panels] (+)= A B, A(i, k) = a[i da + k dk]. */
INLINE void halves_block(const int high, const int panels, int64_t pairs, const pair *a, int64_t da, int64_t dk, const pair *b,
                         int64_t apart, float *c, int64_t dc, int64_t columns, int add) {
  __m512 sum[HIGH][2];
  UNROLL for (int i = 0; i < high; i++) sum[i][0] = sum[i][1] = _mm512_setzero_ps();
  for (int64_t k = 0; k < pairs; k++, b += 16) {
    const __m512bh left = (__m512bh)_mm512_loadu_si512(b);
    const __m512bh right = (__m512bh)_mm512_loadu_si512(panels == 2 ? b + apart : b);
    UNROLL for (int i = 0; i < high; i++) {
      const __m512bh one = (__m512bh)_mm512_set1_epi32((int)a[i * da + k * dk]);
      sum[i][0] = _mm512_dpbf16_ps(sum[i][0], one, left);
      if (panels == 2) sum[i][1] = _mm512_dpbf16_ps(sum[i][1], one, right);
    }
  }
  UNROLL for (int i = 0; i < high; i++)
    for (int j = 0; j < panels; j++) {
      const int64_t left = columns - 16 * j;
      const __mmask16 some = left >= 16 ? 0xffff : (1u << left) - 1;
      float *to = c + i * dc + 16 * j;
      const __m512 whole = add ? _mm512_add_ps(sum[i][j], _mm512_maskz_loadu_ps(some, to)) : sum[i][j];
      _mm512_mask_storeu_ps(to, some, whole);
    }
}

/* The same of a panel of 8 columns. */
INLINE void narrow_halves(const int high, int64_t pairs, const pair *a, int64_t da, int64_t dk, const pair *b, float *c, int64_t dc,
                          int64_t columns, int add) {
  __m256 sum[HIGH];
  const __mmask8 some = columns >= 8 ? 0xff : (1u << columns) - 1;
  UNROLL for (int i = 0; i < high; i++) sum[i] = _mm256_setzero_ps();
  for (int64_t k = 0; k < pairs; k++, b += 8) {
    const __m256bh all = (__m256bh)_mm256_loadu_si256((const __m256i *)b);
    UNROLL for (int i = 0; i < high; i++)
      sum[i] = _mm256_dpbf16_ps(sum[i], (__m256bh)_mm256_set1_epi32((int)a[i * da + k * dk]), all);
  }
  UNROLL for (int i = 0; i < high; i++) {
    float *to = c + i * dc;
    _mm256_mask_storeu_ps(to, some, add ? _mm256_add_ps(sum[i], _mm256_maskz_loadu_ps(some, to)) : sum[i]);
  }
}

/* C[m, n] (+)= A B: A(i, k) = a[i step + k dk] at the first row i of a block and `da` on in each that follows, all blocks but the
   last of HIGH rows if `even`; panels of B are `depth` rows apart, and row `first` of their pairs is the first that counts. */
INLINE void halves_product(int64_t m, int64_t n, int64_t pairs, const pair *a, int64_t step, int64_t da, int64_t dk, const int even,
                           const pair *b, int64_t first, int64_t depth, float *c, int64_t dc, int add) {
  for (int64_t j = 0; j < n;) {
    const int64_t left = n - j, wide = left > 24 ? 32 : left > 8 ? 16 : 8, columns = least(left, wide);
    const pair *own = b + first * (wide == 8 ? 8 : 16);
    for (int64_t i = 0, high; i < m; i += high) {
      high = even ? least(HIGH, m - i) : next_high(m - i);
      const pair *from = a + i * step;
      float *to = c + i * dc + j;
      if (even) ask_for(high, wide, to, dc);
#define CALL(h)                                                                                   \
  if (wide == 32) halves_block(h, 2, pairs, from, da, dk, own, 16 * depth, to, dc, columns, add); \
  else if (wide == 16) halves_block(h, 1, pairs, from, da, dk, own, 0, to, dc, columns, add);     \
  else narrow_halves(h, pairs, from, da, dk, own, to, dc, columns, add)
      FOR_HIGH(high, CALL)
#undef CALL
    }
    j += wide, b += wide * depth;
  }
}

static void linear_product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, const float *b, float *c, int64_t dc,
                           int add) {
  pair rounded[FEW * PAIRS];
  for (int64_t i = 0; i < m; i += FEW)
    for (int64_t k = 0; k < depth; k += 2 * PAIRS) {
      const int64_t rows = least(FEW, m - i), some = least(2 * PAIRS, depth - k);
      halve_rows(rows, some, a + i * da + k, da, rounded);
      halves_product(rows, n, (some + 1) / 2, rounded, PAIRS, PAIRS, 1, 0, (const pair *)b, k / 2, depth, c + i * dc, dc, add || k);
    }
}

static void linear_deep(int64_t m, int64_t n, int64_t depth, const float *a, const float *b, float *c, int64_t dc) {
  halves_product(m, n, (depth + 1) / 2, (const pair *)a, depth, 1, HIGH, 1, (const pair *)b, 0, depth, c, dc, 1);
}

#endif
