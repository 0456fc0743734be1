/* A decoder layer of the kind most language models have, there and back, on a CPU in float32,
   products of weights as halves.h has them:

       n = x rsqrt(mean x^2 + eps) w,   q, k, v = n W^T + b, q and k turned by their positions,
       h = x + (causal attention of q, k, v) W_o^T,
       y = h + (silu(m W_g^T) o m W_u^T) W_d^T,   m = the same norm of h                     (layer_forward)
       and the chain rule of it, the weights' gradients added to what is there                (layer_backward)

   for what is asked for of each text: y of some of its tokens, one after another, which read what is before them. Nothing is
   computed of tokens after those; y of other tokens is not written, and their slopes are not read.

   A text at a time, a few tokens of it at a time, so that what is between x and y stays in the nearest caches. Numbers
   lie row by row. Weights are packed into panels of 16 columns, [depth][16] each, once a call. Nothing is allocated here.
   Not-a-number and infinities go through to y: nothing is compared in a way that would drop them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "products.h"

#include "halves.h"

#include "../native/functions.h"

#include "attention.h"

#include "layer.h"

#define DEEP 192 /* tokens at least, where there are as many, that a weight's gradient is added to for at a time */

/* ---- what looks at one token alone; widths are multiples of 8 */

/* d += the norm's pull-back of `slope`: with s = rsqrt(mean x^2 + eps), s w o slope - x s^3 mean(x o w o slope). */
static void norm_back(int64_t rows, int64_t width, float eps, const float *x, const float *w, const float *slope, float *d,
                      float *restrict w_gradient) {
  for (int64_t i = 0; i < rows; i++, x += width, slope += width, d += width) {
    vec squares = {0}, along = {0};
    for (int64_t j = 0; j < width; j += 8) {
      const vec one = *(const vec *)(x + j);
      squares += one * one;
      along += one * (*(const vec *)(w + j) * *(const vec *)(slope + j));
    }
    const float by = 1.0f / sqrtf(sum_of(squares) / (float)width + eps);
    const float back = sum_of(along) * by * by * by / (float)width;
    for (int64_t j = 0; j < width; j += 8) {
      const vec own = *(const vec *)(slope + j), one = *(const vec *)(x + j);
      *(vec *)(d + j) += own * *(const vec *)(w + j) * by - one * back;
      if (w_gradient) *(vec *)(w_gradient + j) += own * one * by;
    }
  }
}

/* The norm of the n tokens at `places` alone, and back: slopes of those tokens are added to. */
EXPORT void norm_at(int64_t n, int64_t width, float eps, const float *x, const int64_t *places, const float *w, float *to) {
  for (int64_t i = 0; i < n; i++) norm(1, width, eps, x + places[i] * width, w, to + i * width);
}

EXPORT void norm_at_back(int64_t n, int64_t width, float eps, const float *x, const int64_t *places, const float *w,
                         const float *slope, float *d, float *w_gradient) {
  for (int64_t i = 0; i < n; i++)
    norm_back(1, width, eps, x + places[i] * width, w, slope + i * width, d + places[i] * width, w_gradient);
}

/* From d = the slope of act: act again, and the slopes of g and u. */
#define GATE_BACK(type, logistic)                                                                                      \
  {                                                                                                                    \
    const type g = *(const type *)(gate_up + j), u = *(const type *)(gate_up + hidden + j), own = *(const type *)(d + j); \
    const type s = logistic(g), open = g * s;                                                                          \
    *(type *)(act + j) = open * u;                                                                                     \
    *(type *)(slope + j) = own * u * (s + open * (1.0f - s));                                                          \
    *(type *)(slope + hidden + j) = own * open;                                                                        \
  }
static void gate_back(int64_t rows, int64_t hidden, const float *gate_up, const float *d, float *act, float *slope) {
  for (int64_t i = 0; i < rows; i++, gate_up += 2 * hidden, act += hidden, d += hidden, slope += 2 * hidden) {
    int64_t j = 0;
    for (; j + LANES <= hidden; j += LANES) GATE_BACK(reg, sigmoids)
    for (; j < hidden; j += 8) GATE_BACK(vec, sigmoid)
  }
}

static void sum_rows(int64_t rows, int64_t n, const float *x, int64_t stride, float *restrict sum) {
  if (sum)
    for (int64_t i = 0; i < rows; i++, x += stride)
      for (int64_t j = 0; j < n; j++) sum[j] += x[j];
}

/* ---- the layer */

INLINE int64_t end_of(const layer *l, int64_t text) { return l->ends ? l->ends[text] : l->length; }
INLINE int64_t begin_of(const layer *l, int64_t text) { return l->begins ? least(l->begins[text], end_of(l, text)) : 0; }

/* How attention finds the heads of a text. */
static sight sight_of(const layer *l, int64_t text) {
  const int64_t queries = l->heads * l->head, keys = l->key_heads * l->head;
  return (sight){.length = l->length, .begin = begin_of(l, text), .end = end_of(l, text), .head = l->head,
                 .group = l->heads / l->key_heads, .stride = queries + 2 * keys, .along = queries, .scale = l->scale};
}

/* Texts at a time on the way back, and tokens of them at a time to learn from: DEEP or few more, less than twice as many. */
static int64_t together(const layer *l) { return l->length < DEEP ? DEEP / l->length : 1; }
static int64_t deepest(const layer *l) {
  const int64_t rows = least(together(l), l->texts) * l->length;
  return rows < 2 * DEEP ? rows : (rows + rows / DEEP - 1) / (rows / DEEP);
}

/* Numbers that `work` must hold, there or back. */
EXPORT int64_t layer_work(const layer *l) {
  const int64_t queries = l->heads * l->head, keys = l->key_heads * l->head, hidden = padded(l->hidden), width = padded(l->width);
  const int64_t weights = width * (2 * padded(queries) + 2 * padded(keys) + 3 * hidden);
  const int64_t tile = TILE * (2 * width + 4 * hidden + padded(queries));
  const int64_t text = least(together(l), l->texts) * l->length * (padded(queries) + padded(queries + 2 * keys));
  const int64_t slopes = 2 * (width + hidden), turned = queries + 2 * keys;
  const int64_t deep = deepest(l) * ((slopes > turned ? slopes : turned) + 32 + hidden + width + padded(queries));
  return weights + tile + text + deep + attention_room(l->length, l->head) + 1024;
}

/* The checksum of this file and of its headers, as who compiled it says. */
EXPORT int64_t layers_source(void) { return SOURCE; }

/* exp of n numbers, a multiple of 8, as the functions above take it. */
static void exponential(int64_t n, const float *x, float *y) {
  for (int64_t i = 0; i < n; i += 8) *(vec *)(y + i) = exp_of(*(const vec *)(x + i));
}
EXPORT void layer_exponential(int64_t n, const float *x, float *y) { exponential(n, x, y); }

static panels pack_forth(const layer *l, float **room) {
  panels p = lay_out(l, room);
  p.n = take(room, TILE * l->width), p.act = take(room, TILE * even(l->hidden));
  pack_weights(l, &p);
  return p;
}

EXPORT void layer_forward(const layer *l) {
  const int64_t length = l->length, width = l->width, queries = l->heads * l->head, keys = l->key_heads * l->head;
  const int64_t stride = queries + 2 * keys, hidden = even(l->hidden), group = l->heads / l->key_heads;
  float *room = l->work;
  const panels p = pack_forth(l, &room);
  for (int64_t text = 0; text < l->texts; text++) {
    const sight s = sight_of(l, text);
    const int64_t first = text * length, kept = l->keep ? first : 0;
    float *qkv = l->qkv + kept * stride, *read = l->read + kept * queries;
    for (int64_t i = 0; i < s.end; i += TILE) {
      const int64_t rows = least(TILE, s.end - i), at = text * l->turning + i * l->head;
      project(l, &p, rows, l->x + (first + i) * width, qkv + i * stride);
      turn_forth(rows, l->heads + l->key_heads, l->head, l->cosine + at, l->sine + at, qkv + i * stride, stride);
    }
    for (int64_t h = 0; h < l->key_heads; h++)
      attend(&s, qkv + h * group * l->head, qkv + queries + h * l->head, qkv + queries + keys + h * l->head,
             read + h * group * l->head, l->sums + 2 * ((l->keep ? text : 0) * l->heads + h * group) * length, room);
    for (int64_t i = s.begin; i < s.end; i += TILE)
      finish(l, &p, least(TILE, s.end - i), l->x + (first + i) * width, read + i * queries, l->h + (kept + i) * width,
             l->gate_up + (kept + (l->keep ? i : 0)) * 2 * hidden, l->y + (first + i) * width);
  }
}

/* ---- back */

/* The weights, packed: of `slope W`, what one tile needs beside them, and slopes and inputs of all tokens that are learnt
   from at a time, packed too. */
typedef struct {
  float *query, *key, *value, *out, *gate, *up, *down, *n, *act, *d, *both, *slopes, *inputs;
} panels_back;

static panels_back pack_back(const layer *l, float **room) {
  const int64_t width = l->width, queries = l->heads * l->head, keys = l->key_heads * l->head, hidden = even(l->hidden);
  const int64_t slopes = 2 * (width + hidden), turned = queries + 2 * keys, deep = deepest(l);
  panels_back p;
  p.query = take(room, width * padded(queries)), p.key = take(room, width * padded(keys));
  p.value = take(room, width * padded(keys)), p.out = take(room, queries * padded(width));
  p.gate = take(room, width * padded(hidden)), p.up = take(room, width * padded(hidden));
  p.down = take(room, hidden * padded(width));
  p.n = take(room, TILE * width), p.act = take(room, TILE * hidden);
  p.d = take(room, TILE * (hidden > width ? hidden : width)), p.both = take(room, TILE * 2 * hidden);
  p.slopes = take(room, deep * ((slopes > turned ? slopes : turned) + 4 * HIGH));
  p.inputs = take(room, deep * (padded(hidden) + padded(width) + padded(queries)));
  linear_pack(queries, width, l->query.weight, width, p.query);
  linear_pack(keys, width, l->key.weight, width, p.key);
  linear_pack(keys, width, l->value.weight, width, p.value);
  linear_pack(width, queries, l->out.weight, queries, p.out);
  linear_pack(l->hidden, width, l->gate.weight, width, p.gate);
  linear_pack(l->hidden, width, l->up.weight, width, p.up);
  linear_pack(width, l->hidden, l->down.weight, l->hidden, p.down);
  return p;
}

/* Put a tile's slopes of x W^T down as rows at ... of `tall`, to learn from; the bias's gradient += their sum. */
static void put_down(const linear *w, int64_t at, int64_t tall, int64_t rows, int64_t out, const float *slope, int64_t ds, float *to) {
  if (w->weight_gradient) pack_high(at, tall, rows, out, slope, ds, to);
  sum_rows(rows, out, slope, ds, w->bias_gradient);
}

/* The weight's gradient += slope^T x of what was put down, x halved. */
static void learn(const linear *w, int64_t rows, int64_t in, int64_t out, float *slope, const float *x) {
  if (!w->weight_gradient) return;
  halve_high(rows, out, slope);
  linear_deep(out, in, rows, slope, x, w->weight_gradient, in);
}

/* Tokens that lie one after another, and which of those that are learnt from at a time the first of them is. */
typedef struct {
  int64_t first, rows, at;
} tile;

/* Tiles of at most `most` tokens in all of some texts, after the first `passed`: of those that y is asked of, or with all before
   them. One reaches from text to text where no token between is left out. */
static int64_t tiles_of(const layer *l, int64_t text, int64_t texts, int all, int64_t passed, int64_t most, tile *to) {
  int64_t count = 0, at = 0;
  for (int64_t t = text; t < text + texts && at < most; t++) {
    int64_t i = t * l->length + (all ? 0 : begin_of(l, t));
    const int64_t stop = t * l->length + end_of(l, t), less = least(passed, stop - i);
    i += less, passed -= less;
    while (i < stop && at < most) {
      tile *last = to + count - 1;
      const int joins = count && last->first + last->rows == i && last->rows < TILE;
      const int64_t rows = least(least(stop - i, most - at), TILE - (joins ? last->rows : 0));
      if (joins) last->rows += rows;
      else to[count++] = (tile){.first = i, .rows = rows, .at = at};
      i += rows, at += rows;
    }
  }
  return count;
}

/* Of the tokens of some tiles: slopes of y to slopes of h, in the place of those of x, and of what was read, [token from `origin`
   on, queries]. */
static void finish_back(const layer *l, const panels_back *p, const tile *tiles, int64_t count, int64_t origin, const float *slope,
                        float *x_slope, float *read_slope) {
  const int64_t width = l->width, queries = l->heads * l->head, hidden = even(l->hidden);
  const int64_t rows = tiles[count - 1].at + tiles[count - 1].rows;
  float *of_y = p->slopes, *of_h = of_y + rows * (width + HIGH), *of_gate = of_h + rows * (width + HIGH);
  float *of_up = of_gate + rows * (hidden + HIGH), *act = p->inputs, *read = act + rows * padded(hidden);
  float *n = read + rows * padded(queries);
  for (const tile *t = tiles; t < tiles + count; t++) {
    const int64_t some = t->rows, i = t->at;
    const float *h = l->h + t->first * width, *from = slope + t->first * width;
    float *dh = x_slope + t->first * width;
    linear_product(some, hidden, width, from, width, p->down, p->d, hidden, 0);
    gate_back(some, hidden, l->gate_up + t->first * 2 * hidden, p->d, p->act, p->both);
    norm(some, width, l->second_eps, h, l->second_norm, p->n);
    put_down(&l->down, i, rows, some, width, from, width, of_y);
    put_down(&l->gate, i, rows, some, l->hidden, p->both, 2 * hidden, of_gate);
    put_down(&l->up, i, rows, some, l->hidden, p->both + hidden, 2 * hidden, of_up);
    linear_product(some, width, l->hidden, p->both, 2 * hidden, p->gate, p->d, width, 0);
    linear_product(some, width, l->hidden, p->both + hidden, 2 * hidden, p->up, p->d, width, 1);
    memcpy(dh, from, sizeof(float) * some * width);
    norm_back(some, width, l->second_eps, h, l->second_norm, p->d, dh, l->second_gradient);
    linear_product(some, queries, width, dh, width, p->out, read_slope + (t->first - origin) * queries, queries, 0);
    put_down(&l->out, i, rows, some, width, dh, width, of_h);
    pack_at(i, rows, some, l->hidden, p->act, hidden, act);
    pack_at(i, rows, some, width, p->n, width, n);
    pack_at(i, rows, some, queries, l->read + t->first * queries, queries, read);
  }
  halve(rows, l->hidden, act), halve(rows, width, n), halve(rows, queries, read);
  learn(&l->down, rows, l->hidden, width, of_y, act);
  learn(&l->gate, rows, width, l->hidden, of_gate, n);
  learn(&l->up, rows, width, l->hidden, of_up, n);
  learn(&l->out, rows, queries, width, of_h, read);
}

/* Of the tokens of some tiles: slopes of queries, keys and values, turned back, [token from `origin` on, stride], to what they
   add to slopes of x. */
static void project_back(const layer *l, const panels_back *p, const tile *tiles, int64_t count, int64_t origin, const float *slope,
                         float *x_slope) {
  const int64_t width = l->width, queries = l->heads * l->head, keys = l->key_heads * l->head, stride = queries + 2 * keys;
  const int64_t rows = tiles[count - 1].at + tiles[count - 1].rows;
  float *of_query = p->slopes, *of_key = of_query + rows * (queries + HIGH), *of_value = of_key + rows * (keys + HIGH);
  for (const tile *t = tiles; t < tiles + count; t++) {
    const int64_t some = t->rows, i = t->at;
    const float *x = l->x + t->first * width, *own = slope + (t->first - origin) * stride;
    norm(some, width, l->first_eps, x, l->first_norm, p->n);
    put_down(&l->query, i, rows, some, queries, own, stride, of_query);
    put_down(&l->key, i, rows, some, keys, own + queries, stride, of_key);
    put_down(&l->value, i, rows, some, keys, own + queries + keys, stride, of_value);
    pack_at(i, rows, some, width, p->n, width, p->inputs);
    linear_product(some, width, queries, own, stride, p->query, p->d, width, 0);
    linear_product(some, width, keys, own + queries, stride, p->key, p->d, width, 1);
    linear_product(some, width, keys, own + queries + keys, stride, p->value, p->d, width, 1);
    norm_back(some, width, l->first_eps, x, l->first_norm, p->d, x_slope + t->first * width, l->first_gradient);
  }
  halve(rows, width, p->inputs);
  learn(&l->query, rows, width, queries, of_query, p->inputs);
  learn(&l->key, rows, width, keys, of_key, p->inputs);
  learn(&l->value, rows, width, keys, of_value, p->inputs);
}

/* Of one text: slopes of what was read, [length, queries], to those of queries, keys and values, [length, stride], turned back. */
static void attention_back(const layer *l, int64_t text, const float *read_slope, float *slope, float *room) {
  const int64_t queries = l->heads * l->head, keys = l->key_heads * l->head, stride = queries + 2 * keys;
  const int64_t group = l->heads / l->key_heads, first = text * l->length, at = text * l->turning;
  const sight s = sight_of(l, text);
  const float *qkv = l->qkv + first * stride, *read = l->read + first * queries;
  for (int64_t i = 0; i < s.end; i++) {
    const int64_t unread = i < s.begin ? 0 : queries; /* slopes of queries that are asked for are written, the others added to */
    memset(slope + i * stride + unread, 0, sizeof(float) * (stride - unread));
  }
  for (int64_t h = 0; h < l->key_heads; h++) {
    const int64_t of_query = h * group * l->head, of_key = queries + h * l->head, of_value = queries + keys + h * l->head;
    attend_back(&s, qkv + of_query, qkv + of_key, qkv + of_value, read + of_query, read_slope + of_query,
                l->sums + 2 * (text * l->heads + h * group) * l->length, slope + of_query, slope + of_key, slope + of_value, room);
  }
  turn_back(s.end, l->heads + l->key_heads, l->head, l->cosine + at, l->sine + at, slope, stride);
}

/* Slopes of y, [texts, length, width], to slopes of x, 0 after the tokens that y is asked of, and gradients of the weights. */
EXPORT void layer_backward(const layer *l, const float *slope, float *x_slope) {
  const int64_t length = l->length, width = l->width, queries = l->heads * l->head, stride = queries + 2 * l->key_heads * l->head;
  const int64_t texts = together(l), deep = deepest(l), most = least(texts, l->texts) * length;
  float *room = l->work;
  const panels_back p = pack_back(l, &room);
  float *read_slope = take(&room, most * queries), *qkv_slope = take(&room, most * stride);
  tile tiles[2 * DEEP]; /* none is empty */
  for (int64_t text = 0; text < l->texts; text += texts) {
    const int64_t some = least(texts, l->texts - text), origin = text * length;
    int64_t count;
    for (int64_t t = text; t < text + some; t++) {
      const int64_t begin = begin_of(l, t), end = end_of(l, t);
      float *own = x_slope + t * length * width;
      memset(own, 0, sizeof(float) * begin * width);
      memset(own + end * width, 0, sizeof(float) * (length - end) * width);
    }
    for (int64_t i = 0; (count = tiles_of(l, text, some, 0, i, deep, tiles)); i += deep)
      finish_back(l, &p, tiles, count, origin, slope, x_slope, read_slope);
    for (int64_t t = 0; t < some; t++)
      attention_back(l, text + t, read_slope + t * length * queries, qkv_slope + t * length * stride, room);
    for (int64_t i = 0; (count = tiles_of(l, text, some, 1, i, deep, tiles)); i += deep)
      project_back(l, &p, tiles, count, origin, qkv_slope, x_slope);
  }
}
