/* Elements, their conversions to and from float, and an exponential that compilers vectorise. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float bits_to_float(uint32_t bits) {
    float x;
    memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t float_to_bits(float x) {
    uint32_t bits;
    memcpy(&bits, &x, sizeof bits);
    return bits;
}

static inline float load_bf16(bf16 x) { return bits_to_float((uint32_t)x << 16); }

/* To nearest, ties to even; the carry of a NaN's payload must not reach its sign. */
static inline bf16 store_bf16(float x) {
    const uint32_t bits = float_to_bits(x);
    const uint32_t rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return (bf16)((bits & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

static inline float load_float(float x) { return x; }
static inline float store_float(float x) { return x; }

/* e^x = 2^n e^r with n = round(x / ln 2), |r| <= 0.3466, e^r by Taylor's polynomial of degree 7.
 *
 * The rest is below r^8 / 8! e^|r| < 2^-27, the products n ln 2 are exact to 2^-30 in two parts, and Horner's scheme errs
 * by less than 2 units of 2^-24: the relative error is below 3 * 2^-24. Above 88.73 it is inf; below -86 it is 0, which
 * the least normal number is not far from. 2^n is made of 2^(n - 1), since n may be 128.
 */
static inline float exponential(float x) {
    const float shift = 0x1.8p23f, at_most = x > 89.0f ? 89.0f : x, in_range = at_most < -86.0f ? -86.0f : at_most;
    const float n = (in_range * 0x1.715476p0f + shift) - shift;
    const float r = (in_range - n * 0x1.62e4p-1f) - n * 0x1.7f7d1cp-20f;
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    const float half_power = bits_to_float((uint32_t)((int32_t)n + 126) << 23);
    return x < -86.0f ? 0.0f : p * half_power * 2.0f;
}
