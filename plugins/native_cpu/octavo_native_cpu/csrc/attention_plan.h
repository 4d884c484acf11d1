/* What an attention call reads of a step: made once a step by attention.py, field by field the same. */
#include <stdint.h>

#define MAX_HEAD_DIM 256
#define HEADS_AT_ONCE 8 /* queries that share a read of keys; more are served in turns */
#define TOKENS_AT_ONCE 64
#define TOKENS_AHEAD 32 /* asked of memory before they are used */
#define LINE_BYTES 64
#define PART_GRAIN 64 /* a part of a request is a multiple of this many tokens */

struct plan {
    const int32_t *lens;   /* [num_requests] tokens, 0 for padding */
    const int32_t *table;  /* [num_requests, B] blocks */
    float *scratch;        /* [num_requests, num_kv_heads, num_parts, group, head_dim + 2] where num_parts > 1 */
    int64_t table_stride, num_requests, num_kv_heads, group, head_dim, block_size;
    int64_t window;        /* tokens that a query sees; as many as there are without a window */
    int64_t num_parts, threads;
    float scale;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
