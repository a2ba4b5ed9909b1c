/* Integers of up to 31 bits as the parts of their codes, and rounding to an absolute grid: compressors/fixed.py's
 * torch operations once more.
 *
 * The codes of a whole buffer are one block: low bytes first, plane after plane, while more than 15 bits are left, then
 * parts of 8, 4, 2 and 1 bits, whose planes share bytes (packing.py). Elements are taken in order, a stretch at a time;
 * what a later plane adds to a byte is or-ed in.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "_cpu.h"
#include "_inside.h"
#include "_integers.h"

#define CODES 1024 /* codes that are made before they are packed */
#define WIDEST 15  /* bits of the parts that share bytes */
#define MOST_PARTS 8
#define MOST_BITS 31

/* `width` bits at `shift` of each code, in planes of `height` bytes that begin at `offset`. */
typedef struct {
    size_t offset, height;
    int width, shift;
} CodePart;

typedef struct {
    CodePart each[MOST_PARTS];
    int count;
    size_t bytes;
} CodeParts;

static void add_part(CodeParts *parts, size_t numel, int width, int shift) {
    size_t planes = (size_t)(8 / width), height = (numel + planes - 1) / planes;
    parts->each[parts->count++] = (CodePart){parts->bytes, height, width, shift};
    parts->bytes += height;
}

static CodeParts parts_of(size_t numel, int bits) {
    CodeParts parts = {.count = 0, .bytes = 0};
    int shift = 0;
    for (; bits - shift > WIDEST; shift += 8) add_part(&parts, numel, 8, shift);
    int rest = bits - shift;
    for (int width = 8; width; width /= 2)
        if (rest & width) {
            add_part(&parts, numel, width, shift);
            shift += width;
        }
    return parts;
}

/* Codes of the elements `start` to `start + m`. */
BODY void write_codes(const uint32_t *restrict code, size_t start, size_t m, const CodeParts *parts,
                      uint8_t *restrict out) {
    for (int i = 0; i < parts->count; i++) {
        const CodePart part = parts->each[i];
        const uint32_t mask = (1u << part.width) - 1;
        for (size_t at = start; at < start + m;) {
            size_t plane = at / part.height, run = smaller((plane + 1) * part.height, start + m) - at;
            const size_t place = plane * (size_t)part.width;
            const uint32_t *from = code + (at - start);
            uint8_t *to = out + part.offset + (at - plane * part.height);
            if (plane == 0)
                for (size_t j = 0; j < run; j++) to[j] = (uint8_t)(from[j] >> part.shift & mask);
            else
                for (size_t j = 0; j < run; j++) to[j] |= (uint8_t)((from[j] >> part.shift & mask) << place);
            at += run;
        }
    }
}

BODY void read_codes(const uint8_t *restrict in, size_t start, size_t m, const CodeParts *parts,
                     uint32_t *restrict code) {
    for (size_t j = 0; j < m; j++) code[j] = 0;
    for (int i = 0; i < parts->count; i++) {
        const CodePart part = parts->each[i];
        const uint32_t mask = (1u << part.width) - 1;
        for (size_t at = start; at < start + m;) {
            size_t plane = at / part.height, run = smaller((plane + 1) * part.height, start + m) - at;
            const size_t place = plane * (size_t)part.width;
            const uint8_t *from = in + part.offset + (at - plane * part.height);
            uint32_t *to = code + (at - start);
            for (size_t j = 0; j < run; j++) to[j] |= ((uint32_t)from[j] >> place & mask) << part.shift;
            at += run;
        }
    }
}

/* reference.round_at_random of x / spacing, clamped to -s .. s, plus s: what is behind the point, with 24 bits, and 24
 * random bits are added as integers. */
BODY void grid_codes(const float *restrict x, uint32_t *restrict code, size_t m, float spacing, float s,
                     uint32_t counter, uint32_t key_high) {
    const int32_t middle = (int32_t)s;
    for (size_t j = 0; j < m; j++) {
        float y = clamped(x[j] / spacing, s);
        int32_t whole = (int32_t)y, fixed = (int32_t)((y - (float)whole) * 0x1p24f);
        int32_t noise = (int32_t)random_24(counter++, key_high);
        code[j] = (uint32_t)(whole + ((fixed + noise) >> 24) + middle);
    }
}

BODY void put_grid(const uint32_t *restrict code, float *restrict out, size_t m, float spacing, int32_t s, int sign) {
    for (size_t j = 0; j < m; j++) {
        float value = (float)((int32_t)code[j] - s) * spacing;
        out[j] = sign > 0 ? out[j] + value : sign < 0 ? out[j] - value : value;
    }
}

/* One line of the table: where values lie, and which element of its parameter the first of them is. */
typedef struct {
    int64_t at, numel, first;
} Line;

typedef struct {
    const float *x;
    float *out;
    uint8_t *codes;
    float spacing;
    int32_t s;
    int sign;
} Grid;

BODY void grid_encode_body(const Grid *g, const CodeParts *parts, const Line *line, uint64_t key) {
    uint32_t code[CODES], counter = (uint32_t)key + (uint32_t)line->first;
    for (size_t done = 0; done < (size_t)line->numel; done += CODES) {
        size_t m = smaller(CODES, (size_t)line->numel - done), at = (size_t)line->at + done;
        grid_codes(g->x + at, code, m, g->spacing, (float)g->s, counter + (uint32_t)done, (uint32_t)(key >> 32));
        write_codes(code, at, m, parts, g->codes);
    }
}

BODY void grid_decode_body(const Grid *g, const CodeParts *parts, size_t numel) {
    uint32_t code[CODES];
    for (size_t at = 0; at < numel; at += CODES) {
        size_t m = smaller(CODES, numel - at);
        read_codes(g->codes, at, m, parts, code);
        if (g->sign > 0)
            put_grid(code, g->out + at, m, g->spacing, g->s, 1);
        else if (g->sign < 0)
            put_grid(code, g->out + at, m, g->spacing, g->s, -1);
        else
            put_grid(code, g->out + at, m, g->spacing, g->s, 0);
    }
}

BODY void pack_body(const int64_t *integers, uint8_t *out, const CodeParts *parts, size_t numel) {
    uint32_t code[CODES];
    for (size_t at = 0; at < numel; at += CODES) {
        size_t m = smaller(CODES, numel - at);
        for (size_t j = 0; j < m; j++) code[j] = (uint32_t)integers[at + j];
        write_codes(code, at, m, parts, out);
    }
}

BODY void unpack_body(const uint8_t *in, int64_t *integers, const CodeParts *parts, size_t numel) {
    uint32_t code[CODES];
    for (size_t at = 0; at < numel; at += CODES) {
        size_t m = smaller(CODES, numel - at);
        read_codes(in, at, m, parts, code);
        for (size_t j = 0; j < m; j++) integers[at + j] = (int64_t)code[j];
    }
}

typedef struct {
    void (*encode)(const Grid *, const CodeParts *, const Line *, uint64_t);
    void (*decode)(const Grid *, const CodeParts *, size_t);
    void (*pack)(const int64_t *, uint8_t *, const CodeParts *, size_t);
    void (*unpack)(const uint8_t *, int64_t *, const CodeParts *, size_t);
} Variant;

#define VARIANT(name, TARGET) \
    TARGET static void encode_##name(const Grid *g, const CodeParts *parts, const Line *line, uint64_t key) { \
        grid_encode_body(g, parts, line, key); \
    } \
    TARGET static void decode_##name(const Grid *g, const CodeParts *parts, size_t n) { grid_decode_body(g, parts, n); } \
    TARGET static void pack_##name(const int64_t *from, uint8_t *to, const CodeParts *parts, size_t n) { \
        pack_body(from, to, parts, n); \
    } \
    TARGET static void unpack_##name(const uint8_t *from, int64_t *to, const CodeParts *parts, size_t n) { \
        unpack_body(from, to, parts, n); \
    } \
    static const Variant name##_variant = {encode_##name, decode_##name, pack_##name, unpack_##name};

#include "_variants.h"

/* ---------------------------------------------------------------------------------------------- Python's side */

/* Whether the codes of so many elements fit; an error if not. */
static int codes_fit(Py_ssize_t numel, int bits, Py_ssize_t codes_size) {
    if (bits < 1 || bits > MOST_BITS || numel < 0 || numel > PY_SSIZE_T_MAX / 8) {
        refused("this number of bits or elements");
        return 0;
    }
    if (inside(0, (int64_t)parts_of((size_t)numel, bits).bytes, codes_size)) return 1;
    refused("more integers than bytes for them");
    return 0;
}

PyObject *py_grid_encode(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long x, codes, table, keys;
    Py_ssize_t numel, codes_size, lines;
    int bits;
    Grid g = {0};
    if (!PyArg_ParseTuple(args, "KK(nn)KnKfi", &x, &codes, &numel, &codes_size, &table, &lines, &keys, &g.spacing,
                          &bits) ||
        !codes_fit(numel, bits, codes_size))
        return NULL;
    if (bits < 2 || bits > 23) return refused("a grid of so many bits");
    const Line *line = (const Line *)(uintptr_t)table;
    int64_t next = 0; /* in order and without gaps: a byte is begun by the first plane that has a part in it */
    for (Py_ssize_t i = 0; i < lines; i++) {
        if (line[i].at != next || !inside(line[i].at, line[i].numel, numel)) return outside("line", i);
        next += line[i].numel;
    }
    CodeParts parts = parts_of((size_t)numel, bits);
    g.x = (const float *)(uintptr_t)x;
    g.codes = (uint8_t *)(uintptr_t)codes;
    g.s = (1 << (bits - 1)) - 1;
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    for (Py_ssize_t i = 0; i < lines; i++) variant->encode(&g, &parts, &line[i], ((const uint64_t *)(uintptr_t)keys)[i]);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_grid_decode(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long out, codes;
    Py_ssize_t numel, codes_size;
    int bits;
    Grid g = {0};
    if (!PyArg_ParseTuple(args, "KK(nn)fii", &out, &codes, &numel, &codes_size, &g.spacing, &bits, &g.sign) ||
        !codes_fit(numel, bits, codes_size))
        return NULL;
    CodeParts parts = parts_of((size_t)numel, bits);
    g.out = (float *)(uintptr_t)out;
    g.codes = (uint8_t *)(uintptr_t)codes;
    g.s = (1 << (bits - 1)) - 1;
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    variant->decode(&g, &parts, (size_t)numel);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject *py_pack_integers(PyObject *self, PyObject *args) {
    (void)self;
    unsigned long long integers, codes;
    Py_ssize_t numel, codes_size;
    int bits, back;
    if (!PyArg_ParseTuple(args, "KK(nn)ip", &integers, &codes, &numel, &codes_size, &bits, &back) ||
        !codes_fit(numel, bits, codes_size))
        return NULL;
    CodeParts parts = parts_of((size_t)numel, bits);
    const Variant *variant = serving(instruction_set());
    Py_BEGIN_ALLOW_THREADS
    if (back)
        variant->unpack((const uint8_t *)(uintptr_t)codes, (int64_t *)(uintptr_t)integers, &parts, (size_t)numel);
    else
        variant->pack((const int64_t *)(uintptr_t)integers, (uint8_t *)(uintptr_t)codes, &parts, (size_t)numel);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}
