/* Functions of eight numbers of float32 at a time, and of a register of them; simd.h comes before. */

/* e^x of what is not above 0, within 2e-7 of it: 2^n e^r with |r| <= log(2) / 2 and e^r = 1 + r + r^2 P(r), P fitted there; 0
   below -87. Not-a-number comes through. And 1 / (1 + e^-x), from the exponential that does not overflow. */
#define EXPONENTIALS(exponential, logistic, type, whole, pattern)                                                          \
  INLINE type exponential(type x) {                                                                                        \
    const type shifted = x * 1.44269504088896341f + 12582912.0f; /* 1.5 2^23: n stands in its last bits */                 \
    const type n = shifted - 12582912.0f;                                                                                  \
    const type r = (x - n * 0.693359375f) + n * 2.12194440e-4f;                                                            \
    type p = r * 1.3814586e-3f + 8.3687166e-3f;                                                                            \
    p = p * r + 4.1668389e-2f;                                                                                             \
    p = p * r + 1.6666521e-1f;                                                                                             \
    p = p * r + 4.9999994e-1f;                                                                                             \
    const type y = (p * (r * r) + (r + 1.0f)) * (type)(((pattern)shifted << 23) + 0x3f800000u);                            \
    return (type)((whole)y & ~(x < (type){0} - 87.0f));                                                                    \
  }                                                                                                                        \
  INLINE type logistic(type x) {                                                                                           \
    const whole below = x < (type){0};                                                                                     \
    const type e = exponential((type)((below & (whole)x) | (~below & (whole) - x))), s = 1.0f / (1.0f + e);                \
    return (type)((below & (whole)(e * s)) | (~below & (whole)s));                                                         \
  }
EXPONENTIALS(exp_of, sigmoid, vec, ints, bits)
EXPONENTIALS(exps_of, sigmoids, reg, flags, patterns)

INLINE float sum_of(vec x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }
