/* Decoding: one query a request attends to its blocks where they lie.
 *
 * Scores are made for a block's tokens, weighed by an online softmax in float32 (Milakov and Gimelshein 2018, alg. 3), and
 * the values added up. All query heads of a KV head share each read. Requests may be cut into parts, which are merged in
 * order: how depends on the plan alone, and not on threads.
 */

struct NAME(call) {
    const struct plan *plan;
    const ELEMENT *q, *k, *v;
    ELEMENT *out;
    float *lse;
    int64_t q_stride, page_stride;
};

/* The state of some heads' softmax: sums of weights relative to e^most, and of values times these. */
struct NAME(state) {
    float q[HEADS_AT_ONCE][MAX_HEAD_DIM];
    float sums[HEADS_AT_ONCE][MAX_HEAD_DIM];
    float weights[HEADS_AT_ONCE][TOKENS_AT_ONCE];
    float most[HEADS_AT_ONCE], total[HEADS_AT_ONCE];
};

INLINE void NAME(score)(struct NAME(state) *s, const ELEMENT *keys, int64_t n, int64_t dim, const int heads) {
    for (int64_t t = 0; t < n; t++) {
        floats sums[HEADS_AT_ONCE];
        for (int h = 0; h < heads; h++)
            sums[h] = (floats){0};
        for (int64_t d = 0; d < dim; d += LANES) {
            const floats key = READ(keys + t * dim + d);
            for (int h = 0; h < heads; h++)
                sums[h] += key * read_float(s->q[h] + d);
        }
        for (int h = 0; h < heads; h++)
            s->weights[h][t] = sum_of(sums[h]);
    }
}

INLINE void NAME(add_values)(struct NAME(state) *s, const ELEMENT *values, int64_t n, int64_t dim, const int heads) {
    for (int64_t d = 0; d < dim; d += LANES) {
        floats sums[HEADS_AT_ONCE];
        for (int h = 0; h < heads; h++)
            sums[h] = read_float(s->sums[h] + d);
        for (int64_t t = 0; t < n; t++) {
            const floats value = READ(values + t * dim + d);
            for (int h = 0; h < heads; h++)
                sums[h] += value * s->weights[h][t];
        }
        for (int h = 0; h < heads; h++)
            memcpy(s->sums[h] + d, &sums[h], sizeof sums[h]);
    }
}

/* Turns head h's scores of n tokens into weights, after rescaling what came before where a larger score is found. */
static inline void NAME(weigh)(struct NAME(state) *s, int h, int64_t n, int64_t dim) {
    float *restrict weights = s->weights[h];
    float most = s->most[h], total = 0;
#pragma omp simd reduction(max : most)
    for (int64_t t = 0; t < n; t++)
        most = weights[t] > most ? weights[t] : most;
    if (most > s->most[h]) {
        const float factor = exponential(s->most[h] - most);
        s->total[h] *= factor;
#pragma omp simd
        for (int64_t d = 0; d < dim; d++)
            s->sums[h][d] *= factor;
    }
#pragma omp simd reduction(+ : total)
    for (int64_t t = 0; t < n; t++)
        total += weights[t] = exponential(weights[t] - most);
    s->most[h] = most;
    s->total[h] += total;
}

INLINE void NAME(attend_heads)(struct NAME(state) *s, const ELEMENT *keys, const ELEMENT *values, int64_t n,
                               int64_t dim, const int heads) {
    NAME(score)(s, keys, n, dim, heads);
    for (int h = 0; h < heads; h++)
        NAME(weigh)(s, h, n, dim);
    NAME(add_values)(s, values, n, dim, heads);
}

/* n tokens of a block; a constant number of heads lets the compiler keep their sums in registers. */
static void NAME(attend_tokens)(struct NAME(state) *s, const ELEMENT *keys, const ELEMENT *values, int64_t n,
                                int64_t dim, int heads) {
    switch (heads) {
        case 1: NAME(attend_heads)(s, keys, values, n, dim, 1); break;
        case 2: NAME(attend_heads)(s, keys, values, n, dim, 2); break;
        case 3: NAME(attend_heads)(s, keys, values, n, dim, 3); break;
        case 4: NAME(attend_heads)(s, keys, values, n, dim, 4); break;
        case 5: NAME(attend_heads)(s, keys, values, n, dim, 5); break;
        case 6: NAME(attend_heads)(s, keys, values, n, dim, 6); break;
        case 7: NAME(attend_heads)(s, keys, values, n, dim, 7); break;
        default: NAME(attend_heads)(s, keys, values, n, dim, 8);
    }
}

/* Where a token's block begins, for one KV head. */
static inline int64_t NAME(place)(const struct NAME(call) *c, const int32_t *blocks, int64_t kv_head, int64_t token) {
    const struct plan *p = c->plan;
    return blocks[token / p->block_size] * c->page_stride + kv_head * p->block_size * p->head_dim;
}

/* Asks for a block's keys and values ahead: processors' own prefetching does not cross from one block to the next. */
static inline void NAME(prefetch)(const struct NAME(call) *c, int64_t place, int64_t tokens) {
    const size_t bytes = (size_t)(tokens * c->plan->head_dim) * sizeof(ELEMENT);
    const char *k = (const char *)(c->k + place), *v = (const char *)(c->v + place);
    for (size_t i = 0; i < bytes; i += LINE_BYTES) {
        __builtin_prefetch(k + i, 0, 2);
        __builtin_prefetch(v + i, 0, 2);
    }
}

/* Tokens begin to end of one request and KV head. */
static void NAME(attend_span)(const struct NAME(call) *c, struct NAME(state) *s, int64_t request, int64_t kv_head,
                              int64_t begin, int64_t end, int heads) {
    const struct plan *p = c->plan;
    const int32_t *blocks = p->table + request * p->table_stride;
    int64_t asked = begin - begin % p->block_size;
    for (int64_t t = begin; t < end;) {
        for (; asked < end && asked < t + TOKENS_AHEAD; asked += p->block_size)
            NAME(prefetch)(c, NAME(place)(c, blocks, kv_head, asked), least(p->block_size, end - asked));
        const int64_t offset = t % p->block_size;
        const int64_t n = least(least(p->block_size - offset, end - t), TOKENS_AT_ONCE);
        const int64_t place = NAME(place)(c, blocks, kv_head, t) + offset * p->head_dim;
        NAME(attend_tokens)(s, c->k + place, c->v + place, n, p->head_dim, heads);
        t += n;
    }
}

static void NAME(start)(const struct NAME(call) *c, struct NAME(state) *s, int64_t request, int64_t head, int heads) {
    const struct plan *p = c->plan;
    for (int h = 0; h < heads; h++) {
        const ELEMENT *q = c->q + request * c->q_stride + (head + h) * p->head_dim;
        for (int64_t d = 0; d < p->head_dim; d++) {
            s->q[h][d] = LOAD(q[d]) * p->scale;
            s->sums[h][d] = 0;
        }
        s->most[h] = -INFINITY;
        s->total[h] = 0;
    }
}

/* Without tokens: zeros, and a log-sum-exp of -inf (contract C3, C8). */
static void NAME(finish)(const struct NAME(call) *c, const float *sums, float most, float total, int64_t row) {
    const int64_t dim = c->plan->head_dim;
    const float scale = total == 0 ? 0.0f : 1.0f / total;
    ELEMENT *out = c->out + row * dim;
    for (int64_t d = 0; d < dim; d++)
        out[d] = STORE(sums[d] * scale);
    if (c->lse)
        c->lse[row] = total == 0 ? -INFINITY : most + logf(total);
}

static void NAME(keep)(const struct plan *p, const float *sums, float most, float total, float *partial) {
    memcpy(partial, sums, (size_t)p->head_dim * sizeof *sums);
    partial[p->head_dim] = most;
    partial[p->head_dim + 1] = total;
}

static float *NAME(partial)(const struct plan *p, int64_t pair, int64_t part, int64_t head) {
    return p->scratch + ((pair * p->num_parts + part) * p->group + head) * (p->head_dim + 2);
}

/* Items are the parts of (request, KV head) pairs. */
static void NAME(attend_parts)(const void *data, int64_t first, int64_t last) {
    const struct NAME(call) *c = data;
    const struct plan *p = c->plan;
    for (int64_t item = first; item < last; item++) {
        const int64_t part = item % p->num_parts, pair = item / p->num_parts;
        const int64_t request = pair / p->num_kv_heads, kv_head = pair % p->num_kv_heads;
        const int64_t len = p->lens[request], seen = least(len, p->window);
        const int64_t each = (seen + p->num_parts * PART_GRAIN - 1) / (p->num_parts * PART_GRAIN) * PART_GRAIN;
        const int64_t begin = len - seen + part * each, end = least(begin + each, len);
        for (int64_t head = 0; head < p->group; head += HEADS_AT_ONCE) {
            const int heads = (int)least(p->group - head, HEADS_AT_ONCE);
            const int64_t row = pair * p->group + head;
            struct NAME(state) s;
            NAME(start)(c, &s, request, kv_head * p->group + head, heads);
            NAME(attend_span)(c, &s, request, kv_head, begin, end, heads);
            for (int h = 0; h < heads; h++)
                if (p->num_parts == 1)
                    NAME(finish)(c, s.sums[h], s.most[h], s.total[h], row + h);
                else
                    NAME(keep)(p, s.sums[h], s.most[h], s.total[h], NAME(partial)(p, pair, part, head + h));
        }
    }
}

/* Adds up a head's parts, in their order. */
static void NAME(merge)(const struct NAME(call) *c, int64_t pair, int64_t head) {
    const struct plan *p = c->plan;
    float sums[MAX_HEAD_DIM] = {0}, most = -INFINITY, total = 0;
    for (int64_t part = 0; part < p->num_parts; part++)
        most = fmaxf(most, NAME(partial)(p, pair, part, head)[p->head_dim]);
    for (int64_t part = 0; part < p->num_parts; part++) {
        const float *partial = NAME(partial)(p, pair, part, head);
        if (partial[p->head_dim + 1] != 0) {
            const float factor = exponential(partial[p->head_dim] - most);
            total += factor * partial[p->head_dim + 1];
            for (int64_t d = 0; d < p->head_dim; d++)
                sums[d] += factor * partial[d];
        }
    }
    NAME(finish)(c, sums, most, total, pair * p->group + head);
}

/* q [R, Hq, D] by stride, pages [N, Hk, block_size, D] by stride -> out [R, Hq, D], and lse [R, Hq] where there is one. */
void NAME(decode)(const struct plan *plan, const ELEMENT *q, int64_t q_stride, const ELEMENT *k, const ELEMENT *v,
                  int64_t page_stride, ELEMENT *out, float *lse) {
    const struct NAME(call) c = {plan, q, k, v, out, lse, q_stride, page_stride};
    const int64_t pairs = plan->num_requests * plan->num_kv_heads;
    share(NAME(attend_parts), &c, pairs * plan->num_parts, 1, plan->threads);
    if (plan->num_parts > 1)
        for (int64_t pair = 0; pair < pairs; pair++)
            for (int64_t head = 0; head < plan->group; head++)
                NAME(merge)(&c, pair, head);
}
