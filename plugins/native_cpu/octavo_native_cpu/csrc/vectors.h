/* Sixteen floats at a time, in the vector extensions that GCC and clang share, split to what the CPU has. */
#include <stdint.h>
#include <string.h>

#define LANES 16
typedef float floats __attribute__((vector_size(4 * LANES)));
typedef uint32_t words __attribute__((vector_size(4 * LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * LANES)));
typedef float floats8 __attribute__((vector_size(32)));
typedef float floats4 __attribute__((vector_size(16)));

#define INLINE static inline __attribute__((always_inline))

INLINE floats read_float(const float *x) {
    floats values;
    memcpy(&values, x, sizeof values);
    return values;
}

INLINE floats read_bf16(const uint16_t *x) {
    halves values;
    memcpy(&values, x, sizeof values);
    return (floats)(__builtin_convertvector(values, words) << 16);
}

/* Always in this order, so that the same numbers give the same bits. */
INLINE float sum_of(floats x) {
    floats8 a, b;
    memcpy(&a, &x, sizeof a);
    memcpy(&b, (const char *)&x + sizeof a, sizeof b);
    a += b;
    floats4 c, d;
    memcpy(&c, &a, sizeof c);
    memcpy(&d, (const char *)&a + sizeof c, sizeof d);
    c += d;
    return (c[0] + c[2]) + (c[1] + c[3]);
}
