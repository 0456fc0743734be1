/* Causal attention of the heads that read one key head, there and back, in float32: some queries at a time lie side by side in
   vectors, and keys one after another, so that what is done to a query's scores is done in lanes and nothing is computed for
   keys that none of them sees. Heads of eight have functions of their own: a head's numbers fill one vector. Not-a-number and
   infinities go through. */

#include <math.h>

#define SIDE 16  /* queries side by side, of heads wider than eight; of those of eight LANES */
#define EIGHT for (int e = 0; e < 8; e++)
#define LOG2_E 1.44269504088896341f

/* How queries, keys and values of a text lie: a token's `stride` apart; what is read and its slopes `along` apart. */
typedef struct {
  int64_t length, begin, end; /* queries begin ... end - 1 are asked for, of `length` */
  int64_t head, group, stride, along; /* `group` heads side by side read the key head */
  float scale;                                /* factor on the scores */
} sight;

/* Eight rows of eight, turned over: to[k wide + i] = rows[i][k]. */
INLINE void turn_over(const vec *rows, float *to, int64_t wide) {
  vec a[8], b[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = SHUFFLE(rows[i], rows[i + 1], 0, 8, 1, 9, 4, 12, 5, 13);
    a[i + 1] = SHUFFLE(rows[i], rows[i + 1], 2, 10, 3, 11, 6, 14, 7, 15);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      b[i + 2 * j] = SHUFFLE(a[i + j], a[i + j + 2], 0, 1, 8, 9, 4, 5, 12, 13);
      b[i + 2 * j + 1] = SHUFFLE(a[i + j], a[i + j + 2], 2, 3, 10, 11, 6, 7, 14, 15);
    }
  for (int k = 0; k < 4; k++) {
    *(vec *)(to + k * wide) = SHUFFLE(b[k], b[k + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    *(vec *)(to + (k + 4) * wide) = SHUFFLE(b[k], b[k + 4], 4, 5, 6, 7, 12, 13, 14, 15);
  }
}

/* to[k][i] = x[i stride + k] of up to SIDE rows; the rest is 0. */
static void lay_across(int64_t rows, int64_t n, const float *x, int64_t stride, float *to) {
  for (int64_t i = 0; i < SIDE; i += 8)
    for (int64_t k = 0; k < n; k += 8) {
      vec own[8];
      for (int64_t r = 0; r < 8; r++) own[r] = i + r < rows ? *(const vec *)(x + (i + r) * stride + k) : (vec){0};
      turn_over(own, to + k * SIDE + i, SIDE);
    }
}

/* 2^x of what is not above 1, within 2e-7 of it; 0 below -126. Not-a-number comes through. Of eight numbers, and of a register. */
#define TWO_TO(name, type, whole, pattern)                                                                       \
  INLINE type name(type x) {                                                                                     \
    const type shifted = x + 12582912.0f, r = x - (shifted - 12582912.0f); /* 1.5 2^23: round(x) in the last bits */ \
    const type low = r * 6.9314700e-1f + 1.0f, high = r * 9.6715130e-3f + 5.5507336e-2f, square = r * r;         \
    const type p = ((square * 1.3264727e-3f + high) * r + 2.4022242e-1f) * square + low;                         \
    const type y = p * (type)(((pattern)shifted << 23) + 0x3f800000u);                                           \
    return (type)((whole)y & ~(x < (type){0} - 126.0f));                                                         \
  }
TWO_TO(two_to, vec, ints, bits)
TWO_TO(twos_to, reg, flags, patterns)

INLINE reg choose_each(flags where, reg yes, reg no) { return (reg)((where & (flags)yes) | (~where & (flags)no)); }

/* Which queries of a register, of which the first sees `first` keys of a block's diagonal, see key j of it. */
INLINE flags seen_by(int64_t first, int64_t j) {
#if LANES == 16
  const flags lanes = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16};
#else
  const flags lanes = {1, 2, 3, 4, 5, 6, 7, 8};
#endif
  return lanes > (int32_t)(j - first);
}

/* Scores [keys][SIDE] of queries, of which query i sees the first `begin + i + 1`: 2^(scale (s - the largest)), 0 after them;
   the largest, and 1 / the sum. */
static void weigh(int64_t begin, int64_t keys, float scale, float *s, float *largest, float *share) {
  const reg nothing = (reg){0} - INFINITY;
  reg most[PARTS], sum[PARTS];
  for (int i = 0; i < PARTS; i++) most[i] = nothing, sum[i] = (reg){0};
  for (int64_t k = 0; k < keys; k++)
    for (int i = 0; i < PARTS; i++) {
      reg one = *(const reg *)(s + k * SIDE + LANES * i);
      if (k >= begin) one = choose_each(seen_by(LANES * i, k - begin), one, nothing);
      most[i] = choose_each(one > most[i], one, most[i]);
    }
  for (int64_t k = 0; k < begin; k++)
    for (int i = 0; i < PARTS; i++) {
      reg *at = (reg *)(s + k * SIDE + LANES * i);
      sum[i] += *at = twos_to((*at - most[i]) * scale);
    }
  for (int64_t k = begin; k < keys; k++)
    for (int i = 0; i < PARTS; i++) {
      reg *at = (reg *)(s + k * SIDE + LANES * i);
      sum[i] += *at = (reg)(seen_by(LANES * i, k - begin) & (flags)twos_to((*at - most[i]) * scale));
    }
  for (int i = 0; i < PARTS; i++) *(reg *)(largest + LANES * i) = most[i], *(reg *)(share + LANES * i) = 1.0f / sum[i];
}

/* w = 2^(scale (s - largest)) share in place of s, and w o (d - through) of d; 0 after what query i sees. */
static void weigh_back(int64_t begin, int64_t keys, float scale, const float *largest, const float *share,
                       const float *through, float *s, float *d) {
  reg most[PARTS], part[PARTS], less[PARTS];
  for (int i = 0; i < PARTS; i++) {
    most[i] = *(const reg *)(largest + LANES * i), part[i] = *(const reg *)(share + LANES * i);
    less[i] = *(const reg *)(through + LANES * i);
  }
  for (int64_t k = 0; k < begin; k++)
    for (int i = 0; i < PARTS; i++) {
      reg *at = (reg *)(s + k * SIDE + LANES * i), *slope = (reg *)(d + k * SIDE + LANES * i);
      const reg w = twos_to((*at - most[i]) * scale) * part[i];
      *at = w;
      *slope = w * (*slope - less[i]);
    }
  for (int64_t k = begin; k < keys; k++)
    for (int i = 0; i < PARTS; i++) {
      reg *at = (reg *)(s + k * SIDE + LANES * i), *slope = (reg *)(d + k * SIDE + LANES * i);
      const flags seen = seen_by(LANES * i, k - begin);
      const reg w = twos_to((*at - most[i]) * scale) * part[i];
      *at = (reg)(seen & (flags)w);
      *slope = (reg)(seen & (flags)(w * (*slope - less[i])));
    }
}

/* C[rows, n] = A^T B, A [depth][SIDE], B packed with `tall` rows: eight of C at a time where panels are eight wide. */
static void gather(int64_t rows, int64_t n, int64_t depth, const float *a, const float *b, int64_t tall, float *c,
                   int64_t dc) {
  for (int64_t j = 0; j < n; j += 16, b += 16 * tall)
    for (int64_t i = 0; i < rows; i += 8)
      if (n - j > 8) panel(1, least(8, rows - i), depth, a + i, 1, SIDE, b, 0, c + i * dc + j, dc, 16, 0);
      else if (rows - i >= 8) narrow_block(8, depth, a + i, 1, SIDE, b, c + i * dc + j, dc, 8, 0);
      else narrow_panel(rows - i, depth, a + i, 1, SIDE, b, c + i * dc + j, dc, 8, 0);
}

/* Row i times by[i]. */
static void stretch(int64_t rows, int64_t n, const float *by, float *x, int64_t stride) {
  for (int64_t i = 0; i < rows; i++, x += stride)
    for (int64_t j = 0; j < n; j += 8) *(vec *)(x + j) *= by[i];
}

/* sum over k of a[k][i] b[k][i]. */
static void dots(int64_t n, const float *a, const float *b, float *to) {
  for (int i = 0; i < SIDE; i += LANES) {
    reg sum = {0};
    for (int64_t k = 0; k < n; k++) sum += *(const reg *)(a + k * SIDE + i) * *(const reg *)(b + k * SIDE + i);
    *(reg *)(to + i) = sum;
  }
}

/* ---- the same of heads of eight: a register of queries at a time, what is summed over them or over keys in registers */

/* x_0 y[0] + ... + x_7 y[7], in two sums so that neither waits long. */
INLINE reg product_of_eight(const reg *x, const float *y) {
  reg one = x[0] * y[0], other = x[1] * y[1];
  for (int e = 2; e < 8; e += 2) one += x[e] * y[e], other += x[e + 1] * y[e + 1];
  return one + other;
}

/* Rows of eight, of which `rows` are there, the rest 0, times `by` and laid across: to[e LANES + i] = x[i stride + e]. */
INLINE void across(int64_t rows, float by, const float *x, int64_t stride, float *to) {
  for (int64_t i = 0; i < LANES; i += 8) {
    vec own[8];
    EIGHT own[e] = i + e < rows ? *(const vec *)(x + (i + e) * stride) : (vec){0};
    EIGHT own[e] *= by;
    turn_over(own, to + i, LANES);
  }
}

/* Sums [8][LANES], as rows of eight. */
INLINE void along(int64_t rows, const reg *sums, float *to, int64_t stride) {
  for (int64_t i = 0; i < rows; i += 8) {
    vec own[8], turned[8];
    EIGHT own[e] = *(const vec *)((const float *)(sums + e) + i);
    turn_over(own, (float *)turned, 8);
    for (int64_t e = 0; e < least(8, rows - i); e++) *(vec *)(to + (i + e) * stride) = turned[e];
  }
}

/* Scores [keys][LANES] of queries laid across, of which query i sees the first `begin + i + 1`, -inf after them; the largest. */
static void narrow_scores(int64_t begin, int64_t keys, const float *queries, const float *k, float *s, float *largest) {
  const reg nothing = (reg){0} - INFINITY;
  reg q[8], most = nothing, other = nothing; /* two, so that a comparison need not wait for the one before */
  EIGHT q[e] = *(const reg *)(queries + LANES * e);
  int64_t j = 0;
  for (; j + 2 <= begin; j += 2, k += 16, s += 2 * LANES) {
    const reg one = product_of_eight(q, k), next = product_of_eight(q, k + 8);
    *(reg *)s = one, *(reg *)(s + LANES) = next;
    most = choose_each(one > most, one, most), other = choose_each(next > other, next, other);
  }
  for (; j < keys; j++, k += 8, s += LANES) {
    const reg one = product_of_eight(q, k), seen = j < begin ? one : choose_each(seen_by(0, j - begin), one, nothing);
    *(reg *)s = seen;
    most = choose_each(seen > most, seen, most);
  }
  *(reg *)largest = choose_each(other > most, other, most);
}

/* Of scores: what is read of `v`, as rows, and 1 / the sum of the weights. */
static void narrow_read(int64_t rows, int64_t keys, const float *s, const float *largest, const float *v, float *share, float *read,
                        int64_t apart) {
  const reg most = *(const reg *)largest;
  reg all = {0}, sum[8];
  EIGHT sum[e] = (reg){0};
  for (int64_t j = 0; j < keys; j++, s += LANES, v += 8) {
    const reg w = twos_to(*(const reg *)s - most);
    all += w;
    EIGHT sum[e] += w * v[e];
  }
  all = 1.0f / all;
  EIGHT sum[e] *= all;
  along(rows, sum, read, apart);
  *(reg *)share = all;
}

#if LANES == 16
#define FIRST_PAIRS 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define OTHER_PAIRS 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#else
#define FIRST_PAIRS 0, 8, 1, 9, 2, 10, 3, 11
#define OTHER_PAIRS 4, 12, 5, 13, 6, 14, 7, 15
#endif
#ifdef __clang__
#define PAIRED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define PAIRED(a, b, ...) __builtin_shuffle(a, b, (flags){__VA_ARGS__})
#endif

/* The weights again, 0 after what query i sees, each 2 LANES after the one before. */
static void narrow_weights(int64_t begin, int64_t keys, const float *queries, const float *k, const float *largest,
                           const float *share, float *w) {
  const reg most = *(const reg *)largest, part = *(const reg *)share;
  reg q[8];
  EIGHT q[e] = *(const reg *)(queries + LANES * e);
  for (int64_t j = 0; j < keys; j++, k += 8, w += 2 * LANES) {
    const reg one = twos_to(product_of_eight(q, k) - most) * part;
    *(reg *)w = j < begin ? one : (reg)(seen_by(0, j - begin) & (flags)one);
  }
}

/* d = w o (slope v^T - through), as pairs (d, w) in the place of weights w; of d the rows of d^T k, times `by`. */
static void narrow_slopes(int64_t keys, const float *slopes, const float *k, const float *v, const float *through, float *pairs,
                          int64_t rows, float by, float *to, int64_t stride) {
  const reg less = *(const reg *)through;
  reg own[8], sum[8];
  EIGHT own[e] = *(const reg *)(slopes + LANES * e);
  EIGHT sum[e] = (reg){0};
  for (int64_t j = 0; j < keys; j++, k += 8, v += 8, pairs += 2 * LANES) {
    const reg w = *(const reg *)pairs, d = w * (product_of_eight(own, v) - less);
    *(reg *)pairs = PAIRED(d, w, FIRST_PAIRS), *(reg *)(pairs + LANES) = PAIRED(d, w, OTHER_PAIRS);
    EIGHT sum[e] += d * k[e];
  }
  EIGHT sum[e] *= by;
  along(rows, sum, to, stride);
}

/* Rows of eight of x and y, as pairs. */
INLINE void pair_up(const vec x, const vec y, float *to) {
  *(vec *)to = SHUFFLE(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
  *(vec *)(to + 8) = SHUFFLE(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
}

/* A pair of numbers, over and over. */
INLINE reg repeated(const float *pair) {
  typedef int64_t twos __attribute__((vector_size(4 * LANES)));
  int64_t both;
  memcpy(&both, pair, sizeof both);
  return (reg)((twos){0} | both);
}

/* to[j] += sum over up to eight queries of pairs[j][i] (x_i, y_i), in pairs. */
static void narrow_spread(int64_t rows, int64_t keys, const float *pairs, const float *x, int64_t dx, const float *y, int64_t dy,
                          float *to) {
  float own[8 * 16];
  for (int64_t e = 0; e < 8; e++)
    pair_up(e < rows ? *(const vec *)(x + e * dx) : (vec){0}, e < rows ? *(const vec *)(y + e * dy) : (vec){0}, own + 16 * e);
  reg from[8][PARTS];
  EIGHT for (int i = 0; i < PARTS; i++) from[e][i] = *(const reg *)(own + 16 * e + LANES * i);
  for (int64_t j = 0; j < keys; j++, pairs += 2 * LANES, to += 16) {
    reg by[8];
    EIGHT by[e] = repeated(pairs + 2 * e);
    for (int i = 0; i < PARTS; i++) {
      reg one = *(const reg *)(to + LANES * i), other = by[1] * from[1][i];
      for (int e = 0; e < 8; e += 2) one += by[e] * from[e][i];
      for (int e = 3; e < 8; e += 2) other += by[e] * from[e][i];
      *(reg *)(to + LANES * i) = one + other;
    }
  }
}

/* Slopes laid across, and of each its product with what was read. */
static void narrow_through(int64_t rows, const float *slope, const float *read, int64_t apart, float *to, float *through) {
  float other[8 * LANES];
  reg sum = {0};
  across(rows, 1.0f, slope, apart, to);
  across(rows, 1.0f, read, apart, other);
  EIGHT sum += *(const reg *)(to + LANES * e) * *(const reg *)(other + LANES * e);
  *(reg *)through = sum;
}

/* Rows of `pairs` to two of their own: the first of each times `by` added to x, the second to y. */
static void add_pairs(int64_t rows, float by, const float *pairs, float *x, float *y, int64_t stride) {
  for (int64_t i = 0; i < rows; i++, pairs += 16, x += stride, y += stride) {
    const vec a = *(const vec *)pairs, b = *(const vec *)(pairs + 8);
    *(vec *)x += SHUFFLE(a, b, 0, 2, 4, 6, 8, 10, 12, 14) * by;
    *(vec *)y += SHUFFLE(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  }
}

static void narrow_attend(const sight *l, const float *q, const float *k, const float *v, float *read, float *sums, float *work) {
  const int64_t length = l->length, end = l->end, group = l->group, stride = l->stride, apart = l->along;
  float *keys = work, *values = keys + 8 * length, *scores = values + 8 * length, queries[8 * LANES], most[LANES], share[LANES];
  pack(end, 8, k, stride, keys);
  pack(end, 8, v, stride, values);
  for (int64_t h = 0; h < group; h++, q += 8, read += 8, sums += 2 * length)
    for (int64_t begin = l->begin; begin < end; begin += LANES) {
      const int64_t rows = least(LANES, end - begin), stop = begin + rows;
      across(rows, l->scale * LOG2_E, q + begin * stride, stride, queries);
      narrow_scores(begin, stop, queries, keys, scores, most);
      narrow_read(rows, stop, scores, most, values, share, read + begin * apart, apart);
      memcpy(sums + begin, most, sizeof(float) * rows);
      memcpy(sums + length + begin, share, sizeof(float) * rows);
    }
}

static void narrow_back(const sight *l, const float *q, const float *k, const float *v, const float *read, const float *slope,
                        const float *sums, float *dq, float *dk, float *dv, float *work) {
  const int64_t length = l->length, end = l->end, group = l->group, stride = l->stride, apart = l->along;
  float *keys = work, *values = keys + 8 * length, *both = values + 8 * length, *pairs = both + 16 * length;
  float queries[8 * LANES], slopes[8 * LANES], most[LANES], share[LANES], through[LANES];
  pack(end, 8, k, stride, keys);
  pack(end, 8, v, stride, values);
  memset(both, 0, sizeof(float) * 16 * end); /* slopes of keys and values, in pairs */
  for (int64_t h = 0; h < group; h++, q += 8, dq += 8, read += 8, slope += 8, sums += 2 * length)
    for (int64_t begin = l->begin; begin < end; begin += LANES) {
      const int64_t rows = least(LANES, end - begin), stop = begin + rows;
      const float *from = q + begin * stride, *down = slope + begin * apart;
      memset(most, 0, sizeof most), memset(share, 0, sizeof share); /* of queries that are not there */
      memcpy(most, sums + begin, sizeof(float) * rows);
      memcpy(share, sums + length + begin, sizeof(float) * rows);
      across(rows, l->scale * LOG2_E, from, stride, queries);
      narrow_through(rows, down, read + begin * apart, apart, slopes, through);
      narrow_weights(begin, stop, queries, keys, most, share, pairs);
      narrow_slopes(stop, slopes, keys, values, through, pairs, rows, l->scale, dq + begin * stride, stride);
      for (int64_t i = 0; i < rows; i += 8) {
        const int64_t some = least(8, rows - i);
        narrow_spread(some, begin + i + some, pairs + 2 * i, from + i * stride, stride, down + i * apart, apart, both);
      }
    }
  add_pairs(end, l->scale, both, dk, dv, stride);
}

/* Room that attention needs, there or back. */
static int64_t attention_room(int64_t length, int64_t head) { return length * (head + 4 * SIDE) + 5 * SIDE * head + 64; }

/* softmax(scale q k^T) v of `l->heads / l->key_heads` heads; q, k and v of one text lie among its qkv. `sums` gets, for each
   head, each query's largest score, and 1 / the sum of its weights beside that. */
static void attend(const sight *l, const float *q, const float *k, const float *v, float *read, float *sums, float *work) {
  if (l->head == 8) {
    narrow_attend(l, q, k, v, read, sums, work);
    return;
  }
  const int64_t length = l->length, end = l->end, head = l->head, group = l->group, stride = l->stride, along = l->along;
  float *values = work, *queries = values + length * head, *scores = queries + SIDE * head, most[SIDE], share[SIDE];
  pack(end, head, v, stride, values);
  for (int64_t h = 0; h < group; h++, q += head, read += head, sums += 2 * length)
    for (int64_t begin = l->begin; begin < end; begin += SIDE) {
      const int64_t rows = least(SIDE, end - begin), stop = begin + rows;
      lay_across(rows, head, q + begin * stride, stride, queries);
      product(stop, SIDE, head, k, stride, 1, queries, head, scores, SIDE, 0);
      weigh(begin, stop, l->scale * LOG2_E, scores, most, share);
      memcpy(sums + begin, most, sizeof(float) * rows);
      memcpy(sums + length + begin, share, sizeof(float) * rows);
      gather(rows, head, stop, scores, values, end, read + begin * along, along);
      stretch(rows, head, share, read + begin * along, along);
    }
}

/* With w the weights and r what was read: dv = w^T dr, ds = w o (dr v^T - rowsum(dr o r)), dq = ds k scale, dk = ds^T q scale
   (Dao et al. 2022, appendix B.2). The slopes of keys and values are added to. */
static void attend_back(const sight *l, const float *q, const float *k, const float *v, const float *read, const float *slope,
                        const float *sums, float *dq, float *dk, float *dv, float *work) {
  if (l->head == 8) {
    narrow_back(l, q, k, v, read, slope, sums, dq, dk, dv, work);
    return;
  }
  const int64_t length = l->length, end = l->end, head = l->head, group = l->group, stride = l->stride, along = l->along;
  float *keys = work, *queries = keys + length * head, *slopes = queries + SIDE * head, *own = slopes + SIDE * head;
  float *scores = own + 2 * SIDE * head, *d = scores + SIDE * length, most[SIDE] = {0}, share[SIDE] = {0}, through[SIDE], scales[SIDE];
  for (int i = 0; i < SIDE; i++) scales[i] = l->scale;
  pack(end, head, k, stride, keys);
  for (int64_t h = 0; h < group; h++, q += head, dq += head, read += head, slope += head, sums += 2 * length)
    for (int64_t begin = l->begin; begin < end; begin += SIDE) {
      const int64_t rows = least(SIDE, end - begin), stop = begin + rows;
      const float *from = q + begin * stride, *down = slope + begin * along;
      lay_across(rows, head, read + begin * along, along, queries);
      lay_across(rows, head, down, along, slopes);
      dots(head, slopes, queries, through);
      lay_across(rows, head, from, stride, queries);
      memcpy(most, sums + begin, sizeof(float) * rows);
      memcpy(share, sums + length + begin, sizeof(float) * rows);
      product(stop, SIDE, head, k, stride, 1, queries, head, scores, SIDE, 0);
      product(stop, SIDE, head, v, stride, 1, slopes, head, d, SIDE, 0);
      weigh_back(begin, stop, l->scale * LOG2_E, most, share, through, scores, d);
      gather(rows, head, stop, d, keys, end, dq + begin * stride, stride);
      stretch(rows, head, scales, dq + begin * stride, stride);
      pack(rows, head, from, stride, own);
      stretch(1, rows * head, scales, own, 0);
      product(stop, head, rows, d, SIDE, 1, own, rows, dk, stride, 1);
      pack(rows, head, down, along, own);
      product(stop, head, rows, scores, SIDE, 1, own, rows, dv, stride, 1);
    }
}
