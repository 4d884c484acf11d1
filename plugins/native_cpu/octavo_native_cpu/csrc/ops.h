/* The gated activation, and rotary embeddings with the write of keys and values into plain pages. */

struct NAME(silu) {
    const ELEMENT *x;
    ELEMENT *out;
    int64_t width, stride;
};

static void NAME(silu_rows)(const void *data, int64_t begin, int64_t end) {
    const struct NAME(silu) *s = data;
    for (int64_t i = begin; i < end; i++) {
        const ELEMENT *gate = s->x + i * s->stride, *up = gate + s->width;
        ELEMENT *restrict out = s->out + i * s->width;
#pragma omp simd
        for (int64_t j = 0; j < s->width; j++) {
            const float g = LOAD(gate[j]);
            const ELEMENT silu = STORE(g / (1.0f + exponential(-g)));
            out[j] = STORE(LOAD(silu) * LOAD(up[j]));
        }
    }
}

/* x [count, 2 width] -> out [count, width] contiguous; silu is rounded before the product, as torch rounds it. */
void NAME(silu_and_mul)(const ELEMENT *x, ELEMENT *out, int64_t count, int64_t width, int64_t stride, int64_t threads) {
    const struct NAME(silu) s = {x, out, width, stride};
    share_evenly(NAME(silu_rows), &s, count, threads);
}

struct NAME(rotary) {
    ELEMENT *x;
    const int32_t *positions;
    const float *table;
    int64_t heads, head_dim, token_stride, head_stride;
    const ELEMENT *v;
    ELEMENT *k_pages, *v_pages;
    const int64_t *slots;
    int64_t first_key, v_token_stride, v_head_stride, block_size, page_stride;
};

/* Pairs (x[i], x[i + D / 2]) turned by the position's angles: Su et al. 2021, eq. 34. */
static void NAME(turn)(ELEMENT *x, const float *restrict cos, int64_t half) {
    const float *restrict sin = cos + half;
    ELEMENT *restrict low = x, *restrict high = x + half;
#pragma omp simd
    for (int64_t i = 0; i < half; i++) {
        const float a = LOAD(low[i]), b = LOAD(high[i]);
        low[i] = STORE(a * cos[i] - b * sin[i]);
        high[i] = STORE(b * cos[i] + a * sin[i]);
    }
}

static void NAME(write_token)(const struct NAME(rotary) *r, const ELEMENT *keys, const ELEMENT *values, int64_t slot) {
    const int64_t page = slot / r->block_size * r->page_stride;
    const size_t bytes = (size_t)r->head_dim * sizeof(ELEMENT);
    for (int64_t h = 0; h < r->heads - r->first_key; h++) {
        const int64_t place = page + (h * r->block_size + slot % r->block_size) * r->head_dim;
        memcpy(r->k_pages + place, keys + h * r->head_stride, bytes);
        memcpy(r->v_pages + place, values + h * r->v_head_stride, bytes);
    }
}

static void NAME(rotary_tokens)(const void *data, int64_t begin, int64_t end) {
    const struct NAME(rotary) *r = data;
    for (int64_t t = begin; t < end; t++) {
        ELEMENT *x = r->x + t * r->token_stride;
        for (int64_t h = 0; h < r->heads; h++)
            NAME(turn)(x + h * r->head_stride, r->table + r->positions[t] * r->head_dim, r->head_dim / 2);
        if (r->slots && r->slots[t] >= 0)
            NAME(write_token)(r, x + r->first_key * r->head_stride, r->v + t * r->v_token_stride, r->slots[t]);
    }
}

/* x [count, heads, head_dim] in place; table [max_len, head_dim]: cosines, then sines. */
void NAME(rotary)(ELEMENT *x, const int32_t *positions, const float *table, int64_t count, int64_t heads,
                  int64_t head_dim, int64_t token_stride, int64_t head_stride, int64_t threads) {
    const struct NAME(rotary) r = {.x = x,
                                   .positions = positions,
                                   .table = table,
                                   .heads = heads,
                                   .head_dim = head_dim,
                                   .token_stride = token_stride,
                                   .head_stride = head_stride};
    share_evenly(NAME(rotary_tokens), &r, count, threads);
}

/* The same; then heads from first_key on, and v with them, into pages [N, keys, block_size, head_dim]. Slot -1 writes
 * nothing. */
void NAME(rotary_and_write)(ELEMENT *x, const ELEMENT *v, const int32_t *positions, const float *table,
                            ELEMENT *k_pages, ELEMENT *v_pages, const int64_t *slots, int64_t count, int64_t heads,
                            int64_t first_key, int64_t head_dim, int64_t block_size, int64_t token_stride,
                            int64_t head_stride, int64_t v_token_stride, int64_t v_head_stride, int64_t page_stride,
                            int64_t threads) {
    const struct NAME(rotary) r = {.x = x,
                                   .positions = positions,
                                   .table = table,
                                   .heads = heads,
                                   .head_dim = head_dim,
                                   .token_stride = token_stride,
                                   .head_stride = head_stride,
                                   .v = v,
                                   .k_pages = k_pages,
                                   .v_pages = v_pages,
                                   .slots = slots,
                                   .first_key = first_key,
                                   .v_token_stride = v_token_stride,
                                   .v_head_stride = v_head_stride,
                                   .block_size = block_size,
                                   .page_stride = page_stride};
    share_evenly(NAME(rotary_tokens), &r, count, threads);
}
