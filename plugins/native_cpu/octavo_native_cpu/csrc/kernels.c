/* The kernels of octavo_native_cpu: each header below is a template, included once for each element type.
 *
 * Sums are in float32; results are rounded once, to nearest even. Strides and sizes count elements.
 */
#include "numbers.h"

#include "threads.h"
#include "vectors.h"

#include "attention_plan.h"

#define STORE store_bf16
#define LOAD load_bf16
#define READ read_bf16
#define ELEMENT bf16
#define NAME(name) name##_bf16
#include "attention.h"
#include "ops.h"
#define WIDE bf16
#define LOAD_WIDE load_bf16
#define STORE_WIDE store_bf16
#include "norms.h"
#undef NAME
#undef WIDE
#undef LOAD_WIDE
#undef STORE_WIDE

#define WIDE float
#define LOAD_WIDE load_float
#define STORE_WIDE store_float
#define NAME(name) name##_bf16_wide
#include "norms.h"
#undef NAME
#undef STORE
#undef LOAD
#undef READ
#undef ELEMENT

#define STORE store_float
#define LOAD load_float
#define READ read_float
#define ELEMENT float
#define NAME(name) name##_float
#include "attention.h"
#include "ops.h"
#include "norms.h"
