/* Floats of 4 and 8 bits whose blocks share a scale: minifloat.py's reference once more, in loops that a compiler
 * vectorizes, a stretch of values from beginning to end while it lies in the cache.
 *
 * Built with -ffp-contract=off. Every operation rounds on its own, so that each instruction set gives the same bits.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdlib.h>

#include "_cpu.h"
#include "_inside.h"
#include "_minifloat.h"

#include "_rotation.h"
#include "_codes.h"
#include "_scales.h"

#define TOGETHER 1024 /* values, or more where blocks, groups and rows do not end there: these are not cut */

/* A span of values, and the codes, blocks' and groups' scales that are its own or begin with its own. */
typedef struct {
    float *values;
    uint8_t *codes;
    void *blocks;
    float *groups;
    size_t numel;
    Draws noise, signs;
} Piece;

/* What all spans have in common, and room for the values of a stretch and a number of each of its blocks. */
typedef struct {
    Format format;
    Rule rule;
    size_t block, stretch;
    int stochastic, turned, sign;
    float unit, *values, *factors;
} Work;

BODY void encode_body(const Piece *p, const Work *w) {
    for (size_t start = 0; start < p->numel; start += w->stretch) {
        size_t count = smaller(w->stretch, p->numel - start), row = start / w->block;
        size_t left = p->numel - start - count;
        const float *x = p->values + start;
        Encode e = {x, w->factors, left < count ? x : x + count, p->codes + (w->format.width == 8 ? start : start / 2),
                    count, w->block, w->stochastic, draws_from(p->noise, start)};
        if (w->turned) {
            turn_rows(e.x, w->values, count, draws_from(p->signs, start), w->unit);
            e.x = w->values;
        }
        if (w->rule.rule == FACTORS) {
            e.factors = (const float *)p->blocks + row;
        } else {
            block_maxima(e.x, w->factors, count, w->block);
            write_scales(w->factors, p->blocks, p->groups, row, (count + w->block - 1) / w->block, &w->rule,
                         w->format.largest);
        }
        encode_values(&e, &w->format);
    }
}

BODY void decode_body(const Piece *p, const Work *w) {
    for (size_t start = 0; start < p->numel; start += w->stretch) {
        size_t count = smaller(w->stretch, p->numel - start), row = start / w->block;
        Decode d = {p->codes + (w->format.width == 8 ? start : start / 2),
                    units_of(p->blocks, p->groups, row, (count + w->block - 1) / w->block, &w->rule, w->factors),
                    w->turned ? w->values : p->values + start, count, w->block, w->turned ? 0 : w->sign};
        decode_values(&d, &w->format);
        if (!w->turned) continue;
        Draws signs = draws_from(p->signs, start);
        if (w->sign)
            put_turned_back(w->values, p->values + start, count, signs, w->unit, w->sign);
        else
            put_turned_back(w->values, p->values + start, count, signs, w->unit, 0);
    }
}

typedef struct {
    void (*encode)(const Piece *, const Work *);
    void (*decode)(const Piece *, const Work *);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void encode_##name(const Piece *p, const Work *w) { encode_body(p, w); } \
    TARGET static void decode_##name(const Piece *p, const Work *w) { decode_body(p, w); } \
    static const Variant name##_variant = {encode_##name, decode_##name};

#include "_variants.h"

/* ---------------------------------------------------------------------------------------------- Python's side */

/* One line of the table of minifloat.py's Spans: where values, code bytes, blocks and groups begin; the first value's
 * place in its parameter, and which parameter that is. */
typedef struct {
    int64_t at, numel, codes, row, group, first, owner;
} Span;

/* The buffers that a table speaks of, and how many elements each has. */
typedef struct {
    unsigned long long values, codes, blocks, groups, keys, signs, table;
    Py_ssize_t values_size, codes_size, blocks_size, groups_size, keys_size, signs_size, spans, block, per;
} Spans;

static int spans_are_inside(const Spans *all, const Work *w) {
    const Span *span = (const Span *)(uintptr_t)all->table;
    for (Py_ssize_t i = 0; i < all->spans; i++, span++) {
        int64_t numel = span->numel;
        if (!inside(span->at, numel, all->values_size) ||
            !inside(span->codes, w->format.width == 8 ? numel : numel / 2 + numel % 2, all->codes_size)) {
            outside("span", i);
            return 0;
        }
        int64_t rows = numel / all->block + !!(numel % all->block);
        if (!inside(span->row, rows, all->blocks_size) ||
            (w->rule.rule == TWO_LEVELS &&
             !inside(span->group, rows / all->per + !!(rows % all->per), all->groups_size)) ||
            (w->stochastic && !inside(span->owner, 1, all->keys_size)) ||
            (w->turned && !inside(span->owner, 1, all->signs_size))) {
            outside("span", i);
            return 0;
        }
    }
    return 1;
}

static int work_is_possible(const Spans *all, const Work *w) {
    const Format *f = &w->format;
    int exponents = f->width - 1 - f->mantissa;
    if ((f->width != 4 && f->width != 8) || f->mantissa < 1 || exponents < 1 || f->bias < 0 || f->bias >= 32)
        return refused("this format") != NULL;
    if (all->block < 1 || (f->width == 4 && all->block % 2) || all->spans < 0)
        return refused("this block or width of codes") != NULL;
    if (w->rule.rule < FACTORS || w->rule.rule > TWO_LEVELS || all->per < 1 || all->per > PY_SSIZE_T_MAX / all->block)
        return refused("this rule of scales") != NULL;
    return spans_are_inside(all, w);
}

static size_t common_divisor(size_t a, size_t b) { return b ? common_divisor(b, a % b) : a; }

/* How long a stretch is, which ends with a block, a group and a row, and room for it; 0 with an error where there is
 * none. */
static int make_room(const Spans *all, Work *w) {
    const Span *span = (const Span *)(uintptr_t)all->table;
    size_t longest = 1, group = (size_t)(all->block * all->per);
    for (Py_ssize_t i = 0; i < all->spans; i++)
        if ((size_t)span[i].numel > longest) longest = (size_t)span[i].numel;
    size_t rows = w->turned ? SIDE / common_divisor(group, SIDE) : 1;
    w->stretch = group < longest ? smaller(group * rows, longest) : longest;
    if (w->stretch < TOGETHER) w->stretch *= TOGETHER / w->stretch;
    size_t values = w->turned ? smaller(w->stretch, longest) : 0, blocks = smaller(w->stretch, longest) / w->block + 1;
    w->values = malloc(sizeof(float) * (values + blocks));
    w->factors = w->values ? w->values + values : NULL;
    return w->values || PyErr_NoMemory() != NULL;
}

static Draws draws_of(unsigned long long keys, const Span *span) {
    uint64_t key = ((const uint64_t *)(uintptr_t)keys)[span->owner];
    return (Draws){(uint32_t)key + (uint32_t)span->first, (uint32_t)(key >> 32)};
}

static Piece piece_of(const Spans *all, const Span *span, const Work *w) {
    Piece p = {.values = (float *)(uintptr_t)all->values + span->at,
               .codes = (uint8_t *)(uintptr_t)all->codes + span->codes,
               .numel = (size_t)span->numel};
    size_t scale_bytes = w->rule.rule == POWERS || w->rule.rule == TWO_LEVELS ? 1 : sizeof(float);
    p.blocks = (char *)(uintptr_t)all->blocks + scale_bytes * (size_t)span->row;
    if (w->rule.rule == TWO_LEVELS) p.groups = (float *)(uintptr_t)all->groups + span->group;
    if (w->stochastic) p.noise = draws_of(all->keys, span);
    if (w->turned) p.signs = draws_of(all->signs, span);
    return p;
}

/* Each span through one of the variant's loops, without the interpreter's lock. */
static PyObject *run(const Spans *all, Work *w, int decoding) {
    w->block = (size_t)all->block;
    w->rule.per = (size_t)all->per;
    w->turned = all->signs_size > 0;
    w->unit = (float)(1 / sqrt((double)SIDE));
    if (!work_is_possible(all, w) || !make_room(all, w)) return NULL;
    const Variant *variant = serving(instruction_set());
    const Span *span = (const Span *)(uintptr_t)all->table;
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < all->spans; i++, span++) {
        Piece p = piece_of(all, span, w);
        (decoding ? variant->decode : variant->encode)(&p, w);
    }
    Py_END_ALLOW_THREADS
    free(w->values);
    Py_RETURN_NONE;
}

#define FORMAT(f) &(f).width, &(f).mantissa, &(f).bias, &(f).largest, &(f).infinity, &(f).nan, &(f).finite
#define SPANS(all) \
    &(all).values, &(all).codes, &(all).blocks, &(all).groups, &(all).values_size, &(all).codes_size, \
        &(all).blocks_size, &(all).groups_size, &(all).table, &(all).spans, &(all).block

PyObject *py_minifloat_encode(PyObject *self, PyObject *args) {
    (void)self;
    Spans all = {0};
    Work w = {0};
    if (!PyArg_ParseTuple(args, "(KKKK)(nnnn)Knn(iiifiii)(infp)(Kn)(Kn)", SPANS(all), FORMAT(w.format), &w.rule.rule,
                          &all.per, &w.rule.least, &w.rule.up, &all.keys, &all.keys_size, &all.signs, &all.signs_size))
        return NULL;
    w.stochastic = all.keys_size > 0;
    return run(&all, &w, 0);
}

PyObject *py_minifloat_decode(PyObject *self, PyObject *args) {
    (void)self;
    Spans all = {0};
    Work w = {0};
    if (!PyArg_ParseTuple(args, "(KKKK)(nnnn)Knn(iiifiii)(infp)(Kn)i", SPANS(all), FORMAT(w.format), &w.rule.rule,
                          &all.per, &w.rule.least, &w.rule.up, &all.signs, &all.signs_size, &w.sign))
        return NULL;
    return run(&all, &w, 1);
}
