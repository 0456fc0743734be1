/* What stands between the linear layers of a small net, there and back: activations and layer norms. simd.h and functions.h
   come before. Not-a-number comes through all of it. */

enum { RELU, TANH, SIGMOID, SILU, GELU, GELU_BY_TANH, ELU, LEAKY_RELU, SOFTPLUS }; /* as laying.py counts them */

typedef struct {
  int64_t there;
  double eps;
  const float *scale, *shift; /* [width] gamma and beta, where there are any */
  float *scale_gradient, *shift_gradient;
  float *standard; /* [rows, width] what gamma is multiplied with, and */
  float *share;    /* [rows] 1 / sigma, where there is a way back */
} norm;

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

/* tanh or a rectifier after a bias. */
static void activate(float *restrict layer, const float *restrict bias, int64_t rows, int64_t width, int tanh) {
  for (int64_t i = 0; i < rows; i++, layer += width)
    if (tanh)
      for (int64_t j = 0; j < width; j++) layer[j] = tanh_of(layer[j] + bias[j]);
    else
      for (int64_t j = 0; j < width; j++) {
        const float y = layer[j] + bias[j];
        layer[j] = 0.0f > y ? 0.0f : y;
      }
}

/* Slopes through tanh or a rectifier, whose values are `layer`: 1 - h^2, or whether h is above 0. */
static void through(int64_t count, const float *restrict layer, float *restrict slopes, int tanh) {
  if (tanh)
    for (int64_t i = 0; i < count; i++) slopes[i] *= 1.0f - layer[i] * layer[i];
  else
    for (int64_t i = 0; i < count; i++) slopes[i] = layer[i] > 0.0f ? slopes[i] : 0.0f;
}

INLINE reg choose(flags where, reg yes, reg no) { return (reg)((where & (flags)yes) | (~where & (flags)no)); }

INLINE reg load(const float *from, int64_t some) {
  if (some == LANES) return *(const reg *)from;
  reg found = {0};
  memcpy(&found, from, some * sizeof *from);
  return found;
}

INLINE void store(float *to, int64_t some, reg x) {
  if (some == LANES) *(reg *)to = x;
  else memcpy(to, &x, some * sizeof *to);
}

/* f(x) and f'(x). */
typedef struct {
  reg value, slope;
} curve;

INLINE curve sigmoid_at(reg x, float a) {
  const reg s = sigmoids(x);
  return (curve){s, s * (1.0f - s)};
}

/* x s(x) (Hendrycks & Gimpel 2016; Elfwing et al. 2018), f' = s (1 + x (1 - s)). */
INLINE curve silu_at(reg x, float a) {
  const reg s = sigmoids(x);
  return (curve){x * s, s * (1.0f + x * (1.0f - s))};
}

/* x Phi(x) (Hendrycks & Gimpel 2016), f' = Phi + x phi. Phi(-|x|) = e^(-x^2 / 2) t P(t) with t = 1 / (1 + p |x| / sqrt 2) is half
   of 7.1.26 of Abramowitz & Stegun, within 8e-8, which needs no other exponential than phi does. */
INLINE curve gelu_at(reg x, float a) {
  const reg size = (reg)((flags)x & 0x7fffffff), e = exps_of(-0.5f * x * x), t = 1.0f / (1.0f + 0.231641888f * size);
  reg p = t * 0.5307027145f + -0.7265760135f;
  p = p * t + 0.7107068705f;
  p = p * t + -0.142248368f;
  p = p * t + 0.127414796f;
  const reg tail = p * t * e, share = choose(x < (reg){0}, tail, 1.0f - tail);
  return (curve){x * share, share + 0.398942280401432678f * x * e};
}

/* x (1 + tanh u) / 2 = x s(2u) with u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016). */
INLINE curve gelu_by_tanh_at(reg x, float a) {
  const reg square = x * x, s = sigmoids(1.59576912160573071f * (x + 0.044715f * (x * square)));
  return (curve){x * s, s + x * s * (1.0f - s) * (1.59576912160573071f + 0.214064498f * square)};
}

/* x above 0, a (e^x - 1) elsewhere (Clevert et al. 2016). */
INLINE curve elu_at(reg x, float a) {
  const flags above = x > (reg){0};
  const reg e = exps_of(choose(above, (reg){0}, x));
  return (curve){choose(above, x, a * (e - 1.0f)), choose(above, (reg){0} + 1.0f, a * e)};
}

INLINE curve leaky_relu_at(reg x, float a) {
  const flags above = x > (reg){0};
  return (curve){choose(above, x, a * x), choose(above, (reg){0} + 1.0f, (reg){0} + a)};
}

/* log(1 + e^x) = max(0, x) + log(1 + e) with e = e^-|x|, and log(1 + e) = 2 artanh(s), s = e / (2 + e) <= 1/3, whose series is
   cut where 2 s^15 / 15 < 1e-8. */
INLINE curve softplus_at(reg x, float a) {
  const flags above = x > (reg){0};
  const reg e = exps_of((reg)((flags)x | (flags)((patterns){0} + 0x80000000u))), s = e / (2.0f + e), square = s * s;
  reg p = square * (1.0f / 13.0f) + 1.0f / 11.0f;
  p = p * square + 1.0f / 9.0f;
  p = p * square + 1.0f / 7.0f;
  p = p * square + 1.0f / 5.0f;
  p = p * square + 1.0f / 3.0f;
  p = p * square + 1.0f;
  const reg share = 1.0f / (1.0f + e);
  return (curve){choose(above, x, (reg){0}) + 2.0f * s * p, choose(above, share, e * share)};
}

/* Numbers through f, in place, and its slopes there if they are kept. */
static void bend(int64_t kind, float a, int64_t count, float *restrict y, float *restrict slopes) {
#define ALONG(rule)                                       \
  for (int64_t i = 0; i < count; i += LANES) {            \
    const int64_t some = least(LANES, count - i);         \
    const curve found = rule(load(y + i, some), a);       \
    store(y + i, some, found.value);                      \
    if (slopes) store(slopes + i, some, found.slope);     \
  }                                                       \
  return;
  switch (kind) {
    case SIGMOID: ALONG(sigmoid_at)
    case SILU: ALONG(silu_at)
    case GELU: ALONG(gelu_at)
    case GELU_BY_TANH: ALONG(gelu_by_tanh_at)
    case ELU: ALONG(elu_at)
    case LEAKY_RELU: ALONG(leaky_relu_at)
    case SOFTPLUS: ALONG(softplus_at)
  }
#undef ALONG
  if (kind == TANH)
    for (int64_t i = 0; i < count; i++) y[i] = tanh_of(y[i]);
  else
    for (int64_t i = 0; i < count; i++) y[i] = 0.0f > y[i] ? 0.0f : y[i];
  if (!slopes) return;
  for (int64_t i = 0; i < count; i++) slopes[i] = 1.0f;
  through(count, y, slopes, kind == TANH);
}

/* Eight numbers, or as many as there are and 0. A loop over those left over would be summed one by one or four at a time, with
   products rounded or not, as the compiler likes it for a processor. */
INLINE vec eight(const float *from, int64_t some) {
  if (some >= 8) return *(const vec *)from;
  vec found = {0};
  memcpy(&found, from, some * sizeof *from);
  return found;
}

INLINE float row_sum(int64_t n, const float *x) {
  vec sum = {0};
  for (int64_t j = 0; j < n; j += 8) sum += eight(x + j, n - j);
  return sum_of(sum);
}

INLINE float row_product(int64_t n, const float *x, const float *y) {
  vec sum = {0};
  for (int64_t j = 0; j < n; j += 8) sum += eight(x + j, n - j) * eight(y + j, n - j);
  return sum_of(sum);
}

/* z = x + bias, if there is one; y = gamma x^ + beta with x^ = (z - mean z) / sigma and sigma^2 = mean (z - mean z)^2 + eps, means
   along a row (Ba, Kiros & Hinton 2016, eq. 4). In place; rows of what is kept begin at `at`. */
static void norm_up(const norm *own, int64_t at, int64_t rows, int64_t width, const float *bias, float *x) {
  for (int64_t i = at; i < at + rows; i++, x += width) {
    for (int64_t j = 0; bias && j < width; j++) x[j] += bias[j];
    const float mean = row_sum(width, x) / width;
    for (int64_t j = 0; j < width; j++) x[j] -= mean;
    const float share = 1.0f / sqrtf(row_product(width, x, x) / width + (float)own->eps);
    for (int64_t j = 0; j < width; j++) x[j] *= share;
    if (own->share) {
      memcpy(own->standard + i * width, x, width * sizeof *x);
      own->share[i] = share;
    }
    for (int64_t j = 0; own->scale && j < width; j++) x[j] *= own->scale[j];
    for (int64_t j = 0; own->shift && j < width; j++) x[j] += own->shift[j];
  }
}

/* The way back of dy, in place, the gradients of gamma and beta added to: with g = gamma dy,
   dz = (g - mean g - x^ mean(g x^)) / sigma, for dx^_j/dz_k = (delta_jk - 1/n - x^_j x^_k / n) / sigma. */
static void norm_down(const norm *own, int64_t at, int64_t rows, int64_t width, float *slopes) {
  for (int64_t i = at; i < at + rows; i++, slopes += width) {
    const float *x = own->standard + i * width, share = own->share[i];
    for (int64_t j = 0; own->scale && j < width; j++) own->scale_gradient[j] += slopes[j] * x[j];
    for (int64_t j = 0; own->shift && j < width; j++) own->shift_gradient[j] += slopes[j];
    for (int64_t j = 0; own->scale && j < width; j++) slopes[j] *= own->scale[j];
    const float mean = row_sum(width, slopes) / width, slant = row_product(width, slopes, x) / width;
    for (int64_t j = 0; j < width; j++) slopes[j] = (slopes[j] - mean - x[j] * slant) * share;
  }
}
