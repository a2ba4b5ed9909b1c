/* What a block's scale is, by the rules of scales.py: from the block's largest magnitude the scale, as it is sent, and
 * what values are multiplied by; and from what was sent the unit of the numbers.
 */
enum { FACTORS, POWERS, FLOATS, TWO_LEVELS }; /* as Python numbers them */

typedef struct {
    int rule, up;
    size_t per; /* blocks of a group */
    float least;
} Rule;

#define NORMAL (120u << 3) /* from e4m3's exponent to float32's, as codes of e4m3 */
#define E4M3_LARGEST 448.0f

/* The largest magnitude by the order of the integers that bits are: a NaN is above an infinity. */
BODY float largest_magnitude(const float *x, size_t m) {
    int32_t largest = 0;
    for (size_t j = 0; j < m; j++) {
        int32_t magnitude = (int32_t)(bits_of(x[j]) & 0x7fffffffu);
        largest = magnitude > largest ? magnitude : largest;
    }
    return float_of((uint32_t)largest);
}

BODY void maxima_of_blocks(const float *restrict x, float *restrict maxima, size_t numel, size_t block) {
    size_t whole = numel / block;
    for (size_t row = 0; row < whole; row++) maxima[row] = largest_magnitude(x + row * block, block);
    if (numel % block) maxima[whole] = largest_magnitude(x + whole * block, numel % block);
}

BODY void block_maxima(const float *x, float *maxima, size_t numel, size_t block) {
    if (block == 16) maxima_of_blocks(x, maxima, numel, 16);
    else if (block == 32) maxima_of_blocks(x, maxima, numel, 32);
    else if (block == 128) maxima_of_blocks(x, maxima, numel, 128);
    else maxima_of_blocks(x, maxima, numel, block);
}

/* The exponent of each block's scale, which is a power of two, and one over the scale; 255 and 0 of inf and NaN. */
BODY void power_scales(float *restrict factors, uint8_t *restrict codes, size_t rows, float largest, int up) {
    const int32_t exponent = (int32_t)(bits_of(largest) >> 23) - 127;
    const int32_t highest = up ? (int32_t)(bits_of(largest) & 0x7fffff) : 0x7fffff;
    for (size_t i = 0; i < rows; i++) {
        int32_t bits = (int32_t)bits_of(factors[i]);
        int32_t code = (bits >> 23) - exponent + ((bits & 0x7fffff) > highest);
        code = code > 1 ? code : 1;
        int bad = bits >= 0x7f800000;
        codes[i] = (uint8_t)(bad ? 255 : code);
        factors[i] = float_of(bad ? 0 : (uint32_t)(254 - code) << 23);
    }
}

BODY void float_scales(float *restrict factors, float *restrict scales, size_t rows, float largest, float least) {
    for (size_t i = 0; i < rows; i++) {
        float scale = (factors[i] < least ? 0.0f : factors[i]) / largest, inverse = 1 / scale;
        scales[i] = scale;
        factors[i] = scale > 0 ? inverse : 0.0f;
    }
}

/* One group of blocks. A ratio, from 2^-6 to 448, is an e4m3 whose exponent is normal: to the nearest, ties to even; or
 * up. Where a ratio is a NaN the whole group is not usable. Returns the group's scale. */
BODY float group_scales(float *restrict factors, uint8_t *restrict codes, size_t rows, float units,
                        const Rule *rule) {
    int32_t most = 0;
    for (size_t i = 0; i < rows; i++) {
        int32_t bits = (int32_t)bits_of(factors[i]); /* as integers a NaN is the largest */
        most = bits > most ? bits : most;
    }
    float largest = float_of((uint32_t)most);
    if (largest < rule->least) largest = 0.0f;
    const float outer = largest / (E4M3_LARGEST * units), given = outer > 0 ? outer : 1.0f, inverse = 1 / given;
    const int usable = outer > 0 && bits_of(outer) != 0x7F800000u, up = rule->up;
    for (size_t i = 0; i < rows; i++) {
        float ratio = factors[i] / units / given;
        ratio = ratio < 0x1p-6f ? 0x1p-6f : ratio;
        ratio = ratio > E4M3_LARGEST ? E4M3_LARGEST : ratio;
        uint32_t bits = bits_of(ratio), code = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - NORMAL;
        code += up & (float_of((code + NORMAL) << 20) < ratio); /* 448, the largest, is below none */
        codes[i] = (uint8_t)(ratio == ratio ? code : 0x7F | bits >> 31 << 7);
        float found = inverse / float_of((code + NORMAL) << 20);
        factors[i] = usable ? found : 0.0f;
    }
    return outer;
}

/* Blocks' scales (float32 of the rules FACTORS and FLOATS, else bytes) and groups', from `row` on, which begins a
 * group. */
BODY void write_scales(float *factors, void *blocks, float *groups, size_t row, size_t rows, const Rule *rule,
                       float largest) {
    if (rule->rule == FLOATS) float_scales(factors, (float *)blocks + row, rows, largest, rule->least);
    if (rule->rule == POWERS) power_scales(factors, (uint8_t *)blocks + row, rows, largest, rule->up);
    if (rule->rule != TWO_LEVELS) return;
    for (size_t at = 0; at < rows; at += rule->per)
        groups[(row + at) / rule->per] = group_scales(factors + at, (uint8_t *)blocks + row + at,
                                                      smaller(rule->per, rows - at), largest, rule);
}

BODY void power_units(const uint8_t *restrict codes, float *restrict units, size_t rows) {
    for (size_t i = 0; i < rows; i++) units[i] = float_of(codes[i] == 255 ? 0x7FC00000u : (uint32_t)codes[i] << 23);
}

/* A group's scale times what each e4m3 stands for. */
BODY void group_units(const uint8_t *restrict codes, float *restrict units, size_t rows, float outer) {
    for (size_t i = 0; i < rows; i++) {
        uint32_t magnitude = codes[i] & 0x7Fu, sign = (uint32_t)codes[i] >> 7 << 31;
        uint32_t bits = magnitude < 8 ? bits_of((float)(int32_t)magnitude * 0x1p-9f) : (magnitude + NORMAL) << 20;
        bits = magnitude == 0x7F ? 0x7FF00000u : bits;
        units[i] = outer * float_of(bits | sign);
    }
}

/* The units of so many blocks: where they lie, in `room` unless they are what was sent. */
BODY const float *units_of(const void *blocks, const float *groups, size_t row, size_t rows, const Rule *rule,
                           float *room) {
    if (rule->rule == POWERS) power_units((const uint8_t *)blocks + row, room, rows);
    if (rule->rule == TWO_LEVELS)
        for (size_t at = 0; at < rows; at += rule->per)
            group_units((const uint8_t *)blocks + row + at, room + at, smaller(rule->per, rows - at),
                        groups[(row + at) / rule->per]);
    return rule->rule == POWERS || rule->rule == TWO_LEVELS ? room : (const float *)blocks + row;
}
