/* Convolutions over images of bytes, each with a rectifier behind it, there and back, on a CPU in float32:

       h_0 = image / 255,  h_k = max(0, W_k * h_{k-1} + b_k) without padding,  features = h_K     (convolutions_forward)
       and the chain rule of it, the weights' gradients added to what is there, none to the image  (convolutions_backward)

   Layers lie pixel by pixel, a pixel's channels side by side: then a row of a patch is one stretch of numbers, so products
   read patches where they lie and nothing is gathered. A few images at a time go through all layers, so that their
   layers stay in the second-level cache; what is summed over images is summed for a few of their pixels in registers
   first. Weights are packed into panels of 16 columns once a call. Nothing is allocated here. Not-a-number goes through,
   there and back, as in PyTorch: a rectifier is 0 where y < 0, its slope 0 where y <= 0. */

#include <stdint.h>
#include <string.h>

#include "../native/simd.h"

#define LAYERS 8
#define TOGETHER 32768 /* numbers of the images that go through all layers at once */
#define MOST 16        /* images of them */
#define WIDE 16        /* columns of a product that are summed at a time */
#define DEEP 256       /* numbers of a patch summed in one go: 16 columns of weights to them fill half the nearest cache */
#define PIXELS 128     /* pixels of a layer's slopes summed in one go */

typedef int32_t place __attribute__((may_alias));

typedef struct {
  int64_t channels, height, width;         /* of what it sees */
  int64_t filters, tall, wide, down, right; /* W's sides, and how far apart patches are */
  const float *weight;                     /* [filters, channels, tall, wide] */
  const float *bias;                       /* [filters] */
  float *weight_gradient, *bias_gradient;  /* of the same shapes */
  float *kept;                             /* [images, rows, columns, filters], unless it is the last */
} convolution;

typedef struct {
  int64_t images, layers, keep; /* keep: whether layers are kept for the way back */
  convolution layer[LAYERS];
  const uint8_t *seen; /* [images, channels, height, width] */
  float *features;     /* [images, filters, rows, columns] of the last layer */
  float *work;         /* see convolutions_work */
} stack;

INLINE int64_t rows_of(const convolution *l) { return (l->height - l->tall) / l->down + 1; }
INLINE int64_t columns_of(const convolution *l) { return (l->width - l->wide) / l->right + 1; }
INLINE int64_t pixels_of(const convolution *l) { return rows_of(l) * columns_of(l); }
INLINE int64_t size_of(const convolution *l) { return l->channels * l->height * l->width; }
INLINE int64_t stretch_of(const convolution *l) { return l->wide * l->channels; } /* a row of a patch */

/* ---- products */

/* y(i, j) for `high` pixels and 16 filters: what stands there, or the bias if `first`, plus the rows of patches that begin
   at a[i] times weights b [rows stretch, 16]; rectified if `last`. */
INLINE void forward_block(const int high, int64_t rows, int64_t stretch, int64_t row, const float *const *a, const float *b,
                          const float *bias, float *y, int64_t dy, int64_t columns, int first, int last) {
  reg sum[HIGH][PARTS];
  float own[HIGH * WIDE];
  const int whole = columns == WIDE;
  UNROLL for (int i = 0; i < high; i++)
    for (int k = 0; k < PARTS; k++) sum[i][k] = (reg){0};
  for (int64_t r = 0; r < rows * row; r += row)
    for (int64_t k = r; k < r + stretch; k++, b += WIDE) {
      const reg left = *(const reg *)b, right = *(const reg *)(b + 16 - LANES);
      UNROLL for (int i = 0; i < high; i++) {
        const float one = a[i][k];
        sum[i][0] += one * left;
        if (PARTS == 2) sum[i][PARTS - 1] += one * right;
      }
    }
  if (!whole)
    for (int i = 0; i < high; i++)
      for (int64_t j = 0; j < WIDE; j++) own[i * WIDE + j] = j < columns ? y[i * dy + j] : 0.0f;
  float *to = whole ? y : own;
  const int64_t step = whole ? dy : WIDE;
  UNROLL for (int i = 0; i < high; i++) {
    reg *at = (reg *)(to + i * step);
    const reg *start = first ? (const reg *)bias : at;
    for (int k = 0; k < PARTS; k++) {
      const reg one = sum[i][k] + start[k];
      at[k] = last ? (reg)((flags)one & ~(one < (reg){0})) : one;
    }
  }
  if (!whole)
    for (int i = 0; i < high; i++)
      for (int64_t j = 0; j < columns; j++) y[i * dy + j] = own[i * WIDE + j];
}

/* One layer of some images, whose patches begin at x + at[p]. */
static void layer_forward(const convolution *l, const float *panels, const float *bias, int64_t pixels,
                          const place *at, const float *x, float *y) {
  const int64_t stretch = stretch_of(l), row = l->width * l->channels;
  const int64_t together = stretch < DEEP ? DEEP / stretch : 1;
  for (int64_t j = 0; j < l->filters; j += WIDE)
    for (int64_t r = 0; r < l->tall; r += together) {
      const int64_t rows = least(together, l->tall - r), columns = least(WIDE, l->filters - j);
      const int first = r == 0, last = r + rows == l->tall;
      const float *b = panels + (j * l->tall + WIDE * r) * stretch;
      for (int64_t p = 0, high; p < pixels; p += high) {
        const float *a[HIGH];
        high = next_high(pixels - p);
        for (int64_t i = 0; i < high; i++) a[i] = x + at[p + i] + r * row;
#define CALL(n) forward_block(n, rows, stretch, row, a, b, bias + j, y + p * l->filters + j, l->filters, columns, first, last)
        FOR_HIGH(high, CALL)
#undef CALL
      }
    }
}

/* gradient(k, j) += sum_p x[at(p) + k] dy(p, j), for `high` numbers k of a patch and 16 filters; dy [pixels, 16]. */
INLINE void weight_block(const int high, int64_t pixels, const place *at, const float *x, const float *dy, float *gradient,
                         int64_t step) {
  reg sum[HIGH][PARTS];
  UNROLL for (int i = 0; i < high; i++)
    for (int k = 0; k < PARTS; k++) sum[i][k] = (reg){0};
  for (int64_t p = 0; p < pixels; p++, dy += WIDE) {
    const reg left = *(const reg *)dy, right = *(const reg *)(dy + 16 - LANES);
    const float *patch = x + at[p];
    __asm__("" : "+r"(patch)); /* one address, not a sum each of x + k, at(p) and i */
    UNROLL for (int i = 0; i < high; i++) {
      const float one = patch[i];
      sum[i][0] += one * left;
      if (PARTS == 2) sum[i][PARTS - 1] += one * right;
    }
  }
  UNROLL for (int i = 0; i < high; i++) {
    reg *to = (reg *)(gradient + i * step);
    for (int k = 0; k < PARTS; k++) to[k] += sum[i][k];
  }
}

/* Add what slopes dy [filters / 16][pixels, 16] of a layer of some images come to: to gradient [patch, padded filters] and
   to sums [padded filters]. */
static void layer_weights(const convolution *l, int64_t pixels, const place *at, const float *x, const float *dy,
                          float *gradient, float *sums) {
  const int64_t stretch = stretch_of(l), row = l->width * l->channels, step = padded(l->filters);
  const int64_t parts = (pixels + PIXELS - 1) / PIXELS;
  for (int64_t part = 0; part < parts; part++) {
    const int64_t from = pixels * part / parts, count = pixels * (part + 1) / parts - from;
    for (int64_t j = 0; j < step; j += WIDE) {
      const float *slopes = dy + j * pixels + from * WIDE;
      vec left = {0}, right = {0};
      for (int64_t p = 0; p < count; p++) {
        left += *(const vec *)(slopes + p * WIDE);
        right += *(const vec *)(slopes + p * WIDE + 8);
      }
      *(vec *)(sums + j) += left;
      *(vec *)(sums + j + 8) += right;
      for (int64_t r = 0; r < l->tall; r++)
        for (int64_t k = 0, high; k < stretch; k += high) {
          high = next_high(stretch - k);
#define CALL(n) \
  weight_block(n, count, at + from, x + r * row + k, slopes, gradient + (r * stretch + k) * step + j, step)
          FOR_HIGH(high, CALL)
#undef CALL
        }
    }
  }
}

/* dx[at(p) + k] += sum_j dy(p, j) b(j, k), for `high` pixels p and 16 numbers k of a patch; dy [.., step, 16]. */
INLINE void slope_block(const int high, int64_t filters, const float *dy, int64_t step, const float *b, const place *at,
                        float *dx, int64_t columns) {
  reg sum[HIGH][PARTS];
  UNROLL for (int i = 0; i < high; i++)
    for (int k = 0; k < PARTS; k++) sum[i][k] = (reg){0};
  for (int64_t from = 0; from < filters; from += WIDE, dy += WIDE * step)
    for (int64_t j = 0; j < least(WIDE, filters - from); j++, b += WIDE) {
      const reg left = *(const reg *)b, right = *(const reg *)(b + 16 - LANES);
      UNROLL for (int i = 0; i < high; i++) {
        const float one = dy[i * WIDE + j];
        sum[i][0] += one * left;
        if (PARTS == 2) sum[i][PARTS - 1] += one * right;
      }
    }
  if (columns == WIDE) {
    UNROLL for (int i = 0; i < high; i++) { /* one after the other: patches overlap */
      reg *to = (reg *)(dx + at[i]);
      for (int k = 0; k < PARTS; k++) to[k] += sum[i][k];
    }
  } else {
    float own[HIGH * WIDE];
    UNROLL for (int i = 0; i < high; i++)
      for (int k = 0; k < PARTS; k++) *(reg *)(own + i * WIDE + LANES * k) = sum[i][k];
    for (int i = 0; i < high; i++)
      for (int64_t k = 0; k < columns; k++) dx[at[i] + k] += own[i * WIDE + k];
  }
}

/* Add to dx what slopes dy [filters / 16][pixels, 16] come to, with weights in panels of 16 numbers of a patch's row. */
static void layer_slopes(const convolution *l, const float *panels, int64_t pixels, const place *at, const float *dy,
                         float *dx) {
  const int64_t stretch = stretch_of(l), row = l->width * l->channels;
  for (int64_t r = 0; r < l->tall; r++)
    for (int64_t k = 0; k < stretch; k += WIDE, panels += WIDE * l->filters) {
      const int64_t columns = least(WIDE, stretch - k);
      for (int64_t p = 0, high; p < pixels; p += high) {
        high = next_high(pixels - p);
#define CALL(n) slope_block(n, l->filters, dy + p * WIDE, pixels, panels, at + p, dx + r * row + k, columns)
        FOR_HIGH(high, CALL)
#undef CALL
      }
    }
}

/* ---- laying out */

/* panels [filters / 16][tall, wide, channels][16], the last one filled up with 0; bias likewise. */
static void pack_forward(const convolution *l, float *panels, float *bias) {
  const int64_t area = l->tall * l->wide;
  for (int64_t j = 0; j < padded(l->filters); j++) {
    bias[j] = j < l->filters ? l->bias[j] : 0.0f;
    float *to = panels + j / WIDE * WIDE * area * l->channels + j % WIDE;
    for (int64_t c = 0; c < l->channels; c++)
      for (int64_t k = 0; k < area; k++)
        to[(k * l->channels + c) * WIDE] = j < l->filters ? l->weight[(j * l->channels + c) * area + k] : 0.0f;
  }
}

/* panels [tall][wide channels / 16][filters][16], the last one of each row filled up with 0. */
static void pack_back(const convolution *l, float *panels) {
  const int64_t stretch = stretch_of(l), area = l->tall * l->wide;
  for (int64_t r = 0; r < l->tall; r++)
    for (int64_t k = 0; k < stretch; k += WIDE)
      for (int64_t j = 0; j < l->filters; j++, panels += WIDE)
        for (int64_t i = 0; i < WIDE; i++) {
          const int64_t column = (k + i) / l->channels, c = (k + i) % l->channels;
          panels[i] = k + i < stretch ? l->weight[(j * l->channels + c) * area + r * l->wide + column] : 0.0f;
        }
}

/* Add gradients as layer_weights finds them to those of W and b. */
static void add_gradients(const convolution *l, const float *gradient, const float *sums) {
  const int64_t area = l->tall * l->wide, step = padded(l->filters);
  for (int64_t j = 0; j < l->filters; j++) {
    l->bias_gradient[j] += sums[j];
    float *to = l->weight_gradient + j * l->channels * area;
    for (int64_t c = 0; c < l->channels; c++)
      for (int64_t k = 0; k < area; k++) to[c * area + k] += gradient[(k * l->channels + c) * step + j];
  }
}

/* Where the patches of some images begin. */
static void find_patches(const convolution *l, int64_t images, place *at) {
  const int64_t rows = rows_of(l), columns = columns_of(l);
  for (int64_t n = 0; n < images; n++)
    for (int64_t r = 0; r < rows; r++)
      for (int64_t c = 0; c < columns; c++)
        *at++ = (place)(n * size_of(l) + (r * l->down * l->width + c * l->right) * l->channels);
}

/* Images of bytes [channels, pixels] as numbers [pixels, channels] in 0 ... 1. */
static void look(const convolution *l, int64_t images, const uint8_t *seen, float *x) {
  const int64_t pixels = l->height * l->width, channels = l->channels;
  const float share = 1.0f / 255.0f;
  for (int64_t n = 0; n < images; n++, seen += channels * pixels, x += channels * pixels)
    if (channels == 4)
      for (int64_t p = 0; p < pixels; p++)
        for (int64_t c = 0; c < 4; c++) x[4 * p + c] = (float)seen[c * pixels + p] * share;
    else
      for (int64_t c = 0; c < channels; c++)
        for (int64_t p = 0; p < pixels; p++) x[p * channels + c] = (float)seen[c * pixels + p] * share;
}

/* [pixels, filters] as [filters, pixels], of some images. */
static void turn(int64_t images, int64_t pixels, int64_t filters, const float *y, float *features) {
  for (int64_t n = 0; n < images; n++, y += pixels * filters, features += pixels * filters)
    for (int64_t j = 0; j < filters; j++)
      for (int64_t p = 0; p < pixels; p++) features[j * pixels + p] = y[p * filters + j];
}

/* Slopes [filters, pixels] of some images through the last rectifier, as [filters / 16][images pixels, 16], the last one
   filled up with 0. */
static void turn_back(int64_t images, int64_t pixels, int64_t filters, const float *features, const float *slopes,
                      float *dy) {
  for (int64_t n = 0; n < images; n++, features += pixels * filters, slopes += pixels * filters)
    for (int64_t j = 0; j < padded(filters); j++) {
      float *to = dy + (j / WIDE * images + n) * pixels * WIDE + j % WIDE;
      for (int64_t p = 0; p < pixels; p++)
        to[p * WIDE] = j >= filters || features[j * pixels + p] <= 0.0f ? 0.0f : slopes[j * pixels + p];
    }
}

/* Slopes [pixels, filters] through a rectifier whose values are y, as [filters / 16][pixels, 16]. */
static void through(int64_t pixels, int64_t filters, const float *y, const float *dx, float *dy) {
  for (int64_t from = 0; from < filters; from += WIDE) {
    const int64_t columns = least(WIDE, filters - from);
    for (int64_t p = 0; p < pixels; p++, dy += WIDE) {
      const float *value = y + p * filters + from, *slope = dx + p * filters + from;
      if (columns == WIDE) { /* written out: a compiler would ask number by number */
        const vec left = *(const vec *)value, right = *(const vec *)(value + 8);
        *(vec *)dy = (vec)(*(const ints *)slope & ~(left <= (vec){0}));
        *(vec *)(dy + 8) = (vec)(*(const ints *)(slope + 8) & ~(right <= (vec){0}));
      } else
        for (int64_t j = 0; j < WIDE; j++) dy[j] = j >= columns || value[j] <= 0.0f ? 0.0f : slope[j];
    }
  }
}

/* ---- what a pass works in */

typedef struct {
  int64_t together;    /* images at a time */
  float *panels[LAYERS], *bias[LAYERS], *back[LAYERS], *gradient[LAYERS], *sums[LAYERS], *layer[LAYERS];
  place *at[LAYERS];
  float *x, *dx, *dy;
  int64_t numbers;     /* all of it */
} room;

INLINE float *taken(room *own, float *work, int64_t numbers) {
  float *here = work ? work + own->numbers : 0;
  own->numbers += (numbers + 15) / 16 * 16;
  return here;
}

static room room_of(const stack *s, float *work) {
  room own = {0};
  const int64_t fits = TOGETHER / size_of(s->layer);
  own.together = least(fits < 1 ? 1 : least(fits, MOST), s->images < 1 ? 1 : s->images);
  int64_t widest = 0, largest = 0;
  for (int64_t k = 0; k < s->layers; k++) {
    const convolution *l = s->layer + k;
    const int64_t patch = l->tall * stretch_of(l), wide = padded(l->filters), pixels = own.together * pixels_of(l);
    own.panels[k] = taken(&own, work, patch * wide);
    own.bias[k] = taken(&own, work, wide);
    own.at[k] = (place *)taken(&own, work, pixels);
    own.layer[k] = s->keep && k + 1 < s->layers ? 0 : taken(&own, work, pixels * l->filters);
    if (!s->keep) continue;
    own.gradient[k] = taken(&own, work, patch * wide);
    own.sums[k] = taken(&own, work, wide);
    if (k) own.back[k] = taken(&own, work, l->tall * padded(stretch_of(l)) * l->filters);
    if (k && own.together * size_of(l) > largest) largest = own.together * size_of(l);
    if (pixels * wide > widest) widest = pixels * wide;
  }
  own.x = taken(&own, work, own.together * size_of(s->layer));
  own.dx = taken(&own, work, largest);
  own.dy = taken(&own, work, widest);
  return own;
}

/* Numbers that `work` must hold. */
EXPORT int64_t convolutions_work(const stack *s) { return room_of(s, 0).numbers; }

/* The checksum of this file, as who compiled it says: what is called must be what is here. */
EXPORT int64_t convolutions_source(void) { return SOURCE; }

EXPORT void convolutions_forward(const stack *s) {
  const room own = room_of(s, s->work);
  const convolution *top = s->layer + s->layers - 1;
  for (int64_t k = 0; k < s->layers; k++) {
    pack_forward(s->layer + k, own.panels[k], own.bias[k]);
    find_patches(s->layer + k, own.together, own.at[k]);
  }
  for (int64_t n = 0; n < s->images; n += own.together) {
    const int64_t images = least(own.together, s->images - n);
    look(s->layer, images, s->seen + n * size_of(s->layer), own.x);
    const float *x = own.x;
    for (int64_t k = 0; k < s->layers; k++) {
      const convolution *l = s->layer + k;
      const int64_t pixels = pixels_of(l);
      float *y = own.layer[k] ? own.layer[k] : l->kept + n * pixels * l->filters;
      layer_forward(l, own.panels[k], own.bias[k], images * pixels, own.at[k], x, y);
      x = y;
    }
    turn(images, pixels_of(top), top->filters, x, s->features + n * pixels_of(top) * top->filters);
  }
}

/* `slopes`: of the loss, with respect to each feature. Layers and features must be kept from the way there. */
EXPORT void convolutions_backward(const stack *s, const float *slopes) {
  const room own = room_of(s, s->work);
  const convolution *top = s->layer + s->layers - 1;
  const int64_t size = pixels_of(top) * top->filters;
  for (int64_t k = 0; k < s->layers; k++) {
    const convolution *l = s->layer + k;
    if (k) pack_back(l, own.back[k]);
    find_patches(l, own.together, own.at[k]);
    memset(own.gradient[k], 0, l->tall * stretch_of(l) * padded(l->filters) * sizeof(float));
    memset(own.sums[k], 0, padded(l->filters) * sizeof(float));
  }
  for (int64_t n = 0; n < s->images; n += own.together) {
    const int64_t images = least(own.together, s->images - n);
    look(s->layer, images, s->seen + n * size_of(s->layer), own.x);
    turn_back(images, pixels_of(top), top->filters, s->features + n * size, slopes + n * size, own.dy);
    for (int64_t k = s->layers - 1; k >= 0; k--) {
      const convolution *l = s->layer + k;
      const int64_t pixels = images * pixels_of(l), below = size_of(l);
      const float *x = k ? l[-1].kept + n * below : own.x;
      layer_weights(l, pixels, own.at[k], x, own.dy, own.gradient[k], own.sums[k]);
      if (!k) break;
      memset(own.dx, 0, images * below * sizeof(float));
      layer_slopes(l, own.back[k], pixels, own.at[k], own.dy, own.dx);
      through(images * below / l->channels, l->channels, x, own.dx, own.dy);
    }
  }
  for (int64_t k = 0; k < s->layers; k++) add_gradients(s->layer + k, own.gradient[k], own.sums[k]);
}
