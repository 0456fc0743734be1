/* Small networks by hand, compiled: what perceptrons.py and small.py do in a hundred calls, in five.

   A perceptron over many states, a few rows at a time so that its layers stay in the nearest cache:

       h_0 = x,  h_k = f(h_{k-1} W_k^T + b_k),  out = h_{K-1} W_K^T + b_K           (perceptron_forward)
       and the chain rule of it, gradients added to what is there                   (perceptron_backward)

   and the two heads, from outputs to log-probabilities and entropies and back. All numbers are float32, row by row
   without gaps; actions stand along the first axis of what belongs to n states. Nothing is allocated here. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#define LAYERS 8
#define ROWS 96   /* states at a time: their layers of 64 fill half a cache of 64 KiB */
#define HIGH 6    /* rows of C, and */
#define WIDE 16   /* columns of it, that are summed in registers */

typedef float vec __attribute__((vector_size(32), aligned(4), may_alias));

typedef struct {
  int64_t rows, layers, tanh, transposed;
  int64_t width[LAYERS + 1];
  const float *weight[LAYERS]; /* [out, in]; [in, out] of the hidden layers if transposed */
  const float *bias[LAYERS];   /* [out] */
  float *weight_gradient[LAYERS];
  float *bias_gradient[LAYERS];
  float *hidden[LAYERS]; /* [rows, out] */
  float *out;            /* output j in state i at out[j across + i along] */
  int64_t across, along;
  float *work;           /* see perceptron_work */
} perceptron;

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define EXPORT __attribute__((visibility("default"), target_clones("arch=x86-64-v3", "default")))
#define CLONES __attribute__((noinline, target_clones("arch=x86-64-v3", "default")))
#else
#define EXPORT __attribute__((visibility("default")))
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

static int64_t most(const perceptron *net) {
  int64_t found = 0;
  for (int64_t k = 0; k <= net->layers; k++)
    if (net->width[k] > found) found = net->width[k];
  return found;
}

/* C[high, 16] (+)= A B with A(i, k) = a[i da + k dk] and B(k, ·) = b + k db; the first `columns` columns of it. */
INLINE void block(const int high, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b, int64_t db,
                  float *c, int64_t dc, int64_t columns, int add) {
  vec sum[HIGH][2];
  for (int i = 0; i < high; i++) sum[i][0] = sum[i][1] = (vec){0};
  for (int64_t k = 0; k < depth; k++) {
    const vec left = *(const vec *)(b + k * db), right = *(const vec *)(b + k * db + 8);
    for (int i = 0; i < high; i++) {
      const float one = a[i * da + k * dk];
      sum[i][0] += one * left;
      sum[i][1] += one * right;
    }
  }
  for (int i = 0; i < high; i++) {
    float *row = c + i * dc;
    if (columns == WIDE) {
      vec *to = (vec *)row;
      if (add) to[0] += sum[i][0], to[1] += sum[i][1];
      else to[0] = sum[i][0], to[1] = sum[i][1];
    } else {
      float own[WIDE];
      memcpy(own, sum[i], sizeof own);
      for (int64_t j = 0; j < columns; j++) row[j] = add ? row[j] + own[j] : own[j];
    }
  }
}

/* C[m, n] (+)= A B; `pad` holds [depth, 16] for columns that do not fill a block. */
CLONES static void product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                    int64_t db, float *c, int64_t dc, int add, float *pad) {
  for (int64_t j = 0; j < n; j += WIDE) {
    const int64_t columns = n - j < WIDE ? n - j : WIDE;
    const float *from = b + j;
    int64_t step = db;
    if (columns < WIDE) {
      for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < WIDE; i++) pad[k * WIDE + i] = i < columns ? b[k * db + j + i] : 0.0f;
      from = pad, step = WIDE;
    }
    int64_t i = 0;
    for (; i + HIGH <= m; i += HIGH) block(HIGH, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add);
    switch (m - i) {
      case 5: block(5, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add); break;
      case 4: block(4, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add); break;
      case 3: block(3, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add); break;
      case 2: block(2, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add); break;
      case 1: block(1, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add); break;
    }
  }
}

/* C[m, n] += A B; where few columns would leave blocks half empty and A lies column by column, C^T = B^T A^T. */
CLONES static void add_product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                               float *restrict c, float *restrict pad) {
  if (n > WIDE / 2 || m < WIDE || m % WIDE || da != 1) {
    product(m, n, depth, a, da, dk, b, n, c, n, 1, pad);
    return;
  }
  product(n, m, depth, b, 1, n, a, dk, pad, m, 0, pad); /* whole blocks, which leave `pad` alone */
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) c[i * n + j] += pad[j * m + i];
}

/* x P(x^2) / Q(x^2), a minimax fit of tanh within 4e-7 of it; the coefficients are those of Eigen's ptanh for floats,
   beyond |x| = 7.9 tanh is 1 in float32. Not-a-number comes through, for it is neither below nor above. */
INLINE float tanh_of(float x) {
  x = 7.90531110763549805f < x ? 7.90531110763549805f : x;
  x = -7.90531110763549805f > x ? -7.90531110763549805f : x;
  const float s = x * x;
  float p = -2.76076847742355e-16f * s + 2.00018790482477e-13f;
  p = p * s + -8.60467152213735e-11f;
  p = p * s + 5.12229709037114e-08f;
  p = p * s + 1.48572235717979e-05f;
  p = p * s + 6.37261928875436e-04f;
  p = p * s + 4.89352455891786e-03f;
  float q = 1.19825839466702e-06f * s + 1.18534705686654e-04f;
  q = q * s + 2.26843463243900e-03f;
  q = q * s + 4.89352518554385e-03f;
  return x * p / q;
}

CLONES static void activate(float *restrict layer, const float *restrict bias, int64_t rows, int64_t width, int tanh) {
  for (int64_t i = 0; i < rows; i++, layer += width)
    if (tanh)
      for (int64_t j = 0; j < width; j++) layer[j] = tanh_of(layer[j] + bias[j]);
    else
      for (int64_t j = 0; j < width; j++) {
        const float y = layer[j] + bias[j];
        layer[j] = 0.0f > y ? 0.0f : y;
      }
}

/* Numbers that `work` must hold. */
__attribute__((visibility("default"))) int64_t perceptron_work(const perceptron *net) {
  int64_t weights = 0, wide = most(net);
  for (int64_t k = 0; k < net->layers; k++) weights += net->width[k] * net->width[k + 1];
  return weights + WIDE * (wide > ROWS ? wide : ROWS) + 2 * ROWS * wide;
}

/* The checksum of this file, as who compiled it says: what is called must be what is here. */
__attribute__((visibility("default"))) int64_t perceptron_source(void) { return SOURCE; }

/* out(j, i) = h_i W_j^T + b_j of few outputs: sums along a row instead of blocks that would stand half empty. */
CLONES static void outputs(int64_t rows, int64_t n, int64_t in, const float *restrict h, const float *restrict weight,
                           const float *restrict bias, float *restrict out, int64_t across, int64_t along) {
  for (int64_t i = 0; i < rows; i++, h += in)
    for (int64_t j = 0; j < n; j++) {
      const float *w = weight + j * in;
      vec sum = {0};
      int64_t k = 0;
      for (; k + 8 <= in; k += 8) sum += *(const vec *)(h + k) * *(const vec *)(w + k);
      float total = bias[j];
      for (int l = 0; l < 8; l++) total += sum[l];
      for (; k < in; k++) total += h[k] * w[k];
      out[j * across + i * along] = total;
    }
}

/* Slopes through f, whose values are `layer`: 1 - h^2, or whether h is above 0. */
CLONES static void through(int64_t count, const float *restrict layer, float *restrict slopes, int tanh) {
  if (tanh)
    for (int64_t i = 0; i < count; i++) slopes[i] *= 1.0f - layer[i] * layer[i];
  else
    for (int64_t i = 0; i < count; i++) slopes[i] = layer[i] > 0.0f ? slopes[i] : 0.0f;
}

/* gradient_j += sum_i A(i, j) with A(i, j) = a[i da + j dk]. */
CLONES static void add_columns(int64_t rows, int64_t n, const float *restrict a, int64_t da, int64_t dk,
                               float *restrict gradient) {
  if (dk == 1)
    for (int64_t i = 0; i < rows; i++)
      for (int64_t j = 0; j < n; j++) gradient[j] += a[i * da + j];
  else
    for (int64_t j = 0; j < n; j++) {
      float sum = 0.0f;
      for (int64_t i = 0; i < rows; i++) sum += a[i * da + j * dk];
      gradient[j] += sum;
    }
}

EXPORT void perceptron_forward(const perceptron *net, const float *x) {
  float *pad = net->work, *turned = pad + WIDE * (most(net) > ROWS ? most(net) : ROWS);
  const int64_t top = net->layers - 1, last = net->width[net->layers];
  const float *weights[LAYERS];
  for (int64_t k = 0; k < top; k++) {
    const int64_t in = net->width[k], out = net->width[k + 1];
    weights[k] = net->weight[k];
    if (net->transposed) continue;
    for (int64_t from = 0; from < out; from += WIDE) /* a cache line of what is written at a time */
      for (int64_t i = 0; i < in; i++)
        for (int64_t j = from; j < out && j < from + WIDE; j++) turned[i * out + j] = net->weight[k][j * in + i];
    weights[k] = turned, turned += in * out;
  }
  for (int64_t at = 0; at < net->rows; at += ROWS) {
    const int64_t rows = net->rows - at < ROWS ? net->rows - at : ROWS;
    const float *below = x + at * net->width[0];
    for (int64_t k = 0; k < top; k++) {
      const int64_t in = net->width[k], out = net->width[k + 1];
      float *own = net->hidden[k] + at * out;
      product(rows, out, in, below, in, 1, weights[k], out, own, out, 0, pad);
      activate(own, net->bias[k], rows, out, net->tanh);
      below = own;
    }
    outputs(rows, last, net->width[top], below, net->weight[top], net->bias[top], net->out + at * net->along, net->across,
            net->along);
  }
}

/* `slopes` [out, rows]: of the loss, with respect to each output. */
EXPORT void perceptron_backward(const perceptron *net, const float *x, const float *slopes) {
  const int64_t wide = most(net), top = net->layers - 1;
  float *pad = net->work, *one = pad + WIDE * (wide > ROWS ? wide : ROWS), *other = one + ROWS * wide;
  for (int64_t at = 0; at < net->rows; at += ROWS) {
    const int64_t rows = net->rows - at < ROWS ? net->rows - at : ROWS;
    const float *above = slopes + at; /* A(i, k) of it at above[i + k rows] for the last layer, row by row for the others */
    int64_t da = 1, dk = net->rows;
    float *own = one, *next = other;
    for (int64_t k = top; k >= 0; k--) {
      const int64_t in = net->width[k], out = net->width[k + 1];
      const float *below = k ? net->hidden[k - 1] + at * in : x + at * in;
      add_product(out, in, rows, above, dk, da, below, net->weight_gradient[k], pad);
      add_columns(rows, out, above, da, dk, net->bias_gradient[k]);
      if (!k) break;
      product(rows, in, out, above, da, dk, net->weight[k], in, own, in, 0, pad);
      through(rows * in, below, own, net->tanh);
      above = own, da = in, dk = 1;
      float *swap = own;
      own = next, next = swap;
    }
  }
}

#define HALF_LOG_TAU 0.91893853320467274178f

/* pi = softmax(z) of z [actions, n]: log pi and pi [actions, n], log pi of the action chosen and the entropy [n], nats.
   Returns 0, or one more than the place of an action that there is not. */
EXPORT int64_t softmax_forward(int64_t n, int64_t actions, const float *z, const int64_t *chosen, float *logs, float *p,
                            float *logp, float *entropy) {
  for (int64_t i = 0; i < n; i++) {
    if (chosen[i] < 0 || chosen[i] >= actions) return i + 1;
    float top = z[i], sum = 0.0f, negative = 0.0f;
    for (int64_t a = 1; a < actions; a++)
      if (!(z[a * n + i] <= top)) top = z[a * n + i]; /* what is not a number comes through */
    for (int64_t a = 0; a < actions; a++) sum += p[a * n + i] = expf(z[a * n + i] - top);
    const float log_sum = logf(sum), share = 1.0f / sum;
    for (int64_t a = 0; a < actions; a++) {
      logs[a * n + i] = z[a * n + i] - top - log_sum;
      p[a * n + i] *= share;
      negative += p[a * n + i] * logs[a * n + i];
    }
    logp[i] = logs[chosen[i] * n + i];
    entropy[i] = -negative;
  }
  return 0;
}

/* d/dz: of log pi(a) it is e_a - pi, of H it is -pi (log pi + H); either slope [n] may be missing. */
EXPORT void softmax_backward(int64_t n, int64_t actions, const int64_t *chosen, const float *logs, const float *p,
                             const float *entropy, const float *to_logp, const float *to_entropy, float *to_z) {
  for (int64_t a = 0; a < actions; a++)
    for (int64_t i = 0; i < n; i++) {
      const int64_t at = a * n + i;
      float slope = to_logp ? ((chosen[i] == a) - p[at]) * to_logp[i] : 0.0f;
      if (to_entropy) slope -= p[at] * (logs[at] + entropy[i]) * to_entropy[i];
      to_z[at] = slope;
    }
}

/* N(mean, sigma^2) of actions [n, width] with means [width, n]: z = (a - mean) / sigma [width, n] and log pi [n], nats. */
EXPORT void normal_forward(int64_t n, int64_t width, const float *mean, const float *actions, const float *log_std,
                           float *z, float *logp) {
  float still = 0.0f;
  for (int64_t a = 0; a < width; a++) still += log_std[a] + HALF_LOG_TAU;
  for (int64_t i = 0; i < n; i++) logp[i] = 0.0f;
  for (int64_t a = 0; a < width; a++) {
    const float share = expf(-log_std[a]);
    for (int64_t i = 0; i < n; i++) {
      const float own = (actions[i * width + a] - mean[a * n + i]) * share;
      z[a * n + i] = own;
      logp[i] += own * own;
    }
  }
  for (int64_t i = 0; i < n; i++) logp[i] = -0.5f * logp[i] - still;
}

/* d/dmean and d/dlog sigma: of log pi they are z / sigma and z^2 - 1, of H 0 and 1; the second is added to. */
EXPORT void normal_backward(int64_t n, int64_t width, const float *z, const float *log_std, const float *to_logp,
                            const float *to_entropy, float *to_mean, float *to_log_std) {
  for (int64_t a = 0; a < width; a++) {
    const float share = expf(-log_std[a]);
    float sum = 0.0f;
    for (int64_t i = 0; i < n; i++) {
      const float own = z[a * n + i], slope = to_logp ? to_logp[i] : 0.0f;
      to_mean[a * n + i] = slope * own * share;
      sum += slope * (own * own - 1.0f);
      if (to_entropy) sum += to_entropy[i];
    }
    to_log_std[a] += sum;
  }
}
