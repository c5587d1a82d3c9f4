/* The two passes over the positions of one head: what its keys and values come to, and what its queries get of it. */
#ifndef PASSES_H
#define PASSES_H

#include "softmax.h"

/* A chunk of the keys and values of a head is added to a context. */
static void pass_over_keys(const Call *call, int64_t batch, int64_t head, int64_t chunk, Partial context, float *scratch) {
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
            weigh(keys, run.shift, run.total, pairs);
        }
        const Left weights = {over_rows(keys, key_words, pairs).data, 1, width};
        const Block right = load_silenced(values, value_words, value, mask, n, pairs);
        for (int64_t c = 0; c < width; c += ROWS) {
            fetch(key, n, c / ROWS, width / ROWS);
            fetch(value, n, c / ROWS, width / ROWS);
            add_product(pairs, weights, c, right, keys.rows, row_of(run.sums, c));
        }
        end_run(context, run, p, chunk, i);
    }
}

INLINE int64_t keys_floats(const Problem *p) {
    return 2 * BLOCK * (padded(p->key_channels) + padded(p->value_channels));
}

/* A chunk of the queries of a head attends to its context. */
static void pass_over_queries(const Call *call, int64_t batch, int64_t head, int64_t chunk, Block mean, float *scratch) {
    const Problem *p = call->p;
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    const Matrix query = head_of(&call->query, batch, head, p->key_channels, p);
    const Matrix output = head_of(&call->output, batch, head, p->value_channels, p);
    const int pairs = in_pairs(p);
    Block queries = take(&scratch, width, BLOCK), query_words = take(&scratch, width, BLOCK);
    const Block strip = take(&scratch, ROWS, columns > BLOCK ? columns : BLOCK);
    const Block context = over_rows(mean, take(&scratch, width, columns), pairs);
    Span n;
    for (int64_t i = 0; (n = block_in(p, chunk, i)).count; i++) {
        queries.columns = query_words.columns = filled(n);
        load(queries, flipped(rows_in(query, n)), 0.0f);
        if (p->softmax) normalize(queries, p->key_channels, p->groups);
        const Block weights = over_rows(queries, query_words, pairs);
        write_product(pairs, weights, context, width, (Matrix){0}, output, n, strip, p->stream, query);
    }
}

INLINE int64_t queries_floats(const Problem *p) {
    const int64_t width = padded(p->key_channels), columns = padded(p->value_channels);
    return 2 * BLOCK * width + ROWS * (BLOCK + columns) + 2 * width * columns;
}

#endif
