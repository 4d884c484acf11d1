/* RMS norms of rows of WIDE, or of their sums with rows of ELEMENT, whose weights and results are ELEMENT. */

struct NAME(norm) {
    const ELEMENT *x;
    WIDE *rows;
    const ELEMENT *weight;
    ELEMENT *out;
    int64_t width, x_stride, token_stride, heads, head_stride;
    float eps;
};

/* Zhang and Sennrich 2019, eq. 4. */
static void NAME(scale_row)(const WIDE *row, float sum, const struct NAME(norm) *n, ELEMENT *restrict out) {
    const float scale = 1.0f / sqrtf(sum / (float)n->width + n->eps);
    const ELEMENT *weight = n->weight;
#pragma omp simd
    for (int64_t i = 0; i < n->width; i++)
        out[i] = STORE(LOAD_WIDE(row[i]) * scale * LOAD(weight[i]));
}

static void NAME(norm_rows)(const void *data, int64_t begin, int64_t end) {
    const struct NAME(norm) *n = data;
    for (int64_t i = begin; i < end; i++) {
        const WIDE *row = n->rows + i / n->heads * n->token_stride + i % n->heads * n->head_stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n->width; j++)
            sum += LOAD_WIDE(row[j]) * LOAD_WIDE(row[j]);
        NAME(scale_row)(row, sum, n, n->out + i * n->width);
    }
}

static void NAME(add_norm_rows)(const void *data, int64_t begin, int64_t end) {
    const struct NAME(norm) *n = data;
    for (int64_t i = begin; i < end; i++) {
        WIDE *restrict row = n->rows + i * n->token_stride;
        const ELEMENT *restrict x = n->x + i * n->x_stride;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < n->width; j++) {
            const WIDE total = STORE_WIDE(LOAD_WIDE(row[j]) + LOAD(x[j]));
            row[j] = total;
            sum += LOAD_WIDE(total) * LOAD_WIDE(total);
        }
        NAME(scale_row)(row, sum, n, n->out + i * n->width);
    }
}

/* out [count, width] contiguous; row i of x is head i % heads of token i / heads. */
void NAME(rms_norm)(WIDE *x, const ELEMENT *weight, ELEMENT *out, int64_t count, int64_t width, int64_t token_stride,
                    int64_t heads, int64_t head_stride, float eps, int64_t threads) {
    const struct NAME(norm) n = {0, x, weight, out, width, 0, token_stride, heads, head_stride, eps};
    share_evenly(NAME(norm_rows), &n, count, threads);
}

/* residual += x, rounded; out [count, width] contiguous = the norm of that. */
void NAME(add_rms_norm)(const ELEMENT *x, WIDE *residual, const ELEMENT *weight, ELEMENT *out, int64_t count,
                        int64_t width, int64_t x_stride, int64_t residual_stride, float eps, int64_t threads) {
    const struct NAME(norm) n = {x, residual, weight, out, width, x_stride, residual_stride, 1, 0, eps};
    share_evenly(NAME(add_norm_rows), &n, count, threads);
}
