/* The folded module of ops/streamed.py: forward in two passes over its positions, backward in two.
 *
 * Memory is the caller's, but for each thread's; what there is not, or nobody asked for, is NULL. Both ways return 0,
 * or 1 if there is no memory.
 */
#include "folding.h"
#include "module_passes.h"

/* Layers, as weights and biases are numbered. */
enum { QUERIES, KEYS, VALUES, OUTPUT, LAYERS };

/* Sizes and strides, the views without their memory. `keys` are positions of the source and `queries` those of x; the
 * output may be x, and in the backward pass is its gradient; so `trains` is whether gradients of the layers are wanted.
 * `heads` are those of the module, of so many value channels together. As in native_module_launch.py. */
typedef struct {
    Problem keys, queries;
    int64_t heads, value_channels, residual, trains;
    View source, mask, x, output, d_source, d_x;
    View weights[LAYERS], biases[LAYERS], d_weights[LAYERS], d_biases[LAYERS];
} Module;

/* Where they lie. pooled [B, dk, S], shift, total, column_sums [B, dk] are what the first pass leaves for the backward
 * pass; `scratch` has as many numbers as module_forward_scratch or module_backward_scratch tells. */
typedef struct {
    char *source, *mask, *x, *output, *d_source, *d_x;
    char *weights[LAYERS], *biases[LAYERS], *d_weights[LAYERS], *d_biases[LAYERS];
    float *pooled, *shift, *total, *column_sums, *scratch;
} Memory;

/* The views with their memory. */
static Module placed(const Module *m, const Memory *at) {
    Module placed = *m;
    placed.source.data = at->source, placed.mask.data = at->mask, placed.x.data = at->x;
    placed.output.data = at->output, placed.d_source.data = at->d_source, placed.d_x.data = at->d_x;
    for (int i = 0; i < LAYERS; i++) {
        placed.weights[i].data = at->weights[i], placed.biases[i].data = at->biases[i];
        placed.d_weights[i].data = at->d_weights[i], placed.d_biases[i].data = at->d_biases[i];
    }
    return placed;
}

INLINE Layers layers_of(const Module *m) {
    const Problem *p = &m->queries;
    return (Layers){p->batch, m->heads, p->key_channels, m->keys.value_channels, m->value_channels, p->value_channels,
                    p->bfloat16, p->softmax, p->threads};
}

/* Numbers of what has the size of a context. */
typedef struct {
    int64_t pooled, mean, context, row;
} Sizes;

INLINE Sizes sizes_of(const Module *m) {
    const int64_t row = m->keys.batch * m->keys.key_channels, values = m->value_channels / m->heads;
    return (Sizes){row * m->keys.value_channels, row * m->queries.value_channels, row * values, row};
}

/* Those of sums of chunks. */
INLINE int64_t partials_of(const Problem *p, int64_t parts) {
    const Call call = {.p = p, .parts = parts};
    const int64_t chunks = p->positions ? chunks_of(p) : 1, heads = all_heads(p).count;
    return smaller(heads, p->together) * chunks * partial_floats(&call);
}

static int fold_layers(const Module *m, const Memory *at, float *context, float *mean) {
    const Layers layers = layers_of(m);
    return fold(&layers, at->pooled, at->column_sums, &m->weights[VALUES], &m->biases[VALUES], &m->weights[OUTPUT],
                &m->biases[OUTPUT], context, mean);
}

/* A pass over positions that are projected by one of the layers. */
INLINE Call pass(const Module *m, int layer, int64_t parts, float *partials) {
    Call call = {.p = layer == KEYS ? &m->keys : &m->queries, .parts = parts, .partials = partials};
    call.x = layer == KEYS ? m->source : m->x;
    call.mask = m->mask;
    call.weight = m->weights[layer];
    /* Softmax over positions does not see the bias of keys. */
    if (layer != KEYS || !m->keys.softmax) call.bias = m->biases[layer];
    return call;
}

int64_t module_forward_scratch(const Module *m) {
    const Sizes sizes = sizes_of(m);
    return larger(partials_of(&m->keys, 1), padded(sizes.context) + padded(sizes.mean));
}

/* The output, but under scaling for the bias of its layer, and what the first pass leaves. */
int module_forward(const Module *sizes, const Memory *at) {
    const Module m = placed(sizes, at);
    Call keys = pass(&m, KEYS, 1, at->scratch);
    if (summarize_module(&keys, at->pooled, at->shift, at->total, at->column_sums)) return 1;
    float *context = at->scratch, *mean = context + padded(sizes_of(&m).context); /* in place of sums of chunks */
    if (fold_layers(&m, at, context, mean)) return 1;
    Call queries = pass(&m, QUERIES, 0, NULL);
    queries.mean = mean, queries.output = m.output;
    if (m.residual) queries.added = m.x;
    return attend_module(&queries);
}

/* Contexts that a chunk of the queries sums up: the gradient of mean, and that of their layer's weight. */
INLINE int64_t query_parts(const Module *m) { return m->trains ? 2 : 1; }

/* Scratch memory of the backward pass; sums and totals are first those of the queries, then of the keys. */
enum { CONTEXT, D_CONTEXT, MEAN, SUMS, TOTALS, SLOPES, CONSTANT, PARTIALS, PIECES };

/* How many numbers come before piece i. */
static int64_t numbers_before(const Module *m, int i) {
    const Sizes sizes = sizes_of(m);
    const int64_t parts = query_parts(m), numbers[PIECES] = {
        [CONTEXT] = sizes.context, [D_CONTEXT] = sizes.context, [MEAN] = sizes.mean,
        [SUMS] = larger(parts * sizes.mean, sizes.pooled), [TOTALS] = parts * sizes.row,
        [SLOPES] = sizes.pooled, [CONSTANT] = sizes.row,
        [PARTIALS] = larger(partials_of(&m->queries, parts), partials_of(&m->keys, 1)),
    };
    int64_t sum = 0;
    while (i-- > 0) sum += padded(numbers[i]);
    return sum;
}

int64_t module_backward_scratch(const Module *m) { return numbers_before(m, PIECES); }

static int fold_layers_backward(const Module *m, const Memory *at, float *const pieces[]) {
    const Layers layers = layers_of(m);
    const int64_t rows = m->queries.key_channels, columns = m->queries.value_channels;
    const View d_mean = {(char *)pieces[SUMS], query_parts(m) * rows * columns, 0, columns, 1};
    return fold_backward(&layers, &d_mean, at->pooled, at->total, at->column_sums, pieces[CONTEXT], &m->weights[VALUES],
                         &m->biases[VALUES], &m->weights[OUTPUT], pieces[D_CONTEXT], pieces[SLOPES], pieces[CONSTANT],
                         &m->d_weights[VALUES], &m->d_biases[VALUES], &m->d_weights[OUTPUT], &m->d_biases[OUTPUT]);
}

/* Gradients for that of the output, but under scaling for that of the bias of its layer. d_source may be d_x: then both
 * are added. */
int module_backward(const Module *sizes, const Memory *at) {
    const Module m = placed(sizes, at);
    float *pieces[PIECES];
    for (int i = 0; i < PIECES; i++) pieces[i] = at->scratch + numbers_before(&m, i);
    if (fold_layers(&m, at, pieces[CONTEXT], pieces[MEAN])) return 1;
    Call queries = pass(&m, QUERIES, query_parts(&m), pieces[PARTIALS]);
    queries.mean = pieces[MEAN], queries.d_output = m.output, queries.d_x = m.d_x;
    if (m.residual) queries.added = m.output;
    const View *d_weight = &m.d_weights[QUERIES], *d_bias = &m.d_biases[QUERIES];
    if (attend_module_backward(&queries, pieces[SUMS], pieces[TOTALS], d_weight, d_bias)) return 1;
    if (fold_layers_backward(&m, at, pieces)) return 1;
    Call keys = pass(&m, KEYS, 1, pieces[PARTIALS]);
    keys.mean = pieces[SLOPES], keys.shift = at->shift, keys.correction = pieces[CONSTANT], keys.d_x = m.d_source;
    if (at->d_source == at->d_x) keys.added = m.d_x;
    return summarize_module_backward(&keys, pieces[SUMS], pieces[TOTALS], &m.d_weights[KEYS], &m.d_biases[KEYS]);
}
