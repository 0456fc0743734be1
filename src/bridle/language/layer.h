/* What a decoder layer does to some tokens, whether they are learnt from or written; halves.h, functions.h and attention.h
   come before. Widths are multiples of 8. */

#define TILE 48 /* tokens at a time through what looks at one token alone */

typedef struct {
  const float *weight; /* [out, in] */
  const float *bias;   /* [out] or NULL */
  float *weight_gradient, *bias_gradient; /* of the same shapes, or NULL where not asked for */
} linear;

typedef struct {
  int64_t texts, length, width, heads, key_heads, head, hidden;
  int64_t keep;    /* whether what the way back reads is kept for all texts, or written over by the next */
  int64_t turning; /* numbers between two texts' rows of cos and sin: 0 where all texts share theirs */
  const int64_t *begins, *ends; /* [texts] y is asked for of tokens begins ... ends - 1; NULL is 0 and length */
  float first_eps, second_eps, scale;
  const float *first_norm, *second_norm; /* [width] */
  float *first_gradient, *second_gradient;
  linear query, key, value, out, gate, up, down;
  const float *cosine, *sine; /* [length, head] */
  const float *x;             /* [texts, length, width] */
  float *y;
  float *qkv;  /* [texts, length, (heads + 2 key_heads) head], turned */
  float *read; /* [texts, length, heads head] */
  float *sums; /* [texts, heads, 2, length] what attention keeps of each query's scores */
  float *h;    /* [texts, length, width] */
  float *gate_up; /* [texts, length, 2 padded hidden] */
  float *work;    /* see layer_work */
} layer;

static void norm(int64_t rows, int64_t width, float eps, const float *x, const float *w, float *n) {
  for (int64_t i = 0; i < rows; i++, x += width, n += width) {
    vec squares = {0};
    for (int64_t j = 0; j < width; j += 8) squares += *(const vec *)(x + j) * *(const vec *)(x + j);
    const float by = 1.0f / sqrtf(sum_of(squares) / (float)width + eps);
    for (int64_t j = 0; j < width; j += 8) *(vec *)(n + j) = *(const vec *)(w + j) * (*(const vec *)(x + j) * by);
  }
}

/* act = silu(g) o u, rows of g and u side by side. */
static void gate(int64_t rows, int64_t hidden, const float *gate_up, float *act) {
  for (int64_t i = 0; i < rows; i++, gate_up += 2 * hidden, act += hidden) {
    int64_t j = 0;
    for (; j + LANES <= hidden; j += LANES) {
      const reg g = *(const reg *)(gate_up + j);
      *(reg *)(act + j) = g * sigmoids(g) * *(const reg *)(gate_up + hidden + j);
    }
    for (; j < hidden; j += 8) {
      const vec g = *(const vec *)(gate_up + j);
      *(vec *)(act + j) = g * sigmoid(g) * *(const vec *)(gate_up + hidden + j);
    }
  }
}

/* Turn heads by their positions: x cos + (-second half, first half of x) sin; back: its transpose. */
INLINE void turn(int64_t rows, int64_t heads, int64_t width, const float *cosine, const float *sine, float *x, int64_t stride,
                 const int back) {
  const int64_t half = width / 2;
  for (int64_t i = 0; i < rows; i++, cosine += width, sine += width, x += stride)
    for (int64_t h = 0; h < heads; h++)
      for (int64_t j = 0; j < half; j += 4) {
        float *one = x + h * width + j, *two = one + half;
        const four a = *(four *)one, b = *(four *)two;
        const four c = *(const four *)(cosine + j), s = *(const four *)(sine + j);
        const four d = *(const four *)(cosine + half + j), t = *(const four *)(sine + half + j);
        *(four *)one = back ? a * c + b * t : a * c - b * s;
        *(four *)two = back ? b * d - a * s : b * d + a * t;
      }
}

static void turn_forth(int64_t rows, int64_t heads, int64_t width, const float *cosine, const float *sine, float *x,
                       int64_t stride) {
  turn(rows, heads, width, cosine, sine, x, stride, 0);
}

static void turn_back(int64_t rows, int64_t heads, int64_t width, const float *cosine, const float *sine, float *x,
                      int64_t stride) {
  turn(rows, heads, width, cosine, sine, x, stride, 1);
}

static void add_bias(int64_t rows, int64_t n, const float *bias, float *restrict x, int64_t stride) {
  if (bias)
    for (int64_t i = 0; i < rows; i++, x += stride)
      for (int64_t j = 0; j < n; j++) x[j] += bias[j];
}

INLINE float *take(float **room, int64_t count) {
  float *found = *room;
  *room += padded(count);
  return found;
}

INLINE int64_t even(int64_t n) { return (n + 7) / 8 * 8; }

/* C[rows, out] (+)= x W^T + b, the weight packed. */
static void apply(const linear *w, int64_t rows, int64_t in, int64_t out, int64_t filled, const float *x, int64_t stride,
                  const float *packed, float *c, int64_t dc, int add) {
  linear_product(rows, filled, in, x, stride, packed, c, dc, add);
  add_bias(rows, out, w->bias, c, dc);
}

/* The weights, packed: of `x W^T`, and what one tile needs beside them. */
typedef struct {
  float *query, *key, *value, *out, *gate, *up, *down, *n, *act;
} panels;

/* Numbers of a layer's packed weights. */
INLINE int64_t packed_numbers(const layer *l) {
  const int64_t queries = l->heads * l->head, hidden = even(l->hidden);
  return l->width * (padded(queries) + 2 * padded(l->key_heads * l->head) + 2 * padded(hidden)) + (queries + hidden) * padded(l->width);
}

/* Where they lie. */
static panels lay_out(const layer *l, float **room) {
  const int64_t width = l->width, queries = l->heads * l->head, keys = l->key_heads * l->head, hidden = even(l->hidden);
  panels p = {0};
  p.query = take(room, width * padded(queries)), p.key = take(room, width * padded(keys));
  p.value = take(room, width * padded(keys)), p.out = take(room, queries * padded(width));
  p.gate = take(room, width * padded(hidden)), p.up = take(room, width * padded(hidden));
  p.down = take(room, hidden * padded(width));
  return p;
}

static void pack_weights(const layer *l, const panels *p) {
  const int64_t width = l->width, queries = l->heads * l->head, keys = l->key_heads * l->head;
  linear_pack_turned(width, queries, l->query.weight, width, p->query);
  linear_pack_turned(width, keys, l->key.weight, width, p->key);
  linear_pack_turned(width, keys, l->value.weight, width, p->value);
  linear_pack_turned(queries, width, l->out.weight, queries, p->out);
  linear_pack_turned(width, l->hidden, l->gate.weight, width, p->gate);
  linear_pack_turned(width, l->hidden, l->up.weight, width, p->up);
  linear_pack_turned(l->hidden, width, l->down.weight, l->hidden, p->down);
}

/* A tile's queries, keys and values, not turned yet. */
static void project(const layer *l, const panels *p, int64_t rows, const float *x, float *qkv) {
  const int64_t width = l->width, queries = l->heads * l->head, keys = l->key_heads * l->head, stride = queries + 2 * keys;
  norm(rows, width, l->first_eps, x, l->first_norm, p->n);
  apply(&l->query, rows, width, queries, queries, p->n, width, p->query, qkv, stride, 0);
  apply(&l->key, rows, width, keys, keys, p->n, width, p->key, qkv + queries, stride, 0);
  apply(&l->value, rows, width, keys, keys, p->n, width, p->value, qkv + queries + keys, stride, 0);
}

/* A tile from what attention has read to y. */
static void finish(const layer *l, const panels *p, int64_t rows, const float *x, const float *read, float *h, float *gate_up,
                   float *y) {
  const int64_t width = l->width, queries = l->heads * l->head, hidden = even(l->hidden);
  memcpy(h, x, sizeof(float) * rows * width);
  apply(&l->out, rows, queries, width, width, read, queries, p->out, h, width, 1);
  norm(rows, width, l->second_eps, h, l->second_norm, p->n);
  apply(&l->gate, rows, width, l->hidden, hidden, p->n, width, p->gate, gate_up, 2 * hidden, 0);
  apply(&l->up, rows, width, l->hidden, hidden, p->n, width, p->up, gate_up + hidden, 2 * hidden, 0);
  gate(rows, hidden, gate_up, p->act);
  memcpy(y, h, sizeof(float) * rows * width);
  apply(&l->down, rows, l->hidden, width, width, p->act, hidden, p->down, y, width, 1);
}
