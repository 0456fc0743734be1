/* Small networks by hand, compiled: what perceptrons.py and small.py do in a hundred calls, in five.

   A perceptron over many states, a few rows at a time so that its layers stay in the nearest cache:

       h_0 = x,  h_k = f(h_{k-1} W_k^T + b_k),  out = h_{K-1} W_K^T + b_K           (perceptron_forward)
       and the chain rule of it, gradients added to what is there                   (perceptron_backward)

   f is an activation, with a layer norm before it or behind it or both, or none (between.h);

   and the two heads, from outputs to log-probabilities and entropies and back. All numbers are float32, row by row
   without gaps; actions stand along the first axis of what belongs to n states. Nothing is allocated here. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "../native/simd.h"

#include "../native/functions.h"

#include "between.h"

#define LAYERS 8
#define ROWS 96   /* states at a time: their layers of 64 fill half a cache of 64 KiB */
#define WIDE (2 * LANES) /* columns of C that are summed in registers, of HIGH rows */

typedef struct {
  int64_t width; /* of its outputs */
  const float *weight; /* [out, in]; [in, out] of a hidden layer if the net is transposed */
  const float *bias;   /* [out], if there is one */
  float *weight_gradient, *bias_gradient;
  int64_t activation; /* of a hidden layer, as everything from here on */
  double strength;    /* ELU's alpha, LeakyReLU's slope below 0 */
  norm before, behind; /* the activation */
  float *hidden;       /* [rows, out] */
  float *slopes;       /* [rows, out] of the activation, where they cannot be told from `hidden` and there is a way back */
} layer;

typedef struct {
  int64_t rows, layers, transposed, inputs;
  layer layer[LAYERS];
  float *out;            /* output j in state i at out[j across + i along] */
  int64_t across, along;
  float *work;           /* see perceptron_work */
} perceptron;

static int64_t most(const perceptron *net) {
  int64_t found = net->inputs;
  for (int64_t k = 0; k < net->layers; k++)
    if (net->layer[k].width > found) found = net->layer[k].width;
  return found;
}

/* Numbers that layer k reads. */
INLINE int64_t inputs_of(const perceptron *net, int64_t k) { return k ? net->layer[k - 1].width : net->inputs; }

/* C[high, parts LANES] (+)= A B with A(i, k) = a[i da + k dk] and B(k, .) = b + k db; the first `columns` columns of it. */
INLINE void block(const int high, const int parts, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                  int64_t db, float *c, int64_t dc, int64_t columns, int add) {
  reg sum[HIGH][2];
  UNROLL for (int i = 0; i < high; i++) sum[i][0] = sum[i][1] = (reg){0};
  for (int64_t k = 0; k < depth; k++) {
    const reg left = *(const reg *)(b + k * db), right = *(const reg *)(b + k * db + LANES * (parts - 1));
    UNROLL for (int i = 0; i < high; i++) {
      const float one = a[i * da + k * dk];
      sum[i][0] += one * left;
      if (parts == 2) sum[i][1] += one * right;
    }
  }
  const int whole = columns == LANES * parts;
  float own[HIGH * WIDE];
  if (whole && add) {
    UNROLL for (int i = 0; i < high; i++)
      for (int j = 0; j < parts; j++) *(reg *)(c + i * dc + LANES * j) += sum[i][j];
    return;
  }
  UNROLL for (int i = 0; i < high; i++)
    for (int j = 0; j < parts; j++) *(reg *)((whole ? c + i * dc : own + i * WIDE) + LANES * j) = sum[i][j];
  if (whole) return;
  for (int i = 0; i < high; i++)
    for (int64_t j = 0; j < columns; j++) c[i * dc + j] = add ? c[i * dc + j] + own[i * WIDE + j] : own[i * WIDE + j];
}

/* C[m, n] (+)= A B; `pad` holds [depth, WIDE] for columns that do not fill a block. */
static void product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b, int64_t db,
                    float *c, int64_t dc, int add, float *pad) {
  for (int64_t j = 0; j < n; j += WIDE) {
    const int64_t columns = least(WIDE, n - j);
    const float *from = b + j;
    int64_t step = db;
    if (columns % LANES) {
      for (int64_t k = 0; k < depth; k++)
        for (int64_t i = 0; i < WIDE; i++) pad[k * WIDE + i] = i < columns ? b[k * db + j + i] : 0.0f;
      from = pad, step = WIDE;
    }
#define CALL(high)                                                                                                         \
  if (columns > LANES) block(high, 2, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add);            \
  else block(high, 1, depth, a + i * da, da, dk, from, step, c + i * dc + j, dc, columns, add)
    for (int64_t i = 0, high; i < m; i += high) {
      high = next_high(m - i);
      FOR_HIGH(high, CALL)
    }
#undef CALL
  }
}

/* C[m, n] += A B; where few columns would leave blocks half empty and A lies column by column, C^T = B^T A^T. */
static void add_product(int64_t m, int64_t n, int64_t depth, const float *a, int64_t da, int64_t dk, const float *b,
                        float *restrict c, float *restrict pad) {
  if (n > 8 || m % 16 || da != 1) {
    product(m, n, depth, a, da, dk, b, n, c, n, 1, pad);
    return;
  }
  product(n, m, depth, b, 1, n, a, dk, pad, m, 0, pad); /* whole blocks, which leave `pad` alone */
  for (int64_t i = 0; i < m; i++)
    for (int64_t j = 0; j < n; j++) c[i * n + j] += pad[j * m + i];
}

/* Numbers that `work` must hold. */
EXPORT int64_t perceptron_work(const perceptron *net) {
  int64_t weights = 0, wide = most(net);
  for (int64_t k = 0; k < net->layers; k++) weights += inputs_of(net, k) * net->layer[k].width;
  return weights + WIDE * (wide > ROWS ? wide : ROWS) + 2 * ROWS * wide;
}

/* The checksum of this file, as who compiled it says: what is called must be what is here. */
EXPORT int64_t perceptron_source(void) { return SOURCE; }

/* out(j, i) = h_i W_j^T + b_j of few outputs, or without b: sums along a row instead of blocks that would stand half empty. */
static void outputs(int64_t rows, int64_t n, int64_t in, const float *restrict h, const float *restrict weight,
                    const float *restrict bias, float *restrict out, int64_t across, int64_t along) {
  for (int64_t i = 0; i < rows; i++, h += in)
    for (int64_t j = 0; j < n; j++) {
      const float *w = weight + j * in;
      vec sum = {0};
      int64_t k = 0;
      for (; k + 8 <= in; k += 8) sum += *(const vec *)(h + k) * *(const vec *)(w + k);
      float total = bias ? bias[j] : 0.0f;
      for (int l = 0; l < 8; l++) total += sum[l];
      for (; k < in; k++) total += h[k] * w[k];
      out[j * across + i * along] = total;
    }
}

/* gradient_j += sum_i A(i, j) with A(i, j) = a[i da + j dk]. */
static void add_columns(int64_t rows, int64_t n, const float *restrict a, int64_t da, int64_t dk,
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

/* What a pass works in: products' padding, weights turned over, and slopes of the layers of a few rows. */
typedef struct {
  float *pad, *turned, *one, *other;
} room;

INLINE room room_of(const perceptron *net) {
  const int64_t wide = most(net);
  room own;
  own.pad = net->work;
  own.one = own.pad + WIDE * (wide > ROWS ? wide : ROWS);
  own.other = own.one + ROWS * wide;
  own.turned = own.other + ROWS * wide;
  return own;
}

/* Find the hidden layers' weights as [in, out]. */
INLINE void turn(const perceptron *net, float *turned, const float **weights) {
  for (int64_t k = 0; k < net->layers - 1; k++) {
    const int64_t in = inputs_of(net, k), out = net->layer[k].width;
    weights[k] = net->layer[k].weight;
    if (net->transposed) continue;
    for (int64_t from = 0; from < out; from += 16) /* a cache line of what is written at a time */
      for (int64_t i = 0; i < in; i++)
        for (int64_t j = from; j < out && j < from + 16; j++) turned[i * out + j] = net->layer[k].weight[j * in + i];
    weights[k] = turned, turned += in * out;
  }
}

/* What stands between a linear layer without its bias and the next one, of a few rows. */
INLINE void forth(const layer *own, int64_t at, int64_t rows, float *y) {
  const int64_t width = own->width;
  if (!own->before.there && !own->behind.there && own->activation <= TANH && own->bias) {
    activate(y, own->bias, rows, width, own->activation == TANH);
    return;
  }
  if (own->before.there) norm_up(&own->before, at, rows, width, own->bias, y);
  else
    for (int64_t i = 0; own->bias && i < rows; i++)
      for (int64_t j = 0; j < width; j++) y[i * width + j] += own->bias[j];
  bend(own->activation, (float)own->strength, rows * width, y, own->slopes ? own->slopes + at * width : 0);
  if (own->behind.there) norm_up(&own->behind, at, rows, width, 0, y);
}

/* And the way back of it, in place; `y` is what came of it. */
INLINE void back(const layer *own, int64_t at, int64_t rows, const float *y, float *restrict slopes) {
  const int64_t width = own->width;
  if (own->behind.there) norm_down(&own->behind, at, rows, width, slopes);
  const float *restrict kept = own->slopes + at * width;
  if (own->slopes)
    for (int64_t i = 0; i < rows * width; i++) slopes[i] *= kept[i];
  else through(rows * width, y, slopes, own->activation == TANH);
  if (own->before.there) norm_down(&own->before, at, rows, width, slopes);
}

/* Few rows, the first of them row `at` of the layers that are kept, through all layers. */
INLINE void up(const perceptron *net, const float *const *weights, int64_t at, int64_t rows, const float *x, float *pad) {
  const int64_t top = net->layers - 1;
  const float *below = x;
  for (int64_t k = 0; k < top; k++) {
    const int64_t in = inputs_of(net, k), out = net->layer[k].width;
    float *own = net->layer[k].hidden + at * out;
    product(rows, out, in, below, in, 1, weights[k], out, own, out, 0, pad);
    forth(&net->layer[k], at, rows, own);
    below = own;
  }
  const layer *last = &net->layer[top];
  outputs(rows, last->width, inputs_of(net, top), below, last->weight, last->bias, net->out + at * net->along, net->across,
          net->along);
}

/* The way back of the same rows; the slope of output j in row i is slopes[j across + i]. */
INLINE void down(const perceptron *net, int64_t at, int64_t rows, const float *x, const float *slopes, int64_t across,
                 const room *place) {
  const float *above = slopes; /* A(i, k) of it at above[i da + k dk]: row by row below the last layer */
  int64_t da = 1, dk = across;
  float *own = place->one, *next = place->other;
  for (int64_t k = net->layers - 1; k >= 0; k--) {
    const layer *here = &net->layer[k];
    const int64_t in = inputs_of(net, k), out = here->width;
    const float *below = k ? here[-1].hidden + at * in : x;
    add_product(out, in, rows, above, dk, da, below, here->weight_gradient, place->pad);
    if (here->bias) add_columns(rows, out, above, da, dk, here->bias_gradient);
    if (!k) break;
    product(rows, in, out, above, da, dk, here->weight, in, own, in, 0, place->pad);
    back(here - 1, at, rows, below, own);
    above = own, da = in, dk = 1;
    float *swap = own;
    own = next, next = swap;
  }
}

EXPORT void perceptron_forward(const perceptron *net, const float *x) {
  const room place = room_of(net);
  const float *weights[LAYERS];
  turn(net, place.turned, weights);
  for (int64_t at = 0; at < net->rows; at += ROWS)
    up(net, weights, at, net->rows - at < ROWS ? net->rows - at : ROWS, x + at * net->inputs, place.pad);
}

/* `slopes` [out, rows]: of the loss, with respect to each output. */
EXPORT void perceptron_backward(const perceptron *net, const float *x, const float *slopes) {
  const room place = room_of(net);
  for (int64_t at = 0; at < net->rows; at += ROWS)
    down(net, at, net->rows - at < ROWS ? net->rows - at : ROWS, x + at * net->inputs, slopes + at, net->rows, &place);
}

#define HALF_LOG_TAU 0.91893853320467274178f

/* pi = softmax(z) of z [actions, n]: log pi and pi [actions, n], log pi of the action chosen and the entropy [n], nats.
   Returns 0, or one more than the place of an action that there is not. */
INLINE int64_t softmax_up(int64_t n, int64_t actions, const float *z, const int64_t *chosen, float *logs, float *p, float *logp,
                          float *entropy) {
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
INLINE void softmax_down(int64_t n, int64_t actions, const int64_t *chosen, const float *logs, const float *p,
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
INLINE void normal_up(int64_t n, int64_t width, const float *mean, const float *actions, const float *log_std, float *z,
                      float *logp) {
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
INLINE void normal_down(int64_t n, int64_t width, const float *z, const float *log_std, const float *to_logp,
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

EXPORT int64_t softmax_forward(int64_t n, int64_t actions, const float *z, const int64_t *chosen, float *logs, float *p,
                               float *logp, float *entropy) {
  return softmax_up(n, actions, z, chosen, logs, p, logp, entropy);
}

EXPORT void softmax_backward(int64_t n, int64_t actions, const int64_t *chosen, const float *logs, const float *p,
                             const float *entropy, const float *to_logp, const float *to_entropy, float *to_z) {
  softmax_down(n, actions, chosen, logs, p, entropy, to_logp, to_entropy, to_z);
}

EXPORT void normal_forward(int64_t n, int64_t width, const float *mean, const float *actions, const float *log_std,
                           float *z, float *logp) {
  normal_up(n, width, mean, actions, log_std, z, logp);
}

EXPORT void normal_backward(int64_t n, int64_t width, const float *z, const float *log_std, const float *to_logp,
                            const float *to_entropy, float *to_mean, float *to_log_std) {
  normal_down(n, width, z, log_std, to_logp, to_entropy, to_mean, to_log_std);
}

/* Steps of PPO's optimiser: S minibatches of `lengths` actions each, which stand end to end in the order in which they
   are learnt from, K in all. An action's loss, of n in its minibatch, is

       w [-min(r A, clip(r, low, high) A) + value (V - R)^2 / 2 - entropy H],  r = exp(logp - old_logp)

   and a step is AdamW's (Loshchilov & Hutter 2019, Algorithm 2), after the gradient was scaled down to the norm `limit`. */
typedef struct {
  int64_t states, gaussian, minibatches, numbers, decayed, taken;
  const float *vector;    /* [states, width] */
  const void *actions;    /* [states] int64, counted from 0; [states, outputs] floats if gaussian */
  const int64_t *order;   /* [K] whose turn it is */
  const int64_t *lengths; /* [S] */
  const float *old_logp, *advantages, *returns, *shares; /* [K]; shares are the w */
  double low, high, value, entropy;
  const float *log_std;    /* [outputs], if gaussian */
  float *log_std_gradient; /* a part of `gradient` */
  float *logp, *entropies, *values; /* [K] what actor and critic say */
  float *weights, *gradient, *m, *v; /* [numbers], the first `decayed` of which decay; `taken` steps were taken before */
  double lr, beta1, beta2, eps, decay, limit; /* limit 0: none */
  float *norms; /* [S] of the gradients, before they were scaled */
  float *work;  /* ROWS (width + 4 outputs) numbers */
} descent;

/* d/dlogp of -min(r A, clip(r, low, high) A): -r A where that is the smaller term; with the shares. */
INLINE void surrogate_slopes(int64_t n, const descent *task, int64_t at, float *slopes) {
  const float low = (float)task->low, high = (float)task->high;
  for (int64_t i = 0; i < n; i++) {
    const float r = expf(task->logp[at + i] - task->old_logp[at + i]), a = task->advantages[at + i];
    const float held = r < low ? low : r > high ? high : r;
    slopes[i] = r * a <= held * a ? -(r * a) * task->shares[at + i] : 0.0f;
  }
}

/* Note what was done in `rows` states, from number `at` of the order on. Returns whether there are all those states. */
INLINE int take_actions(const descent *task, int64_t at, int64_t rows, int64_t size, int64_t *chosen, float *drawn) {
  for (int64_t i = 0; i < rows; i++) {
    const int64_t which = task->order[at + i];
    if (which < 0 || which >= task->states) return 0;
    if (task->gaussian) memcpy(drawn + i * size, (const float *)task->actions + which * size, size * sizeof *drawn);
    else chosen[i] = ((const int64_t *)task->actions)[which];
  }
  return 1;
}

/* What the actor's outputs [size, rows] come to, where values are known: the answers, and the loss's slopes [size, rows] and
   [rows] with respect to outputs and values. There is `room` for 2 size rows numbers. Returns whether there are all those actions. */
INLINE int find_slopes(const descent *task, int64_t at, int64_t rows, int64_t size, const float *outputs, const int64_t *chosen,
                       const float *drawn, float *room, float *slopes, float *to_value) {
  float *first = room, *second = first + ROWS * size, to_logp[ROWS], to_entropy[ROWS];
  if (task->gaussian) {
    float still = 0.0f; /* entropy of a Gaussian, the same in all states */
    for (int64_t a = 0; a < size; a++) still += task->log_std[a] + HALF_LOG_TAU + 0.5f;
    normal_up(rows, size, outputs, drawn, task->log_std, first, task->logp + at);
    for (int64_t i = 0; i < rows; i++) task->entropies[at + i] = still;
  } else if (softmax_up(rows, size, outputs, chosen, first, second, task->logp + at, task->entropies + at)) {
    return 0;
  }
  surrogate_slopes(rows, task, at, to_logp);
  const float entropy = (float)task->entropy, value = (float)task->value;
  for (int64_t i = 0; i < rows; i++) {
    to_entropy[i] = -entropy * task->shares[at + i];
    to_value[i] = value * (task->values[at + i] - task->returns[at + i]) * task->shares[at + i];
  }
  const float *bonus = entropy != 0.0f ? to_entropy : 0;
  if (task->gaussian)
    normal_down(rows, size, first, task->log_std, to_logp, bonus, slopes, task->log_std_gradient);
  else
    softmax_down(rows, size, chosen, first, second, task->entropies + at, to_logp, bonus, slopes);
  return 1;
}

/* Add the gradient of one minibatch, which begins at `from`: ROWS states at a time there and back, whose layers the nets
   keep. Returns whether there are all those states and actions. */
INLINE int add_gradient(const perceptron *actor, const perceptron *critic, const descent *task, int64_t from, int64_t n) {
  const room mine = room_of(actor), theirs = room_of(critic);
  const int64_t width = actor->inputs, size = actor->layer[actor->layers - 1].width;
  float *x = task->work, *kept = x + ROWS * width, *slopes = kept + 2 * ROWS * size, *drawn = slopes + ROWS * size;
  float to_value[ROWS];
  int64_t chosen[ROWS];
  const float *weights[LAYERS], *others[LAYERS];
  perceptron choosing = *actor, valuing = *critic;
  turn(actor, mine.turned, weights);
  turn(critic, theirs.turned, others);
  for (int64_t at = from; at < from + n; at += ROWS) {
    const int64_t rows = from + n - at < ROWS ? from + n - at : ROWS;
    if (!take_actions(task, at, rows, size, chosen, drawn)) return 0;
    for (int64_t i = 0; i < rows; i++)
      memcpy(x + i * width, task->vector + task->order[at + i] * width, width * sizeof *x);
    choosing.across = valuing.across = rows, choosing.along = valuing.along = 1;
    valuing.out = task->values + at;
    up(&choosing, weights, 0, rows, x, mine.pad);
    up(&valuing, others, 0, rows, x, theirs.pad);
    if (!find_slopes(task, at, rows, size, choosing.out, chosen, drawn, kept, slopes, to_value)) return 0;
    down(&choosing, 0, rows, x, slopes, rows, &mine);
    down(&valuing, 0, rows, x, to_value, rows, &theirs);
  }
  return 1;
}

INLINE float norm_of(int64_t n, const float *x) {
  vec sum[4] = {{0}};
  int64_t i = 0;
  for (; i + 32 <= n; i += 32)
    for (int l = 0; l < 4; l++) sum[l] += *(const vec *)(x + i + 8 * l) * *(const vec *)(x + i + 8 * l);
  const vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  float total = 0.0f;
  for (int l = 0; l < 8; l++) total += all[l];
  for (; i < n; i++) total += x[i] * x[i];
  return sqrtf(total);
}

/* Step number `step`, from 1, by the gradient times `share`, which is 0 from then on. */
INLINE void adam_step(const descent *task, int64_t step, float share) {
  const float rate = (float)(task->lr / (1.0 - pow(task->beta1, (double)step))), eps = (float)task->eps;
  const float root = (float)sqrt(1.0 - pow(task->beta2, (double)step));
  const float one = (float)(1.0 - task->beta1), keep = (float)task->beta2, two = (float)(1.0 - task->beta2);
  float *restrict weights = task->weights, *restrict gradient = task->gradient, *restrict m = task->m, *restrict v = task->v;
  for (int part = 0; part < 2; part++) {
    const int64_t from = part ? task->decayed : 0, to = part ? task->numbers : task->decayed;
    const float left = part ? 1.0f : (float)(1.0 - task->lr * task->decay);
    for (int64_t i = from; i < to; i++) {
      const float g = gradient[i] * share;
      m[i] += one * (g - m[i]);
      v[i] = keep * v[i] + two * g * g;
      weights[i] = left * weights[i] - rate * m[i] / (sqrtf(v[i]) / root + eps);
      gradient[i] = 0.0f;
    }
  }
}

/* Step number s, from 0, on the gradient that is there. Returns whether that is finite; nothing is moved if it is not. */
INLINE int step_on(const descent *task, int64_t s) {
  const float norm = task->norms[s] = norm_of(task->numbers, task->gradient);
  if (!isfinite(norm)) return 0;
  const int longer = task->limit > 0.0 && norm > task->limit;
  adam_step(task, task->taken + s + 1, longer ? (float)(task->limit / (norm + 1e-6)) : 1.0f);
  return 1;
}

/* Returns how many steps were taken, which is fewer than S where the next minibatch names what there is not, or its
   gradient is not finite; nothing was moved by that one. */
EXPORT int64_t clipped_descent(const perceptron *actor, const perceptron *critic, const descent *task) {
  int64_t from = 0;
  for (int64_t s = 0; s < task->minibatches; from += task->lengths[s++])
    if (!add_gradient(actor, critic, task, from, task->lengths[s]) || !step_on(task, s)) return s;
  return task->minibatches;
}

/* The same in two halves, for nets that somebody else runs there and back; `work` holds 5 ROWS outputs numbers then.

   The first: what outputs [n, size] and values [n] of the n states from `from` on come to, and the loss's slopes with
   respect to them. Returns whether there are all those actions and every answer is finite. */
EXPORT int64_t clipped_slopes(const descent *task, int64_t size, int64_t from, int64_t n, const float *outputs,
                              const float *values, float *to_outputs, float *to_values) {
  float *across = task->work, *kept = across + ROWS * size, *slopes = kept + 2 * ROWS * size, *drawn = slopes + ROWS * size;
  int64_t chosen[ROWS];
  float sum = 0.0f; /* of zeros, unless an answer is not finite */
  for (int64_t done = 0; done < n; done += ROWS) {
    const int64_t rows = n - done < ROWS ? n - done : ROWS, at = from + done;
    const float *own = outputs + done * size;
    float *back = to_outputs + done * size;
    if (!take_actions(task, at, rows, size, chosen, drawn)) return 0;
    memcpy(task->values + at, values + done, rows * sizeof *values);
    for (int64_t i = 0; i < rows; i++)
      for (int64_t a = 0; a < size; a++) across[a * rows + i] = own[i * size + a];
    if (!find_slopes(task, at, rows, size, across, chosen, drawn, kept, slopes, to_values + done)) return 0;
    for (int64_t i = 0; i < rows; i++) {
      for (int64_t a = 0; a < size; a++) back[i * size + a] = slopes[a * rows + i];
      sum += 0.0f * task->logp[at + i] + 0.0f * task->entropies[at + i] + 0.0f * values[done + i];
    }
  }
  return sum == 0.0f;
}

/* The second: a step on the gradient that has come of it. Returns whether it was taken. */
EXPORT int64_t descent_step(const descent *task, int64_t s) { return step_on(task, s); }
