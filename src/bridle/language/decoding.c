/* Writing texts with a stack of decoder layers, on a CPU in float32, products of weights as halves.h has
   them: prompts are read (stack_read), each text is given one token more (stack_step), and tokens are drawn from what
   softmax(by (h W^T + b)) says (choose).

   Keys and values of a prompt lie in one block, which the texts that begin with it share, and those of what follows in another, the
   text's own: of each layer and key head the keys, [capacity / 8][head][8], so that eight tokens' scores are summed side by side and
   tokens are one stretch of memory, and the values, [capacity][head]. Weights are packed once for many calls. What is computed for a
   text does not depend on the others, to the bit. Numbers lie row by row. Nothing is allocated here. What a block holds after its
   tokens may be anything. Not-a-number and infinities of a text go through to its answers. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "products.h"

#include "halves.h"

#include "../native/functions.h"

#include "attention.h"

#include "layer.h"

#define ROWS 96        /* texts at a time through a step of a layer */
#define READ 256       /* tokens of prompts at a time, or one prompt that is longer */
#define SOME 192       /* tokens of the vocabulary at a time */
#define PIECE 4194304  /* logits kept at a time, or those of one text */
#define LOWEST -1e37f  /* below all logits */

typedef struct {
  int64_t layers;
  const layer *layer;         /* [layers] sizes, norms and linears */
  const float *cosine, *sine; /* [places, head] */
  const float *norm;          /* [width] of the last norm */
  float *packed;              /* all weights, stack_numbers of them */
  float eps;
} stack;

typedef struct {
  float *held;              /* keys and values of all layers */
  int64_t capacity, length; /* tokens there is room for, a multiple of 8; tokens there are */
} cache;

typedef struct {
  cache prompt, own; /* the prompt's may be empty */
} text;

/* The checksum of this file and of its headers, as who compiled it says. */
EXPORT int64_t decoding_source(void) { return SOURCE; }

INLINE int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }

/* Numbers of all packed weights. */
EXPORT int64_t stack_numbers(const stack *s) {
  int64_t found = 0;
  for (int64_t i = 0; i < s->layers; i++) found += packed_numbers(s->layer + i);
  return found;
}

EXPORT void stack_pack(const stack *s) {
  float *room = s->packed;
  for (int64_t i = 0; i < s->layers; i++) {
    const panels p = lay_out(s->layer + i, &room);
    pack_weights(s->layer + i, &p);
  }
}

/* Numbers that `work` must hold for texts of up to `longest` tokens. */
EXPORT int64_t stack_work(const stack *s, int64_t longest) {
  int64_t found = 0;
  for (int64_t i = 0; i < s->layers; i++) {
    const layer *l = s->layer + i;
    const int64_t queries = l->heads * l->head, stride = queries + 2 * l->key_heads * l->head, tokens = most(READ, longest);
    const int64_t tile = ROWS * (2 * l->width + stride + queries + 3 * even(l->hidden));
    const int64_t texts = tokens * (stride + 2 * queries + l->width) + 2 * l->heads * longest + attention_room(longest, l->head);
    found = most(found, tile + texts + longest + 1024);
  }
  return found;
}

/* ---- keys and values that are held */

INLINE float *keys_of(const layer *l, const cache *t, int64_t at, int64_t head) {
  return t->held + (at * 2 * l->key_heads + head) * t->capacity * l->head;
}
INLINE float *values_of(const layer *l, const cache *t, int64_t at, int64_t head) { return keys_of(l, t, at, l->key_heads + head); }

/* Put the keys and values of `count` tokens, `stride` apart, from `place` on; of layer number `at`. */
static void hold(const layer *l, const cache *t, int64_t at, int64_t place, int64_t count, const float *keys, int64_t stride) {
  const int64_t head = l->head, apart = l->key_heads * head;
  for (int64_t h = 0; h < l->key_heads; h++, keys += head) {
    float *to = keys_of(l, t, at, h), *values = values_of(l, t, at, h) + place * head;
    for (int64_t i = 0; i < count; i++) {
      const float *own = keys + i * stride;
      float *column = to + (place + i) / 8 * 8 * head + (place + i) % 8;
      for (int64_t d = 0; d < head; d++) column[8 * d] = own[d];
      memcpy(values + i * head, own + apart, sizeof(float) * head);
    }
  }
}

/* Copy what `from` holds. */
EXPORT void cache_copy(const stack *s, const cache *from, const cache *to) {
  const int64_t length = from->length, whole = even(length);
  for (int64_t i = 0; i < s->layers; i++) {
    const layer *l = s->layer + i;
    for (int64_t h = 0; h < l->key_heads; h++) {
      memcpy(keys_of(l, to, i, h), keys_of(l, from, i, h), sizeof(float) * whole * l->head);
      memcpy(values_of(l, to, i, h), values_of(l, from, i, h), sizeof(float) * length * l->head);
    }
  }
}

/* Scores of `count` keys, up to eight more beyond them -inf; their largest. */
INLINE float scores_of(const int64_t head, int64_t count, const float *q, const float *keys, float *w) {
  vec largest = (vec){0} - INFINITY;
  for (int64_t j = 0; j < count; j += 8, keys += 8 * head) {
    vec one = {0}, other = {0};
    for (int64_t d = 0; d < head; d += 2) {
      one += q[d] * *(const vec *)(keys + 8 * d);
      other += q[d + 1] * *(const vec *)(keys + 8 * d + 8);
    }
    one += other;
    if (count - j < 8)
      for (int64_t i = count - j; i < 8; i++) one[i] = -INFINITY;
    *(vec *)(w + j) = one;
    largest = pick(one > largest, one, largest);
  }
  float found = -INFINITY;
  for (int i = 0; i < 8; i++) found = largest[i] > found ? largest[i] : found;
  return found;
}

/* read[8 wide] = by (sum over j of w[j] values[j], and what is there if `add`), `deep` of them summed apart. */
INLINE void gather_some(const int wide, const int deep, int64_t count, float by, const float *w, const float *values, int64_t head,
                        float *read, const int add) {
  vec sum[4][8];
  for (int i = 0; i < deep; i++)
    for (int d = 0; d < wide; d++) sum[i][d] = (vec){0};
  int64_t j = 0;
  for (; j + deep <= count; j += deep, values += deep * head)
    for (int i = 0; i < deep; i++)
      for (int d = 0; d < wide; d++) sum[i][d] += w[j + i] * *(const vec *)(values + i * head + 8 * d);
  for (; j < count; j++, values += head)
    for (int d = 0; d < wide; d++) sum[0][d] += w[j] * *(const vec *)(values + 8 * d);
  for (int i = 1; i < deep; i++)
    for (int d = 0; d < wide; d++) sum[0][d] += sum[i][d];
  for (int d = 0; d < wide; d++) {
    vec *to = (vec *)(read + 8 * d);
    if (add) sum[0][d] += *to;
    *to = sum[0][d] * by;
  }
}

#define WIDE(n, deep) \
  case n: gather_some(n, deep, count, by, w, values + d, head, read + d, add); break

INLINE void gather_all(int64_t head, int64_t count, float by, const float *w, const float *values, float *read, const int add) {
  for (int64_t d = 0; d < head; d += 64) switch (least(64, head - d) / 8) {
      WIDE(1, 4);
      WIDE(2, 4);
      WIDE(3, 2);
      WIDE(4, 2);
      WIDE(5, 2);
      WIDE(6, 1);
      WIDE(7, 1);
      WIDE(8, 1);
    }
}

/* Some tokens' keys and values of one head. */
typedef struct {
  const float *keys, *values;
  int64_t count;
} span;

INLINE float scores_in(const int64_t head, span prompt, span own, const float *q, float *w) {
  const float one = scores_of(head, prompt.count, q, prompt.keys, w), other = scores_of(head, own.count, q, own.keys, w + even(prompt.count));
  return one > other ? one : other;
}

/* What the queries of `group` heads side by side read of a prompt and of what follows; `w` holds a number for each token, and
   fifteen more. */
static void recall(int64_t group, int64_t head, span prompt, span own, float scale, const float *q, float *read, float *w) {
  const int64_t begin = even(prompt.count), all = begin + own.count;
  for (int64_t h = 0; h < group; h++, q += head, read += head) {
    const float largest = head == 8 ? scores_in(8, prompt, own, q, w) : scores_in(head, prompt, own, q, w);
    vec sums = {0};
    for (int64_t j = 0; j < all; j += 8) {
      const vec one = two_to((*(vec *)(w + j) - largest) * (scale * LOG2_E));
      *(vec *)(w + j) = one;
      sums += one;
    }
    gather_all(head, prompt.count, 1.0f, w, prompt.values, read, 0);
    gather_all(head, own.count, 1.0f / sum_of(sums), w + begin, own.values, read, 1);
  }
}

/* ---- one token more in each of some texts */

/* Through all layers: x [rows, width] holds the embeddings of texts' new tokens, which go behind what is their own; y gets the
   last states. x is written over. */
EXPORT void stack_step(const stack *s, int64_t rows, const text *texts, float *x, float *y, float *work) {
  const int64_t tiles = (rows + ROWS - 1) / ROWS, width = s->layer->width;
  float *packed = s->packed;
  for (int64_t at = 0; at < s->layers; at++) {
    const layer *l = s->layer + at;
    const int64_t head = l->head, queries = l->heads * head, stride = queries + 2 * l->key_heads * head, group = l->heads / l->key_heads;
    const int64_t hidden = even(l->hidden);
    panels p = lay_out(l, &packed);
    float *room = work, *qkv, *read, *h, *gate_up;
    p.n = take(&room, ROWS * width), p.act = take(&room, ROWS * hidden), qkv = take(&room, ROWS * stride);
    read = take(&room, ROWS * queries), h = take(&room, ROWS * width), gate_up = take(&room, ROWS * 2 * hidden);
    for (int64_t tile = 0; tile < tiles; tile++) {
      const int64_t first = rows * tile / tiles, some = rows * (tile + 1) / tiles - first;
      project(l, &p, some, x + first * width, qkv);
      for (int64_t r = 0; r < some; r++) {
        const text *t = texts + first + r;
        float *own = qkv + r * stride;
        const int64_t place = (t->prompt.length + t->own.length) * head;
        turn_forth(1, l->heads + l->key_heads, head, s->cosine + place, s->sine + place, own, stride);
        hold(l, &t->own, at, t->own.length, 1, own + queries, stride);
        for (int64_t i = 0; i < l->key_heads; i++) {
          const span prompt = {keys_of(l, &t->prompt, at, i), values_of(l, &t->prompt, at, i), t->prompt.length};
          const span written = {keys_of(l, &t->own, at, i), values_of(l, &t->own, at, i), t->own.length + 1};
          recall(group, head, prompt, written, l->scale, own + i * group * head, read + r * queries + i * group * head, room);
        }
      }
      finish(l, &p, some, x + first * width, read, h, gate_up, x + first * width);
    }
  }
  norm(rows, width, s->eps, x, s->norm, y);
}

/* ---- prompts */

/* A layer of the tokens of `count` texts, laid end to end in x; of the last layer, those of the texts' last tokens alone, which
   are put first. */
static void read_layer(const stack *s, int64_t at, const panels *p, int64_t count, const cache *texts, int64_t all, float *x,
                       float *room) {
  const layer *l = s->layer + at;
  const int64_t head = l->head, width = l->width, queries = l->heads * head, keys = l->key_heads * head, stride = queries + 2 * keys;
  const int64_t group = l->heads / l->key_heads, last = at + 1 == s->layers;
  float *qkv = take(&room, all * stride), *read = take(&room, all * queries), *h = take(&room, TILE * width);
  float *gate_up = take(&room, TILE * 2 * even(l->hidden));
  for (int64_t i = 0; i < all; i += TILE) project(l, p, least(TILE, all - i), x + i * width, qkv + i * stride);
  int64_t first = 0;
  for (const cache *t = texts; t < texts + count; first += t->length, t++) {
    float *own = qkv + first * stride, *sums = room;
    turn_forth(t->length, l->heads + l->key_heads, head, s->cosine, s->sine, own, stride);
    hold(l, t, at, 0, t->length, own + queries, stride);
    const sight seen = {.length = t->length, .begin = last ? t->length - 1 : 0, .end = t->length, .head = head, .group = group,
                        .stride = stride, .along = queries, .scale = l->scale};
    for (int64_t i = 0; i < l->key_heads; i++)
      attend(&seen, own + i * group * head, own + queries + i * head, own + queries + keys + i * head,
             read + first * queries + i * group * head, sums, sums + 2 * group * t->length);
    if (last) {
      const int64_t end = first + t->length - 1;
      memmove(read + (t - texts) * queries, read + end * queries, sizeof(float) * queries);
      memmove(x + (t - texts) * width, x + end * width, sizeof(float) * width);
    }
  }
  const int64_t rest = last ? count : all;
  for (int64_t i = 0; i < rest; i += TILE)
    finish(l, p, least(TILE, rest - i), x + i * width, read + i * queries, h, gate_up, x + i * width);
}

/* Through all layers: x holds the embeddings of the tokens of `count` prompts, laid end to end, of `length` tokens each, which
   are held from now on; y [count, width] gets the last state of each. x is written over. */
EXPORT void stack_read(const stack *s, int64_t count, const cache *texts, float *x, float *y, float *work) {
  const int64_t width = s->layer->width;
  while (count) {
    int64_t some = 0, all = 0;
    while (some < count && (!some || all + texts[some].length <= READ)) all += texts[some++].length;
    float *packed = s->packed;
    for (int64_t at = 0; at < s->layers; at++) {
      float *room = work;
      panels p = lay_out(s->layer + at, &packed);
      p.n = take(&room, TILE * width), p.act = take(&room, TILE * even(s->layer[at].hidden));
      read_layer(s, at, &p, some, texts, all, x, room);
    }
    norm(some, width, s->eps, x, s->norm, y);
    count -= some, texts += some, x += all * width, y += some * width;
  }
}

/* ---- drawing tokens */

typedef struct {
  int64_t width, vocabulary;
  const float *weight; /* [vocabulary, width] */
  const float *bias;   /* [vocabulary] or NULL */
  float *packed;       /* choice_numbers of them */
  float by;            /* factor on the logits */
} choice;

static int64_t blocks_of(const choice *c) { return (c->vocabulary + SOME - 1) / SOME; }
static int64_t states_of(const choice *c) { return most(1, PIECE / (blocks_of(c) * SOME)); }

EXPORT int64_t choice_numbers(const choice *c) { return c->width * padded(c->vocabulary); }
EXPORT void choice_pack(const choice *c) {
  linear_pack_turned(c->width, c->vocabulary, c->weight, c->width, c->packed);
}

/* Numbers that `work` must hold for so many states. */
EXPORT int64_t choice_work(const choice *c, int64_t states) { return least(states, states_of(c)) * blocks_of(c) * (SOME + 2); }

/* From raw products to logits, of `count` tokens from `first` on: each row's largest, and the sum of e^(z - largest). */
static void sum_up(const choice *c, int64_t rows, int64_t first, int64_t count, float *z, int64_t stride, float *sums,
                   int64_t apart) {
  for (int64_t i = 0; i < rows; i++, z += stride, sums += apart) {
    for (int64_t j = 0; c->bias && j < count; j++) z[j] += c->bias[first + j];
    for (int64_t j = 0; c->by != 1.0f && j < count; j++) z[j] *= c->by;
    for (int64_t j = count; j % 8; j++) z[j] = -INFINITY;
    vec high = (vec){0} + LOWEST, total = {0};
    for (int64_t j = 0; j < count; j += 8) {
      const vec one = *(const vec *)(z + j);
      high = pick(one > high, one, high);
    }
    float largest = LOWEST;
    for (int j = 0; j < 8; j++) largest = high[j] > largest ? high[j] : largest;
    for (int64_t j = 0; j < count; j += 8) total += exp_of(*(const vec *)(z + j) - largest);
    sums[0] = largest, sums[1] = sum_of(total);
  }
}

static void exponentials(int64_t count, float largest, const float *z, float *e) {
  for (int64_t j = 0; j < count; j += 8) *(vec *)(e + j) = exp_of(*(const vec *)(z + j) - largest);
}

/* The first token whose cumulative probability is above `uniform`, or the last that has any; its log-probability. */
static int64_t draw(const choice *c, const float *z, const float *sums, float uniform, float *logp) {
  const int64_t blocks = blocks_of(c);
  float largest = LOWEST, e[SOME];
  double total = 0.0, passed = 0.0, share = 0.0;
  int64_t block = 0, token = 0;
  for (int64_t b = 0; b < blocks; b++) largest = sums[2 * b] > largest ? sums[2 * b] : largest;
  for (int64_t b = 0; b < blocks; b++) total += sums[2 * b + 1] * exp((double)sums[2 * b] - largest);
  const double threshold = uniform * total;
  for (; block < blocks; block++) {
    share = exp((double)sums[2 * block] - largest);
    if (passed + sums[2 * block + 1] * share > threshold) break;
    passed += sums[2 * block + 1] * share;
  }
  if (block == blocks) { /* not a number */
    *logp = NAN;
    return 0;
  }
  const int64_t first = block * SOME, count = least(SOME, c->vocabulary - first);
  const double rest = (threshold - passed) / share;
  exponentials(count, sums[2 * block], z + first, e);
  double sum = 0.0;
  for (int64_t j = 0; j < count && sum <= rest; j++) {
    sum += e[j];
    if (e[j] > 0.0f) token = j;
  }
  *logp = (float)((double)z[first + token] - largest - log(total));
  return first + token;
}

/* For each of `answers`, token and log p of it, from state picks[i] of hidden [states, width] at uniforms[i] in [0, 1). */
EXPORT void choose(const choice *c, int64_t states, const float *hidden, int64_t answers, const int64_t *picks, const float *uniforms,
                   int64_t *tokens, float *logps, float *work) {
  const int64_t blocks = blocks_of(c), stride = blocks * SOME, at_once = least(states, states_of(c));
  float *z = work, *sums = z + at_once * stride;
  for (int64_t from = 0; from < states; from += at_once) {
    const int64_t rows = least(at_once, states - from);
    for (int64_t b = 0; b < blocks; b++) {
      const int64_t first = b * SOME, count = least(SOME, c->vocabulary - first);
      linear_product(rows, count, c->width, hidden + from * c->width, c->width, c->packed + first * c->width, z + first, stride, 0);
      sum_up(c, rows, first, count, z + first, stride, sums + 2 * b, 2 * blocks);
    }
    for (int64_t i = 0; i < answers; i++) {
      const int64_t row = picks[i] - from;
      if (row >= 0 && row < rows) tokens[i] = draw(c, z + row * stride, sums + row * 2 * blocks, uniforms[i], logps + i);
    }
  }
}
