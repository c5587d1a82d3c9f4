/* Projections folded into a context, and their gradients: ops/folding.py, which has the equations.
 *
 * Sizes: B batch, h heads, dk, dv key and value channels of all heads, S channels of the source, C of the output.
 * Sums are float32; weights, biases and their gradients are of the module's dtype, at any strides. Views without memory
 * are what there is not, or nobody asked for. Both ways return 0, or 1 if there is no memory.
 */
#ifndef FOLDING_H
#define FOLDING_H

#include "matrices.h"

typedef struct {
    int64_t batch, heads, key_channels, source_channels, value_channels, output_channels;
    int32_t bfloat16, softmax, threads;
} Layers;

/* float32 [batch, rows, columns]. */
INLINE View contiguous(const float *data, int64_t rows, int64_t columns) {
    return (View){(char *)data, rows * columns, 0, columns, 1};
}

/* Of [batch, rows of all heads, columns], so many rows a head. */
INLINE Matrices rows_by_head(View x, int64_t rows, int64_t size) {
    x.head = rows * x.position;
    return (Matrices){x, size};
}

/* Of [batch, rows, columns of all heads], so many columns a head. */
INLINE Matrices columns_by_head(View x, int64_t columns, int64_t size) {
    x.head = columns * x.channel;
    return (Matrices){x, size};
}

/* What is folded: all as heads have it. */
typedef struct {
    Matrices pooled, column_sums, context, value_weight, value_bias, output_weight;
    int64_t keys, values, size; /* channels of a head; bytes of a number of weights */
} Heads;

INLINE Heads by_head(const Layers *l, const float *pooled, const float *column_sums, const float *context,
                     const View *value_weight, const View *value_bias, const View *output_weight) {
    const int64_t keys = l->key_channels / l->heads, values = l->value_channels / l->heads;
    const int64_t size = l->bfloat16 ? 2 : 4;
    return (Heads){
        .pooled = rows_by_head(contiguous(pooled, l->key_channels, l->source_channels), keys, 4),
        .column_sums = rows_by_head(contiguous(column_sums, l->key_channels, 1), keys, 4),
        .context = rows_by_head(contiguous(context, l->key_channels, values), keys, 4),
        .value_weight = rows_by_head(*value_weight, values, size),
        .value_bias = columns_by_head(*value_bias, values, size),
        .output_weight = columns_by_head(*output_weight, values, size),
        .keys = keys, .values = values, .size = size,
    };
}

/* context [B, h, dk / h, dv / h] = pooled Wv^T + column_sums bv; mean [B, dk, C] = context Wo^T, and under softmax
 * + bo / h; from pooled [B, dk, S] and column_sums [B, dk]. */
static int fold(const Layers *l, const float *pooled, const float *column_sums, const View *value_weight,
                const View *value_bias, const View *output_weight, const View *output_bias, float *context,
                float *mean) {
    const Heads of = by_head(l, pooled, column_sums, context, value_weight, value_bias, output_weight);
    float share = 1.0f / l->heads; /* of each head in the output's bias, as its queries' weights sum to one */
    const Product values = {
        l->batch, l->heads, of.keys, l->source_channels, of.values,
        .target = of.context, .left = of.pooled, .right = turned(of.value_weight),
        .down = of.column_sums, .across = of.value_bias,
    };
    const Product outputs = {
        l->batch, l->heads, of.keys, of.values, l->output_channels,
        .target = rows_by_head(contiguous(mean, l->key_channels, l->output_channels), of.keys, 4),
        .left = of.context, .right = turned(of.output_weight),
        .down = {{(char *)&share}, 4}, .across = {l->softmax ? *output_bias : (View){0}, of.size},
    };
    return multiply_matrices(&values, 1, l->threads) || multiply_matrices(&outputs, 1, l->threads);
}

/* What gradients of keys follow from. */
typedef struct {
    const Layers *l;
    const float *pooled, *total;
    float *slopes, *constant;
} Slopes;

/* Row i of [B dk, S]: d_pooled and d_sums become slopes and constant. */
static void slope_of_key(const void *what, int64_t i, float *scratch) {
    const Slopes *keys = what;
    const int64_t channels = keys->l->source_channels;
    const float *pooled = keys->pooled + i * channels, by = keys->total[i] > 1.0f ? keys->total[i] : 1.0f;
    float *slope = keys->slopes + i * channels;
    (void)scratch;
    vec sum = SPLAT(0.0f);
    int64_t c = 0;
    for (; c + LANES <= channels; c += LANES) {
        const vec x = LOAD(slope + c) / SPLAT(by);
        STORE(slope + c, x);
        sum = FMA(x, LOAD(pooled + c), sum);
    }
    float correction = 0.0f;
    for (; c < channels; c++) correction += (slope[c] /= by) * pooled[c];
    for (int j = 0; j < LANES; j++) correction += sum[j];
    keys->constant[i] = keys->l->softmax ? -correction : keys->constant[i] / by;
}

/* From the gradient d_mean [B, dk, C]: those of weights and biases, summed over samples, and slopes [B, dk, S] and
 * constant [B, dk] for summarize_module_backward; d_context is memory of the size of the context. */
static int fold_backward(const Layers *l, const View *d_mean, const float *pooled, const float *total,
                         const float *column_sums, const float *context, const View *value_weight,
                         const View *value_bias, const View *output_weight, float *d_context, float *slopes,
                         float *constant, const View *d_value_weight, const View *d_value_bias,
                         const View *d_output_weight, const View *d_output_bias) {
    const Heads of = by_head(l, pooled, column_sums, context, value_weight, value_bias, output_weight);
    const Heads to = by_head(l, slopes, constant, d_context, d_value_weight, d_value_bias, d_output_weight);
    const Matrices d_means = rows_by_head(*d_mean, of.keys, 4), d_mean_of_all = {*d_mean, 4};
    float share = 1.0f / l->heads;
    const int64_t keys = of.keys, values = of.values, inputs = l->source_channels, outputs = l->output_channels;
    const Product contexts = {
        l->batch, l->heads, keys, outputs, values,
        .target = to.context, .left = d_means, .right = of.output_weight,
    };
    const Product means = {
        l->batch, l->heads, keys, values, inputs,
        .target = to.pooled, .left = to.context, .right = of.value_weight,
    };
    const Product sums = {
        l->batch, l->heads, keys, values, 1,
        .target = to.column_sums, .left = to.context, .right = turned(of.value_bias),
    };
    const Product value_weights = {
        l->batch, l->heads, values, keys, inputs,
        .target = to.value_weight, .left = turned(to.context), .right = of.pooled, .summed = 1,
    };
    const Product value_biases = {
        l->batch, l->heads, 1, keys, values,
        .target = to.value_bias, .left = turned(of.column_sums), .right = to.context, .summed = 1,
    };
    const Product output_weights = {
        l->batch, l->heads, outputs, keys, values,
        .target = to.output_weight, .left = turned(d_means), .right = of.context, .summed = 1,
    };
    const Product output_biases = {
        l->batch, 1, 1, l->key_channels, outputs,
        .target = {*d_output_bias, of.size}, .left = {{(char *)&share}, 4}, .right = d_mean_of_all, .summed = 1,
    };
    const Product of_context[] = {means, value_weights, value_biases, output_weights};
    const Slopes slopes_of_keys = {l, pooled, total, slopes, constant};
    memset(constant, 0, l->batch * l->key_channels * 4);
    return multiply_matrices(&contexts, 1, l->threads) || multiply_matrices(of_context, 4, l->threads)
        || (l->softmax && multiply_matrices(&output_biases, 1, l->threads))
        || (!l->softmax && value_bias->data && multiply_matrices(&sums, 1, l->threads))
        || for_each(l->batch * l->key_channels, l->threads, slope_of_key, &slopes_of_keys, 1);
}

#endif
