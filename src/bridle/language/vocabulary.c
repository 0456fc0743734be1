/* What softmax(h W^T + b) says of a target at each of some positions, and the gradient of a loss of it, on a CPU in float32 (products as halves.h has them):

       log p_t = z_t - L,   H = L - sum p z,   KL = sum p (z - y) - L + M        L, M = log sum e^z, log sum e^y  (head_forward,
                                                                                 y the logits of a reference       head_join)
       d/dz = a (1[t] - p) - b p (log p + H) + c p (log p - log q - KL)                                            (head_backward)

   The vocabulary is gone through a few tokens at a time, of which all positions' logits lie in the near caches: exponentials
   and sums are taken there, then logits are put away for the way back, or not at all. Parts of the vocabulary can be gone
   through side by side, each with sums of its own. Numbers lie row by row. Nothing is allocated here. Not-a-number and
   infinities go through to the answers of their position. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "products.h"

#include "halves.h"

#include "../native/functions.h"

#define SOME 192        /* tokens of the vocabulary at a time */
#define LOWEST -1e37f   /* the logits of tokens that are not there */
#define COLUMNS 10      /* sums of a position, as `sums` has them */

/* Largest z; sums of e^(z - largest), of that times z - largest, and times z - y; z of the target; largest y, the sum of
   e^(y - largest), and y of the target; once they are joined, the logarithms of the two sums. */
enum { MOST, TOTAL, WITH_Z, WITH_GAP, AT_TARGET, OTHER_MOST, OTHER_TOTAL, OTHER_AT, LOG_TOTAL, OTHER_LOG };

typedef struct {
  int64_t width;
  const float *hidden; /* [rows, width] */
  const float *weight; /* [vocabulary, width]; NULL: there is no such side */
  const float *bias;   /* [vocabulary] or NULL */
  float *logits;       /* [blocks, rows, SOME] to keep them in, or NULL */
} side;

typedef struct {
  int64_t rows, vocabulary;
  side own, other;
  const int64_t *targets;
  double *sums;                   /* [parts, rows, COLUMNS] */
  float *logp, *entropy;          /* [rows] */
  float *kl, *ref_logp;           /* [rows], or NULL without another side */
  const float *a, *b, *c;         /* [rows] slopes of log p, H and KL, or NULL */
  float *weight_gradient, *bias_gradient; /* added to, or NULL */
} head;

EXPORT int64_t head_source(void) { return SOURCE; }
EXPORT int64_t head_block(void) { return SOME; }
EXPORT int64_t head_columns(void) { return COLUMNS; }

static int64_t blocks_of(const head *h) { return (h->vocabulary + SOME - 1) / SOME; }

static int64_t widest(const head *h) { return h->other.weight && h->other.width > h->own.width ? h->other.width : h->own.width; }

/* Numbers that a part's `work` must hold, there or back. */
EXPORT int64_t head_work(const head *h) {
  return SOME * padded(widest(h)) + 2 * (h->rows + HIGH) * SOME + h->rows * padded(h->own.width) + 64;
}

/* The logits of `count` tokens from `first` on, [rows, SOME]. */
static void logits_of(const side *s, int64_t rows, int64_t first, int64_t count, float *packed, float *z) {
  linear_pack_turned(s->width, count, s->weight + first * s->width, s->width, packed);
  linear_product(rows, count, s->width, s->hidden, s->width, packed, z, SOME, 0);
  for (int64_t i = 0; s->bias && i < rows; i++)
    for (int64_t j = 0; j < count; j++) z[i * SOME + j] += s->bias[first + j];
  for (int64_t i = 0; i < rows; i++)
    for (int64_t j = count; j < padded(count); j++) z[i * SOME + j] = LOWEST;
}

/* Numbers are gone through sixteen at a time, in PARTS registers, and summed in eight sums wherever: so all processors agree. */

/* Weights that are read next, of which each row's share is brought near while rows are gone through. */
typedef struct {
  const float *from;
  int64_t numbers;
} ahead;

INLINE ahead ahead_of(const head *h, int64_t block, int64_t to) {
  const int64_t first = (block + 1) * SOME, width = h->own.width;
  return block + 1 < to ? (ahead){h->own.weight + first * width, least(SOME, h->vocabulary - first) * width} : (ahead){0};
}

INLINE void bring(const ahead *next, int64_t row, int64_t rows) {
  const int64_t from = next->numbers * row / rows / 16 * 16, to = next->numbers * (row + 1) / rows;
  for (int64_t i = from; i < to; i += 16) __builtin_prefetch(next->from + i, 0, 2);
}

INLINE float most_of(int64_t count, const float *z, float most) {
  reg high[PARTS];
  for (int part = 0; part < PARTS; part++) high[part] = (reg){0} + most;
  for (int64_t j = 0; j < count; j += 16)
    for (int part = 0; part < PARTS; part++) {
      const reg one = *(const reg *)(z + j + LANES * part);
      const flags above = one > high[part];
      high[part] = (reg)((above & (flags)one) | (~above & (flags)high[part]));
    }
  for (int part = 0; part < PARTS; part++)
    for (int i = 0; i < LANES; i++) most = high[part][i] > most ? high[part][i] : most;
  return most;
}

INLINE float sum_of_sixteen(const reg *x) {
  const float *all = (const float *)x;
  return sum_of(*(const vec *)all + *(const vec *)(all + 8));
}

/* Sums of e^(x - most), of that times x - most, and times x - y if there are such; x and y are `count` numbers. */
INLINE void sums_of(int64_t count, const float *x, float most, const float *y, float *total, float *with_x, float *with_gap) {
  reg sum[PARTS], with[PARTS], gap[PARTS];
  for (int part = 0; part < PARTS; part++) sum[part] = with[part] = gap[part] = (reg){0};
  for (int64_t j = 0; j < count; j += 16)
    for (int part = 0; part < PARTS; part++) {
      const reg one = *(const reg *)(x + j + LANES * part), e = exps_of(one - most);
      sum[part] += e;
      if (with_x) with[part] += e * (one - most);
      if (y) gap[part] += e * (one - *(const reg *)(y + j + LANES * part));
    }
  *total = sum_of_sixteen(sum);
  if (with_x) *with_x = sum_of_sixteen(with);
  if (y) *with_gap = sum_of_sixteen(gap);
}

/* Take the logits of some tokens up into the sums of all positions. */
static void take_up(int64_t rows, int64_t count, const float *z, const float *y, double *sums, ahead next) {
  for (int64_t i = 0; i < rows; i++, z += SOME, y += y ? SOME : 0, sums += COLUMNS) {
    bring(&next, i, rows);
    const float most = most_of(count, z, (float)sums[MOST]);
    float total, with_z, with_gap = 0.0f;
    sums_of(count, z, most, y, &total, &with_z, &with_gap);
    const double fall = sums[MOST] - most, by = fall == 0.0 ? 1.0 : exp(fall);
    sums[WITH_Z] = by * (sums[WITH_Z] + fall * sums[TOTAL]) + with_z;
    sums[TOTAL] = by * sums[TOTAL] + total;
    sums[WITH_GAP] = by * sums[WITH_GAP] + with_gap;
    sums[MOST] = most;
    if (y) {
      const float theirs = most_of(count, y, (float)sums[OTHER_MOST]);
      float other;
      sums_of(count, y, theirs, NULL, &other, NULL, NULL);
      sums[OTHER_TOTAL] = exp(sums[OTHER_MOST] - theirs) * sums[OTHER_TOTAL] + other;
      sums[OTHER_MOST] = theirs;
    }
  }
}

/* The sums of part number `part`, which has the blocks from ... to - 1 of the vocabulary, and their logits if they are kept. */
EXPORT void head_forward(const head *h, int64_t part, int64_t from, int64_t to, float *work) {
  double *sums = h->sums + part * h->rows * COLUMNS;
  float *packed = work, *z = work + SOME * padded(widest(h)), *y = z + h->rows * SOME;
  for (int64_t i = 0; i < h->rows; i++) {
    for (int j = 0; j < COLUMNS; j++) sums[i * COLUMNS + j] = 0.0;
    sums[i * COLUMNS + MOST] = sums[i * COLUMNS + OTHER_MOST] = LOWEST;
  }
  for (int64_t block = from; block < to; block++) {
    const int64_t first = block * SOME, count = least(SOME, h->vocabulary - first), at = block * h->rows * SOME;
    if (h->own.logits) z = h->own.logits + at;
    if (h->other.logits) y = h->other.logits + at;
    logits_of(&h->own, h->rows, first, count, packed, z);
    if (h->other.weight) logits_of(&h->other, h->rows, first, count, packed, y);
    take_up(h->rows, count, z, h->other.weight ? y : NULL, sums, ahead_of(h, block, to));
    for (int64_t i = 0; i < h->rows; i++) {
      const int64_t target = h->targets[i] - first;
      if (target < 0 || target >= count) continue;
      sums[i * COLUMNS + AT_TARGET] = z[i * SOME + target];
      if (h->other.weight) sums[i * COLUMNS + OTHER_AT] = y[i * SOME + target];
    }
  }
}

/* Join the parts' sums in those of the first, in their order, and answer. */
EXPORT void head_join(const head *h, int64_t parts) {
  for (int64_t i = 0; i < h->rows; i++) {
    double *s = h->sums + i * COLUMNS;
    for (int64_t part = 1; part < parts; part++) {
      const double *t = s + part * h->rows * COLUMNS;
      const double most = t[MOST] > s[MOST] ? t[MOST] : s[MOST], other = t[OTHER_MOST] > s[OTHER_MOST] ? t[OTHER_MOST] : s[OTHER_MOST];
      const double fall = s[MOST] - most, drop = t[MOST] - most, by = exp(fall), with = exp(drop);
      s[WITH_Z] = by * (s[WITH_Z] + fall * s[TOTAL]) + with * (t[WITH_Z] + drop * t[TOTAL]);
      s[TOTAL] = by * s[TOTAL] + with * t[TOTAL];
      s[WITH_GAP] = by * s[WITH_GAP] + with * t[WITH_GAP];
      s[OTHER_TOTAL] = exp(s[OTHER_MOST] - other) * s[OTHER_TOTAL] + exp(t[OTHER_MOST] - other) * t[OTHER_TOTAL];
      s[AT_TARGET] += t[AT_TARGET], s[OTHER_AT] += t[OTHER_AT], s[MOST] = most, s[OTHER_MOST] = other;
    }
    const double log_total = s[LOG_TOTAL] = log(s[TOTAL]);
    if (h->other.weight) s[OTHER_LOG] = log(s[OTHER_TOTAL]);
    h->logp[i] = (float)(s[AT_TARGET] - s[MOST] - log_total);
    h->entropy[i] = (float)(log_total - s[WITH_Z] / s[TOTAL]);
    if (h->ref_logp) h->ref_logp[i] = (float)(s[OTHER_AT] - s[OTHER_MOST] - s[OTHER_LOG]);
    if (h->kl) h->kl[i] = (float)(s[WITH_GAP] / s[TOTAL] - s[MOST] - log_total + s[OTHER_MOST] + s[OTHER_LOG]);
  }
}

/* d loss / dz of some tokens, from `first` on, at all positions. */
static void slopes_of(const head *h, int64_t first, int64_t count, const float *z, const float *y, float *d, ahead next) {
  for (int64_t i = 0; i < h->rows; i++, z += SOME, y += h->c ? SOME : 0, d += SOME) {
    bring(&next, i, h->rows);
    const double *s = h->sums + i * COLUMNS, log_total = s[LOG_TOTAL];
    const float most = (float)s[MOST], by = (float)(1.0 / s[TOTAL]), a = h->a ? h->a[i] : 0.0f, b = h->b ? h->b[i] : 0.0f;
    double always = -a + b * (log_total - h->entropy[i]);
    if (h->c) {
      const float c = h->c[i], theirs = (float)s[OTHER_MOST];
      always += c * (s[OTHER_LOG] - log_total - h->kl[i]);
      for (int64_t j = 0; j < count; j += LANES) {
        const reg one = *(const reg *)(z + j) - most, other = *(const reg *)(y + j) - theirs;
        *(reg *)(d + j) = exps_of(one) * by * ((float)always - b * one + c * (one - other));
      }
    } else
      for (int64_t j = 0; j < count; j += LANES) {
        const reg one = *(const reg *)(z + j) - most;
        *(reg *)(d + j) = exps_of(one) * by * ((float)always - b * one);
      }
    const int64_t target = h->targets[i] - first;
    if (target >= 0 && target < count) d[target] += a;
  }
}

/* From kept logits and joined sums: what the blocks from ... to - 1 of the vocabulary give to d loss / d hidden, which is
   written, [rows, width], and to the gradients of weight and bias, which is added. */
EXPORT void head_backward(const head *h, int64_t from, int64_t to, float *hidden_gradient, float *work) {
  const int64_t rows = h->rows, width = h->own.width;
  float *packed = work, *d = packed + SOME * padded(widest(h)), *turned = d + rows * SOME, *inputs = turned + (rows + HIGH) * SOME;
  if (h->weight_gradient) linear_pack(rows, width, h->own.hidden, width, inputs);
  for (int64_t block = from; block < to; block++) {
    const int64_t first = block * SOME, count = least(SOME, h->vocabulary - first), at = block * rows * SOME;
    slopes_of(h, first, count, h->own.logits + at, h->c ? h->other.logits + at : NULL, d, ahead_of(h, block, to));
    linear_pack(count, width, h->own.weight + first * width, width, packed);
    linear_product(rows, width, count, d, SOME, packed, hidden_gradient, width, block > from);
    if (h->weight_gradient) {
      pack_high(0, rows, rows, count, d, SOME, turned), halve_high(rows, count, turned);
      linear_deep(count, width, rows, turned, inputs, h->weight_gradient + first * width, width);
    }
    for (int64_t i = 0; h->bias_gradient && i < rows; i++)
      for (int64_t j = 0; j < count; j++) h->bias_gradient[first + j] += d[i * SOME + j];
  }
}
