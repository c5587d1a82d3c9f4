/* The folded module of ops/streamed.py: two passes over X forward, two backward, that project blocks as they come.
 *
 * "Values" are the positions of X themselves, [n, C]; queries and keys exist for a block at a time. Blocks are
 * [Dk, BLOCK] where what comes of them is written position by position, and keys are [BLOCK, Dk] where they are
 * summarized. What has the size of a context is PyTorch's. Returns and NULL are as in operators.c.
 */
#include "softmax.h"

/* X of one sample. */
INLINE Matrix sample_of(const View *x, int64_t batch, const Problem *p) {
    return head_of(x, batch, 0, p->value_channels, p);
}

/* float32 [Dk, C], or its transpose, padded. */
static Block load_weight(const float *weight, int transposed, float **scratch, const Problem *p) {
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = matrix(weight, p->key_channels, p->value_channels);
    const Block block = transposed ? take(scratch, columns, width) : take(scratch, width, columns);
    load(block, transposed ? flipped(x) : x, 0.0f);
    return block;
}

/* Words of a block of X for sums over its channels, [C, BLOCK], 0 where it is masked. */
static Block load_channels(Block xs, Block words, Matrix x, Matrix mask, Span n, int pairs) {
    if (!mask.data) return load_over_rows(xs, words, flipped(rows_in(x, n)), pairs);
    load(xs, flipped(rows_in(x, n)), 0.0f);
    silence_columns(xs, mask, n, 0.0f);
    return over_rows(xs, words, pairs);
}

/* One number for each row. */
INLINE void add_to_rows(Block block, const float *numbers, int64_t rows) {
    for (int64_t r = 0; numbers && r < rows; r++)
        for (int64_t c = 0; c < block.columns; c += LANES)
            STORE(row_of(block, r) + c, LOAD(row_of(block, r) + c) + SPLAT(numbers[r]));
}

/* One number for each column. */
INLINE void add_to_columns(Block block, const float *numbers, int64_t columns) {
    for (int64_t r = 0; numbers && r < block.rows; r++)
        for (int64_t c = 0; c < columns; c++) row_of(block, r)[c] += numbers[c];
}

/* sums += those of rows. */
INLINE void add_sums(float *sums, Block block) {
    for (int64_t r = 0; r < block.rows; r++) {
        vec sum = LOAD(row_of(block, r));
        for (int64_t c = LANES; c < block.columns; c += LANES) sum += LOAD(row_of(block, r) + c);
        for (int i = 0; i < LANES; i++) sums[r] += sum[i];
    }
}

/* total += the sums of columns, as precise as products take them. */
INLINE void add_to_total(float *total, Block keys, int pairs) {
    for (int64_t r = 0; r < keys.rows; r++)
        for (int64_t c = 0; c < keys.columns; c += LANES) {
            const vec key = LOAD(row_of(keys, r) + c);
            STORE(total + c, LOAD(total + c) + (pairs ? widened(narrowed(key)) : key));
        }
}

/* sums [left rows, right columns] += left right, summed over a block. */
INLINE void add_block(int pairs, Left left, Block right, Block sums) {
    for (int64_t r = 0; r < sums.rows; r += ROWS) add_product(pairs, left, r, right, BLOCK, row_of(sums, r));
}

static void summarize_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), mask = mask_of(&call->mask, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const int pairs = in_pairs(p);
    const Block keys = take(&scratch, BLOCK, width), key_words = take(&scratch, BLOCK, width);
    const Block by_position = take(&scratch, BLOCK, columns), position_words = take(&scratch, BLOCK, columns);
    const Block by_channel = {by_position.data, columns, BLOCK}, channel_words = take(&scratch, columns, BLOCK);
    const Block wide = load_weight(call->weight, 1, &scratch, p);
    const Block weight = over_rows(wide, take(&scratch, columns, width), pairs);
    const Partial context = partial_of(call, batch, chunk), run = run_of(context, &scratch, call);
    clear(context, p->softmax), clear(run, p->softmax);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        const Left left = pairs ? (Left){load_channels(by_channel, channel_words, x, mask, n, pairs).data, 1, BLOCK}
                                : (Left){by_position.data, columns, 1};
        const Block right = load_silenced(by_position, position_words, x, mask, n, pairs);
        for (int64_t r = 0; r < BLOCK; r += ROWS) {
            fetch(x, n, r / ROWS, BLOCK / ROWS);
            product(pairs, left, r, weight, columns, row_of(keys, r));
        }
        add_to_columns(keys, call->bias, p->key_channels);
        silence(keys, mask, n, nothing);
        for (int64_t c = 0; c < (BLOCK - n.count) * width; c++) row_of(keys, n.count)[c] = nothing;
        if (p->softmax) {
            raise_shift(run, keys);
            weigh(keys, run.shift, run.total, pairs);
        } else add_to_total(run.total, keys, pairs);
        add_block(pairs, (Left){over_rows(keys, key_words, pairs).data, 1, width}, right, run.sums);
        end_run(context, run, p, chunk, i);
    }
}

/* sum_m w x [batch, Dk, C], and under softmax shift and sum_m w [batch, Dk], for w = exp(k - shift), k = weight x;
 * under scaling the latter is sum_m k, for k = weight x + bias. */
int module_summarize(const Problem *p, const View *x, const View *mask, const float *weight, const float *bias,
                     float *weighted, float *shift, float *total, float *partials) {
    Call call = {.p = p, .parts = 1, .partials = partials, .x = *x, .mask = *mask, .weight = weight, .bias = bias};
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const int64_t floats = BLOCK * (2 * width + 3 * columns) + 2 * width * columns;
    return for_partials(&call, summarize_chunk, floats, weighted, shift, total);
}

static void attend_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), output = sample_of(&call->output, batch, p);
    const Matrix added = sample_of(&call->added, batch, p);
    const int pairs = in_pairs(p);
    const Block xs = take(&scratch, columns, BLOCK), x_words = take(&scratch, columns, BLOCK);
    const Block queries = take(&scratch, width, BLOCK), query_words = take(&scratch, width, BLOCK);
    const Block strip = take(&scratch, ROWS, columns > BLOCK ? columns : BLOCK);
    const Block wide = load_weight(call->weight, 0, &scratch, p);
    const Left weight = over_columns(wide, take(&scratch, width, columns), pairs);
    const Block mean = load_weight(call->mean + batch * p->key_channels * p->value_channels, 0, &scratch, p);
    const Block context = over_rows(mean, take(&scratch, width, columns), pairs);
    (void)head;
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        multiply(pairs, weight, load_channels(xs, x_words, x, (Matrix){0}, n, pairs), columns, queries);
        add_to_rows(queries, call->bias, p->key_channels);
        if (p->softmax) normalize(queries, p->key_channels, p->groups);
        const Block weights = over_rows(queries, query_words, pairs);
        write_product(pairs, weights, context, width, added, output, n, strip, p->stream, x);
    }
}

/* rho_q(Q) mean + added, for Q = weight x + bias. */
int module_attend(const Problem *p, const View *x, const float *weight, const float *bias, const float *mean,
                  const View *added, const View *output) {
    Call call = {.p = p, .x = *x, .weight = weight, .bias = bias, .mean = mean, .added = *added, .output = *output};
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    call.chunks = chunks_of(p), call.heads = all_heads(p);
    return for_chunks(&call, attend_chunk, (2 * BLOCK + ROWS + 4 * width) * columns + (2 * width + ROWS) * BLOCK);
}

static void attend_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), d_x = sample_of(&call->d_x, batch, p);
    const Matrix d_output = sample_of(&call->d_output, batch, p), added = sample_of(&call->added, batch, p);
    const Matrix everything = {0};
    const int pairs = in_pairs(p);
    const Block by_channel = take(&scratch, columns, BLOCK), channel_words = take(&scratch, columns, BLOCK);
    const Block by_position = {by_channel.data, BLOCK, columns}, position_words = {channel_words.data, BLOCK, columns};
    const Block weights = take(&scratch, width, BLOCK), weight_words = take(&scratch, width, BLOCK);
    const Block slope = take(&scratch, width, BLOCK), slope_words = take(&scratch, width, BLOCK);
    const Block strip = take(&scratch, ROWS, columns > BLOCK ? columns : BLOCK);
    const Block wide = load_weight(call->weight, 0, &scratch, p);
    const Left weight = over_columns(wide, take(&scratch, width, columns), pairs);
    const Block back = over_rows(wide, take(&scratch, width, columns), pairs);
    const Block mean = load_weight(call->mean + batch * p->key_channels * p->value_channels, 0, &scratch, p);
    const Left context = over_columns(mean, take(&scratch, width, columns), pairs);
    const Partial sums = partial_of(call, batch, chunk), run = run_of(sums, &scratch, call);
    clear(sums, 0), clear(run, 0);
    (void)head;
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        multiply(pairs, weight, load_channels(by_channel, channel_words, x, everything, n, pairs), columns, weights);
        add_to_rows(weights, call->bias, p->key_channels);
        if (p->softmax) normalize(weights, p->key_channels, p->groups);
        const Block d_out = load_channels(by_channel, channel_words, d_output, everything, n, pairs);
        multiply(pairs, context, d_out, columns, slope);
        if (p->softmax) pull_back_queries(slope, weights, p->key_channels, p->groups);
        const Left left = over_columns(weights, weight_words, pairs);
        add_block(pairs, left, load_silenced(by_position, position_words, d_output, everything, n, pairs),
                  part_of(run, 0, width).sums);
        if (call->parts > 1) {
            const Left of_slope = over_columns(slope, slope_words, pairs);
            const Partial d_weight = part_of(run, width, width);
            add_block(pairs, of_slope, load_silenced(by_position, position_words, x, everything, n, pairs),
                      d_weight.sums);
            add_sums(d_weight.total, slope);
        }
        end_run(sums, run, p, chunk, i);
        if (!d_x.data) continue;
        const Block right = over_rows(slope, slope_words, pairs);
        write_product(pairs, right, back, width, added, d_x, n, strip, p->stream, x);
    }
}

/* d_x = weight^T d_Q + added; sums [batch, parts, Dk, C] are d_mean = A^T d_output and, where there are two parts,
 * d_weight = d_Q^T x, with d_bias the second of totals [batch, parts, Dk]. */
int module_attend_backward(const Problem *p, const View *x, const float *weight, const float *bias, const float *mean,
                           const View *d_output, const View *added, const View *d_x, int64_t parts, float *sums,
                           float *totals, float *partials) {
    Call call = {.p = p, .parts = parts, .x = *x, .weight = weight, .bias = bias, .mean = mean};
    call.partials = partials, call.d_output = *d_output, call.added = *added, call.d_x = *d_x;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const int64_t floats = (2 * BLOCK + ROWS + 5 * width) * columns + (4 * width + ROWS) * BLOCK;
    return for_partials(&call, attend_backward_chunk, floats, sums, NULL, totals);
}

/* Keys and what comes to their weights, [2 padded(Dk), BLOCK], become weights and slopes of keys. */
static void pull_back_keys(const Call *call, Block both, const float *shift, const float *constant) {
    const Problem *p = call->p;
    for (int64_t r = 0; r < p->key_channels; r++)
        for (int64_t c = 0; c < BLOCK; c += LANES) {
            float *key = row_of(both, r) + c, *slope = row_of(both, both.rows / 2 + r) + c;
            vec weight = LOAD(key), d_key = LOAD(slope) + SPLAT(constant[r]);
            if (p->softmax) weight = exponential(weight - SPLAT(shift[r])), d_key *= weight;
            else if (call->bias) weight += SPLAT(call->bias[r]);
            STORE(key, weight);
            STORE(slope, d_key);
        }
}

/* Two matrices [Dk, C] below each other, padded. */
static Block load_two(const float *first, const float *second, float **scratch, const Problem *p) {
    const Block upper = load_weight(first, 0, scratch, p), lower = load_weight(second, 0, scratch, p);
    return (Block){upper.data, upper.rows + lower.rows, upper.columns};
}

static void summarize_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), d_x = sample_of(&call->d_x, batch, p);
    const Matrix added = sample_of(&call->added, batch, p), mask = mask_of(&call->mask, batch, head);
    const float *slopes = call->mean + batch * p->key_channels * p->value_channels;
    const int pairs = in_pairs(p);
    const Block by_channel = take(&scratch, columns, BLOCK), channel_words = take(&scratch, columns, BLOCK);
    const Block by_position = {by_channel.data, BLOCK, columns}, position_words = {channel_words.data, BLOCK, columns};
    const Block both = take(&scratch, 2 * width, BLOCK), words = take(&scratch, 2 * width, BLOCK);
    const Block d_keys = {row_of(both, width), width, BLOCK};
    const Block strip = take(&scratch, ROWS, columns > BLOCK ? columns : BLOCK);
    const Block there = load_two(call->weight, slopes, &scratch, p);
    const Left weight = over_columns(there, take(&scratch, 2 * width, columns), pairs);
    const Block wide = load_two(slopes, call->weight, &scratch, p);
    const Block back = over_rows(wide, take(&scratch, 2 * width, columns), pairs);
    const Partial sums = partial_of(call, batch, chunk), run = run_of(sums, &scratch, call);
    clear(sums, 0), clear(run, 0);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        multiply(pairs, weight, load_channels(by_channel, channel_words, x, mask, n, pairs), columns, both);
        pull_back_keys(call, both, call->shift + batch * p->key_channels, call->correction + batch * p->key_channels);
        silence_columns(both, mask, n, 0.0f);
        add_block(pairs, over_columns(d_keys, words, pairs),
                  load_silenced(by_position, position_words, x, mask, n, pairs), run.sums);
        add_sums(run.total, d_keys);
        end_run(sums, run, p, chunk, i);
        if (d_x.data)
            write_product(pairs, over_rows(both, words, pairs), back, 2 * width, added, d_x, n, strip, p->stream, x);
    }
}

/* d_x = slopes^T w + weight^T d_K + added, for d_K = w (slopes x + constant) or, under scaling, slopes x + constant;
 * d_weight = d_K^T x [batch, Dk, C] and d_bias [batch, Dk]. */
int module_summarize_backward(const Problem *p, const View *x, const View *mask, const float *weight,
                              const float *bias, const float *slopes, const float *shift, const float *constant,
                              const View *added, const View *d_x, float *d_weight, float *d_bias, float *partials) {
    Call call = {.p = p, .parts = 1, .x = *x, .mask = *mask, .weight = weight, .bias = bias, .mean = slopes};
    call.partials = partials, call.shift = shift, call.correction = constant, call.added = *added, call.d_x = *d_x;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const int64_t floats = (2 * BLOCK + ROWS + 8 * width) * columns + (4 * width + ROWS) * BLOCK;
    return for_partials(&call, summarize_backward_chunk, floats, d_weight, NULL, d_bias);
}
