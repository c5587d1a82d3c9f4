/* The four passes of a folded module over its positions: summarize and attend, and back. They project blocks as they
 * come, so that queries and keys exist for a block at a time.
 *
 * "Values" are the positions of X themselves, [n, C]. Blocks are [Dk, BLOCK] where what comes of them is written
 * position by position, and keys are [BLOCK, Dk] where they are summarized. Passes return 0, or 1 without memory.
 */
#ifndef MODULE_PASSES_H
#define MODULE_PASSES_H

#include "softmax.h"

/* X of one sample. */
INLINE Matrix sample_of(const View *x, int64_t batch, const Problem *p) {
    return head_of(x, batch, 0, p->value_channels, p);
}

/* [Dk, C] of the queries' or keys' layer. */
INLINE Matrix weight_of(const Call *call) {
    const Matrix x = sample_of(&call->weight, 0, call->p);
    return (Matrix){x.data, call->p->key_channels, x.columns, x.down, x.across, x.size};
}

/* [Dk, C] of one sample, in float32. */
INLINE Matrix context_of(const float *contexts, int64_t batch, const Problem *p) {
    return matrix(contexts + batch * p->key_channels * p->value_channels, p->key_channels, p->value_channels);
}

/* All of a matrix, padded. */
INLINE Block load_whole(Matrix x, float **scratch) {
    const Block block = take(scratch, padded(x.rows), padded(x.columns));
    load(block, x, 0.0f);
    return block;
}

/* Dk numbers, or none. */
static const float *load_bias(const Call *call, float **scratch) {
    const Block block = take(scratch, 1, padded(call->p->key_channels));
    if (!call->bias.data) return NULL;
    const int64_t size = call->p->bfloat16 ? 2 : 4;
    load(block, (Matrix){call->bias.data, 1, call->p->key_channels, 0, call->bias.channel, size}, 0.0f);
    return block.data;
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

static void summarize_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), mask = mask_of(&call->mask, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const int pairs = in_pairs(p);
    const Block keys = take(&scratch, BLOCK, width), key_words = take(&scratch, BLOCK, width);
    const Block by_position = take(&scratch, BLOCK, columns), position_words = take(&scratch, BLOCK, columns);
    const Block by_channel = {by_position.data, columns, BLOCK}, channel_words = take(&scratch, columns, BLOCK);
    const Block wide = load_whole(flipped(weight_of(call)), &scratch);
    const Block weight = over_rows(wide, take(&scratch, columns, width), pairs);
    const float *bias = load_bias(call, &scratch);
    const Partial context = partial_of(call, batch, chunk), run = run_of(context, &scratch, call);
    clear(context, p->softmax), clear(run, p->softmax);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        const Left left = pairs ? (Left){load_channels(by_channel, channel_words, x, mask, n, pairs).data, 1, BLOCK}
                                : (Left){by_position.data, columns, 1};
        const Block right = load_silenced(by_position, position_words, x, mask, n, pairs);
        FOR_STRIPS(r, BLOCK, pairs) {
            fetch(x, n, r, BLOCK);
            product(pairs, left, r, weight, columns, row_of(keys, r.start));
        }
        add_to_columns(keys, bias, p->key_channels);
        silence(keys, mask, n, nothing);
        for (int64_t c = 0; c < (BLOCK - n.count) * width; c++) row_of(keys, n.count)[c] = nothing;
        if (p->softmax) {
            raise_shift(run, keys);
            weigh(keys, keys, run.shift, run.total, pairs);
        } else add_to_total(run.total, keys, pairs);
        add_multiply(pairs, (Left){over_rows(keys, key_words, pairs).data, 1, width}, right, BLOCK, run.sums);
        end_run(context, run, p, chunk, i);
    }
}

/* Sums over the positions of each sample, and what they are divided by. */
typedef struct {
    const Problem *p;
    float *pooled, *total, *column_sums;
} Means;

/* Row i of [batch Dk, C]: over the total, or 1 where nothing has any weight: the heaviest key alone weighs 1. */
static void mean_of_row(const void *what, int64_t i, float *scratch) {
    const Means *means = what;
    const int64_t channels = means->p->value_channels;
    (void)scratch;
    if (means->p->softmax) means->total[i] = means->column_sums[i];
    const float by = means->total[i] > 1.0f ? means->total[i] : 1.0f;
    float *row = means->pooled + i * channels;
    for (int64_t c = 0; c < channels; c++) row[c] /= by;
    means->column_sums[i] /= by;
}

/* pooled = sum_m w x / total [batch, Dk, C] and column_sums = sum_m w / total [batch, Dk], where w = exp(k - shift) and
 * k = weight x under softmax, and w = k = weight x + bias under scaling. Shift and total are [batch, Dk]: sum_m w, or
 * under scaling the number of keys. */
static int summarize_module(Call *call, float *pooled, float *shift, float *total, float *column_sums) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const int64_t floats = BLOCK * (2 * width + 3 * columns) + width * (2 * columns + 1);
    const Means means = {p, pooled, total, column_sums};
    if (for_partials(call, summarize_chunk, floats, pooled, shift, column_sums)) return 1;
    for (int64_t b = 0; !p->softmax && b < p->batch; b++) {
        const float keys = attended(mask_of(&call->mask, b, 0), p->positions);
        for (int64_t c = 0; c < p->key_channels; c++) total[b * p->key_channels + c] = keys;
    }
    return for_each(p->batch * p->key_channels, p->threads, mean_of_row, &means, 1);
}

static void attend_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), output = sample_of(&call->output, batch, p);
    const Matrix added = sample_of(&call->added, batch, p);
    const int pairs = in_pairs(p);
    const Block xs = take(&scratch, columns, BLOCK), x_words = take(&scratch, columns, BLOCK);
    const Block queries = take(&scratch, width, BLOCK), query_words = take(&scratch, width, BLOCK);
    const Block strip = take(&scratch, STRIP, larger(columns, BLOCK));
    const Block wide = load_whole(weight_of(call), &scratch);
    const Left weight = over_columns(wide, take(&scratch, width, columns), pairs);
    const float *bias = load_bias(call, &scratch);
    const Block mean = load_whole(context_of(call->mean, batch, p), &scratch);
    const Block context = over_rows(mean, take(&scratch, width, columns), pairs);
    (void)head;
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        multiply(pairs, weight, load_channels(xs, x_words, x, (Matrix){0}, n, pairs), columns, queries);
        add_to_rows(queries, bias, p->key_channels);
        if (p->softmax) normalize(queries, p->key_channels, p->groups, NULL, pairs);
        const Block weights = over_rows(queries, query_words, pairs);
        write_product(pairs, weights, context, width, added, output, n, strip, p->stream, x);
    }
}

/* output = rho_q(Q) mean + added, for Q = weight x + bias. */
static int attend_module(Call *call) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const int64_t floats = (2 * BLOCK + STRIP + 4 * width) * columns + width + (2 * width + STRIP) * BLOCK;
    call->chunks = chunks_of(p), call->heads = all_heads(p);
    return for_chunks(call, attend_chunk, floats);
}

static void attend_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), d_x = sample_of(&call->d_x, batch, p);
    const Matrix d_output = sample_of(&call->d_output, batch, p), added = sample_of(&call->added, batch, p);
    const Matrix everything = {0};
    const int pairs = in_pairs(p);
    const Block by_channel = take(&scratch, columns, BLOCK), by_position = {by_channel.data, BLOCK, columns};
    const Block x_words = take(&scratch, columns, BLOCK);
    const Block weights = take(&scratch, width, BLOCK), weight_words = take(&scratch, width, BLOCK);
    const Block slope = take(&scratch, width, BLOCK), slope_words = take(&scratch, width, BLOCK);
    const Block strip = take(&scratch, STRIP, larger(columns, BLOCK));
    const Block wide = load_whole(weight_of(call), &scratch);
    const Left weight = over_columns(wide, take(&scratch, width, columns), pairs);
    const Block back = over_rows(wide, take(&scratch, width, columns), pairs);
    const float *bias = load_bias(call, &scratch);
    const Block mean = load_whole(context_of(call->mean, batch, p), &scratch);
    const Left context = over_columns(mean, take(&scratch, width, columns), pairs);
    const Partial sums = partial_of(call, batch, chunk), run = run_of(sums, &scratch, call);
    clear(sums, 0), clear(run, 0);
    (void)head;
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        multiply(pairs, weight, load_channels(by_channel, x_words, x, everything, n, pairs), columns, weights);
        add_to_rows(weights, bias, p->key_channels);
        if (p->softmax) normalize(weights, p->key_channels, p->groups, NULL, pairs);
        const Block d_out = load_channels(by_channel, x_words, d_output, everything, n, pairs);
        multiply(pairs, context, d_out, columns, slope);
        if (p->softmax) pull_back_queries(slope, weights, p->key_channels, p->groups);
        const Left left = over_columns(weights, weight_words, pairs);
        add_multiply(pairs, left, load_silenced(by_position, x_words, d_output, everything, n, pairs), BLOCK,
                     part_of(run, 0, width).sums);
        if (call->parts > 1) {
            const Left of_slope = over_columns(slope, slope_words, pairs);
            const Partial d_weight = part_of(run, width, width);
            add_multiply(pairs, of_slope, load_silenced(by_position, x_words, x, everything, n, pairs), BLOCK,
                         d_weight.sums);
            add_sums(d_weight.total, slope);
        }
        end_run(sums, run, p, chunk, i);
        if (!d_x.data) continue;
        const Block right = over_rows(slope, slope_words, pairs);
        write_product(pairs, right, back, width, added, d_x, n, strip, p->stream, x);
    }
}

/* Rows of samples, [batch, rows, columns], samples that far apart; and what they are added to. */
typedef struct {
    const float *x;
    int64_t batch, apart;
    Matrix target;
} Samples;

static void add_row(const void *what, int64_t i, float *scratch) {
    const Samples *samples = what;
    const int64_t columns = samples->target.columns;
    const Block row = {scratch, 1, padded(columns)};
    const float *x = samples->x + i * columns;
    memset(scratch, 0, row.columns * 4);
    for (int64_t b = 0; b < samples->batch; b++) add(row, matrix(x + b * samples->apart, 1, columns));
    store(row, rows_in(samples->target, (Span){i, 1}), 0);
}

/* Over samples, weight [Dk, C] = the sum of the last parts of sums [batch, parts, Dk, C]; bias that of totals. */
static int add_samples(const Call *call, const float *sums, const float *totals, const View *weight, const View *bias) {
    const Problem *p = call->p;
    const int64_t rows = p->key_channels, columns = p->value_channels, last = (call->parts - 1) * rows;
    const int64_t size = p->bfloat16 ? 2 : 4;
    const Samples weights = {sums + last * columns, p->batch, call->parts * rows * columns,
                             {weight->data, rows, columns, weight->position, weight->channel, size}};
    const Samples biases = {totals + last, p->batch, call->parts * rows, {bias->data, 1, rows, 0, bias->channel, size}};
    return (weight->data && for_each(rows, p->threads, add_row, &weights, padded(columns)))
        || (bias->data && for_each(1, 1, add_row, &biases, padded(rows)));
}

/* d_x = weight^T d_Q + added; sums [batch, parts, Dk, C] are d_mean = A^T d_output and, where there are two parts,
 * d_Q^T x, with d_Q summed up in totals [batch, parts, Dk]: over samples these come to d_weight and d_bias. */
static int attend_module_backward(Call *call, float *sums, float *totals, const View *d_weight, const View *d_bias) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const int64_t floats = (2 * BLOCK + STRIP + 5 * width) * columns + width + (4 * width + STRIP) * BLOCK;
    return for_partials(call, attend_backward_chunk, floats, sums, NULL, totals)
        || add_samples(call, sums, totals, d_weight, d_bias);
}

/* Keys and what comes to their weights, [2 padded(Dk), BLOCK], become weights and slopes of keys. */
static void pull_back_keys(const Problem *p, Block both, const float *bias, const float *shift, const float *constant,
                           int pairs) {
    for (int64_t r = 0; r < p->key_channels; r++)
        for (int64_t c = 0; c < BLOCK; c += LANES) {
            float *key = row_of(both, r) + c, *slope = row_of(both, both.rows / 2 + r) + c;
            vec weight = LOAD(key), d_key = LOAD(slope) + SPLAT(constant[r]);
            if (p->softmax) weight = exponential(weight - SPLAT(shift[r]), pairs), d_key *= weight;
            else if (bias) weight += SPLAT(bias[r]);
            STORE(key, weight);
            STORE(slope, d_key);
        }
}

/* Two matrices [Dk, C] below each other, padded. */
static Block load_two(Matrix first, Matrix second, float **scratch) {
    const Block upper = load_whole(first, scratch), lower = load_whole(second, scratch);
    return (Block){upper.data, upper.rows + lower.rows, upper.columns};
}

static void summarize_backward_chunk(const Call *call, int64_t batch, int64_t head, int64_t chunk, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix x = sample_of(&call->x, batch, p), d_x = sample_of(&call->d_x, batch, p);
    const Matrix added = sample_of(&call->added, batch, p), mask = mask_of(&call->mask, batch, head);
    const Matrix projection = weight_of(call), slopes = context_of(call->mean, batch, p);
    const float *shift = call->shift + batch * p->key_channels, *constant = call->correction + batch * p->key_channels;
    const int pairs = in_pairs(p);
    const Block by_channel = take(&scratch, columns, BLOCK), by_position = {by_channel.data, BLOCK, columns};
    const Block x_words = take(&scratch, columns, BLOCK);
    const Block both = take(&scratch, 2 * width, BLOCK), words = take(&scratch, 2 * width, BLOCK);
    const Block d_keys = {row_of(both, width), width, BLOCK};
    const Block strip = take(&scratch, STRIP, larger(columns, BLOCK));
    const Block there = load_two(projection, slopes, &scratch);
    const Left weight = over_columns(there, take(&scratch, 2 * width, columns), pairs);
    const Block wide = load_two(slopes, projection, &scratch);
    const Block back = over_rows(wide, take(&scratch, 2 * width, columns), pairs);
    const float *bias = load_bias(call, &scratch);
    const Partial sums = partial_of(call, batch, chunk), run = run_of(sums, &scratch, call);
    clear(sums, 0), clear(run, 0);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        multiply(pairs, weight, load_channels(by_channel, x_words, x, mask, n, pairs), columns, both);
        pull_back_keys(p, both, bias, shift, constant, pairs);
        silence_columns(both, mask, n, 0.0f);
        add_multiply(pairs, over_columns(d_keys, words, pairs),
                     load_silenced(by_position, x_words, x, mask, n, pairs), BLOCK, run.sums);
        add_sums(run.total, d_keys);
        end_run(sums, run, p, chunk, i);
        if (d_x.data)
            write_product(pairs, over_rows(both, words, pairs), back, 2 * width, added, d_x, n, strip, p->stream, x);
    }
}

/* d_x = slopes^T w + weight^T d_K + added, for d_K = w (slopes x + constant) or, under scaling, slopes x + constant;
 * sums [batch, Dk, C] are d_K^T x, totals [batch, Dk] those of d_K: over samples these come to d_weight and d_bias. */
static int summarize_module_backward(Call *call, float *sums, float *totals, const View *d_weight,
                                     const View *d_bias) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const int64_t floats = (2 * BLOCK + STRIP + 8 * width) * columns + width + (4 * width + STRIP) * BLOCK;
    return for_partials(call, summarize_backward_chunk, floats, sums, NULL, totals)
        || add_samples(call, sums, totals, d_weight, d_bias);
}

#endif
