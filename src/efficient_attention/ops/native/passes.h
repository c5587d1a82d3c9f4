/* The two passes over the positions of one head: what its keys and values come to, and what its queries get of it. */
#ifndef PASSES_H
#define PASSES_H

#include "softmax.h"

/* The context of a chunk of the keys and values of a head. */
static void over_keys(const Call *call, int64_t batch, int64_t head, int64_t chunk, Partial context, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix key = head_of(&call->key, batch, head, p->key_channels, p);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const int pairs = in_pairs(p);
    Block keys = take(&scratch, BLOCK, width), key_words = take(&scratch, BLOCK, width);
    Block values = take(&scratch, BLOCK, columns), value_words = take(&scratch, BLOCK, columns);
    const Partial run = run_of(context, &scratch, call);
    clear(context, p->softmax), clear(run, p->softmax);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        keys.rows = values.rows = filled(n);
        load(keys, rows_in(key, n), nothing);
        silence(keys, mask, n, nothing);
        if (p->softmax) {
            raise_shift(run, keys);
            weigh(keys, keys, run.shift, run.total, pairs);
        }
        const Left weights = {over_rows(keys, key_words, pairs).data, 1, width};
        const Block right = load_silenced(values, value_words, value, mask, n, pairs);
        FOR_STRIPS(c, width, pairs) {
            fetch(key, n, c, width);
            fetch(value, n, c, width);
            add_product(pairs, weights, c, right, keys.rows, row_of(run.sums, c.start));
        }
        end_run(context, run, p, chunk, i);
    }
}

INLINE int64_t over_keys_floats(const Problem *p) {
    return 2 * BLOCK * (padded(p->key_channels) + padded(p->value_channels));
}

/* A chunk of the queries of a head attends to its context. */
static void over_queries(const Call *call, int64_t batch, int64_t head, int64_t chunk, Block mean, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix query = head_of(&call->query, batch, head, p->key_channels, p);
    const Matrix output = head_of(&call->output, batch, head, p->value_channels, p);
    const int pairs = in_pairs(p);
    Block queries = take(&scratch, width, BLOCK);
    const Block query_words = take(&scratch, width, BLOCK);
    const Block strip = take(&scratch, STRIP, larger(columns, BLOCK));
    const Block context = over_rows(mean, take(&scratch, width, columns), pairs);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        queries.columns = filled(n);
        load(queries, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(queries, p->key_channels, p->groups, NULL, pairs);
        const Block weights = over_rows(queries, query_words, pairs);
        write_product(pairs, weights, context, width, (Matrix){0}, output, n, strip, p->stream, query);
    }
}

INLINE int64_t over_queries_floats(const Problem *p) {
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    return 2 * BLOCK * width + STRIP * (BLOCK + columns) + width * columns;
}

/* Slopes [., padded(Dk)] of the weights become those of the keys. */
static void pull_back_keys(Block slope, const float *weights, const float *correction) {
    for (int64_t r = 0; r < slope.rows; r++)
        for (int64_t c = 0; c < slope.columns; c += LANES) {
            float *x = row_of(slope, r) + c;
            STORE(x, (LOAD(x) - LOAD(correction + c)) * LOAD(weights + r * slope.columns + c));
        }
}

/* Gradients of a chunk of the keys and values of a head; d_mean and correction are over total. */
static void back_over_keys(const Call *call, int64_t batch, int64_t head, int64_t chunk, Block d_mean,
                           const float *shift, const float *correction, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix key = head_of(&call->key, batch, head, p->key_channels, p);
    const Matrix value = head_of(&call->value, batch, head, p->value_channels, p);
    const Matrix d_key = head_of(&call->d_key, batch, head, p->key_channels, p);
    const Matrix d_value = head_of(&call->d_value, batch, head, p->value_channels, p);
    const Matrix mask = mask_of(&call->mask, batch, head);
    const float nothing = p->softmax ? -INFINITY : 0.0f;
    const int pairs = in_pairs(p);
    Block keys = take(&scratch, BLOCK, width), key_words = take(&scratch, BLOCK, width);
    Block values = take(&scratch, BLOCK, columns), value_words = take(&scratch, BLOCK, columns);
    const Block slope = take(&scratch, STRIP, width), d_values = take(&scratch, STRIP, columns);
    const Block there = over_rows(d_mean, take(&scratch, width, columns), pairs);
    const Block turned = take(&scratch, columns, width);
    load(turned, flipped(matrix(d_mean.data, width, columns)), 0.0f);
    const Block back = over_rows(turned, take(&scratch, columns, width), pairs);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        keys.rows = values.rows = filled(n);
        load(keys, rows_in(key, n), nothing);
        silence(keys, mask, n, nothing);
        if (p->softmax) weigh(keys, keys, shift, NULL, 0);
        const Left weights = over_columns(keys, key_words, pairs);
        FOR_STRIPS(r, d_value.data ? n.count : 0, pairs) {
            fetch(key, n, r, n.count);
            product(pairs, weights, r, there, width, d_values.data);
            store(d_values, rows_in(rows_in(d_value, n), r), p->stream);
        }
        if (!d_key.data) continue;
        load(values, rows_in(value, n), 0.0f);
        silence(values, mask, n, 0.0f);
        const Left left = over_columns(values, value_words, pairs);
        FOR_STRIPS(r, n.count, pairs) {
            fetch(value, n, r, n.count);
            product(pairs, left, r, back, columns, slope.data);
            if (p->softmax) pull_back_keys((Block){slope.data, r.count, width}, row_of(keys, r.start), correction);
            store(slope, rows_in(rows_in(d_key, n), r), p->stream);
        }
    }
}

INLINE int64_t back_over_keys_floats(const Problem *p) {
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    return (2 * BLOCK + STRIP) * (width + columns) + 3 * width * columns;
}

/* Gradients of a chunk of the queries of a head, and of its context where there is a sum for them. */
static void back_over_queries(const Call *call, int64_t batch, int64_t head, int64_t chunk, Block mean, Partial d_mean,
                              float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix query = head_of(&call->query, batch, head, p->key_channels, p);
    const Matrix d_query = head_of(&call->d_query, batch, head, p->key_channels, p);
    const Matrix d_output = head_of(&call->d_output, batch, head, p->value_channels, p);
    const int pairs = in_pairs(p);
    Block weights = take(&scratch, width, BLOCK), slope = take(&scratch, width, BLOCK);
    Block d_out = take(&scratch, BLOCK, columns), by_channels = {d_out.data, columns, BLOCK};
    const Block weight_words = take(&scratch, width, BLOCK), d_out_words = take(&scratch, BLOCK, columns);
    const Left context = over_columns(mean, take(&scratch, width, columns), pairs);
    const int summed = d_mean.sums.data != NULL;
    const Partial run = summed ? run_of(d_mean, &scratch, call) : d_mean;
    if (summed) clear(d_mean, 0), clear(run, 0);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        weights.columns = slope.columns = d_out.rows = by_channels.columns = filled(n);
        load(weights, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(weights, p->key_channels, p->groups, NULL, pairs);
        if (summed) {
            const Left left = over_columns(weights, weight_words, pairs);
            const Block right = load_over_rows(d_out, d_out_words, rows_in(d_output, n), pairs);
            FOR_STRIPS(c, width, pairs) {
                fetch(d_output, n, c, width);
                add_product(pairs, left, c, right, d_out.rows, row_of(run.sums, c.start));
            }
            end_run(d_mean, run, p, chunk, i);
        }
        if (!d_query.data) continue;
        const Block right = load_over_rows(by_channels, d_out_words, flipped(rows_in(d_output, n)), pairs);
        FOR_STRIPS(c, width, pairs) {
            fetch(query, n, c, width);
            product(pairs, context, c, right, columns, row_of(slope, c.start));
        }
        if (p->softmax) pull_back_queries(slope, weights, p->key_channels, p->groups);
        store(slope, flipped(rows_in(d_query, n)), p->stream);
    }
}

INLINE int64_t back_over_queries_floats(const Problem *p) {
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    return BLOCK * (3 * width + 2 * columns) + width * columns;
}

#endif
