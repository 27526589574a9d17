// Quantizers of GGUF weights, bit for bit those of ggml: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q3_K, Q4_K, Q5_K, Q6_K.
//
// A lane of every vector is one row of the matrix, so sixteen rows are searched at the same time and each lane does the
// operations of ggml's scalar code in their order: sums are never reordered, nothing is contracted (-ffp-contract=off).
// The compiler lowers the vectors to what a machine has, so there is one path and one result for all of them.
// Order of operations after ggml/src/ggml-quants.c of llama.cpp (MIT licence).

#include <cstdint>
#include <cstring>

namespace {

constexpr int LANES = 16, SUPER = 256, SMALL = 32;
constexpr float ALL_ZERO = 1e-15f, ROUND = 12582912.f;  // 1.5 * 2^23: adding it leaves the rounded number in the bits
typedef float vector __attribute__((vector_size(64)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint8_t bytes __attribute__((vector_size(16)));

inline vector every(float x) { return vector{} + x; }
inline integers whole(int x) { return integers{} + x; }
inline integers bits(vector x) { return (integers)x; }
inline vector larger(vector x, vector y) { return x > y ? x : y; }
inline vector smaller(vector x, vector y) { return x < y ? x : y; }
inline vector clamp(vector x, float low, float high) { return larger(smaller(x, every(high)), every(low)); }
inline vector magnitude(vector x) { return (vector)(bits(x) & 0x7fffffff); }
inline vector floats(integers x) { return __builtin_convertvector(x, vector); }
inline bool some(integers mask) {
    int64_t words[8], all = 0;
    std::memcpy(words, &mask, 64);
    for (int64_t word : words) all |= word;
    return all != 0;
}
inline vector root(vector x) {
    for (int i = 0; i < LANES; ++i) x[i] = __builtin_sqrtf(x[i]);
    return x;
}

// Nearest integer, ties to even. The bits, not the difference, decide: numbers out of range wrap as they do in ggml.
inline vector nearest(vector x) {
    return (vector)((bits(x + ROUND) & 0x007fffff) | 0x4b000000) - ROUND;
}
inline integers nearest_integer(vector x) { return (bits(x + ROUND) & 0x007fffff) - 0x00400000; }

// The low byte of a float cut to an integer; what does not fit gives 0, as the x86 instruction's 0x80000000 does.
inline integers cut(vector x) {
    integers fits = (x > -128.f) & (x < 256.f);
    return __builtin_convertvector(fits ? x : vector{}, integers);
}

inline uint16_t half_of(float value) {  // to nearest, ties to even
    uint32_t x;
    std::memcpy(&x, &value, 4);
    uint32_t sign = (x >> 16) & 0x8000, body = x & 0x7fffffff;
    if (body > 0x7f800000) return sign | 0x7e00;
    if (body >= 0x47800000) return sign | 0x7c00;
    if (body < 0x38800000) {  // a subnormal half: adding 0.5 rounds at 2^-24
        float small;
        std::memcpy(&small, &body, 4);
        small += 0.5f;
        std::memcpy(&body, &small, 4);
        return sign | (body - 0x3f000000);
    }
    return sign | ((body + 0xfff + ((body >> 13) & 1) - 0x38000000) >> 13);
}
inline float float_of(uint16_t half) {
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, body = half & 0x7fff, x;
    float value;
    if (body < 0x0400) {
        value = (float)body * 5.9604644775390625e-8f;
        std::memcpy(&x, &value, 4);
    } else {
        x = body >= 0x7c00 ? 0x7f800000 | (body << 13) : (body << 13) + 0x38000000;
    }
    x |= sign;
    std::memcpy(&value, &x, 4);
    return value;
}

// One block of sixteen rows on its way out: each field is written for all lanes, byte by byte.
struct Block {
    uint8_t* row[LANES];
    void byte(int place, integers value) const {
        bytes narrow = __builtin_convertvector(value, bytes);
        for (int i = 0; i < LANES; ++i) row[i][place] = narrow[i];
    }
    vector half(int place, vector value) const {  // returns what a reader will see
        for (int i = 0; i < LANES; ++i) {
            uint16_t stored = half_of(value[i]);
            std::memcpy(row[i] + place, &stored, 2);
            value[i] = float_of(stored);
        }
        return value;
    }
};

// What a search found: the values of sub-block are scale * l (+ minimum). ggml keeps the l of the search only where the
// stored scale is 0, so not they are kept but how to compute them again.
struct Found {
    vector scale, minimum, inverse, from;  // l = nearest(inverse * (x - from))
    integers empty;
};

// --- searches: signed l in [-top, top) ---------------------------------------------------------------------------

// Take the value of largest magnitude; `empty` where all are (next to) zero.
template <int N> inline vector extreme(const vector* x, integers& empty) {
    vector most{}, signed_most{};
    for (int i = 0; i < N; ++i) {
        vector size = magnitude(x[i]);
        integers more = size > most;
        most = more ? size : most;
        signed_most = more ? x[i] : signed_most;
    }
    empty = most < ALL_ZERO;
    return signed_most;
}

// Weighted least squares over 19 scales (make_qx_quants). `w` null: x * x.
template <int N, int TOP> Found search_signed(const vector* x, const vector* w) {
    Found found{};
    vector most = extreme<N>(x, found.empty), wx[N], own[N], best{};
    if (!w) {
        for (int i = 0; i < N; ++i) own[i] = x[i] * x[i];
        w = own;
    }
    for (int i = 0; i < N; ++i) wx[i] = w[i] * x[i];
    for (int step = -10; step <= 9; ++step) {  // -10 stands for the first, unshifted attempt
        if (step == 0) continue;
        bool first = step == -10;
        vector inverse = (first ? every(-TOP) : every(-(TOP + 0.1f * step))) / most, sum_lx{}, sum_l2{};
        for (int i = 0; i < N; ++i) {
            vector l = clamp(nearest(inverse * x[i]), -TOP, TOP - 1);
            sum_lx += wx[i] * l;
            sum_l2 += w[i] * l * l;
        }
        if (first) {
            found.scale = sum_l2 != 0.f ? sum_lx / sum_l2 : vector{};
            found.inverse = inverse;
            best = found.scale * sum_lx;
        } else {
            integers better = (sum_l2 > 0.f) & (sum_lx * sum_lx > best * sum_l2);
            vector scale = sum_lx / sum_l2;
            found.scale = better ? scale : found.scale;
            found.inverse = better ? inverse : found.inverse;
            best = better ? scale * sum_lx : best;
        }
    }
    found.scale = found.empty ? vector{} : found.scale;
    return found;
}
template <int TOP> inline vector signed_level(const Found& found, vector x) {  // 0 .. 2 top - 1
    return found.empty ? vector{} : clamp(nearest(found.inverse * x), -TOP, TOP - 1) + (float)TOP;
}

// Coordinate descent from the plain scale (make_q3_quants); fills levels 0 .. 2 top - 1 and returns the scale.
template <int N, int TOP> vector search_by_turns(const vector* x, vector* level) {
    integers empty;
    vector inverse = every(-TOP) / extreme<N>(x, empty), w[N], wx[N], sum_lx{}, sum_l2{};
    for (int i = 0; i < N; ++i) {
        level[i] = clamp(nearest(inverse * x[i]), -TOP, TOP - 1);
        w[i] = x[i] * x[i];
        wx[i] = w[i] * x[i];
        sum_lx += wx[i] * level[i];
        sum_l2 += w[i] * level[i] * level[i];
    }
    for (int turn = 0; turn < 5; ++turn) {  // a lane that did not change does not change later
        integers changed{};
        for (int i = 0; i < N; ++i) {
            vector lx = sum_lx - wx[i] * level[i], l2 = sum_l2 - w[i] * level[i] * level[i];
            vector l = clamp(nearest(x[i] * l2 / lx), -TOP, TOP - 1);
            integers take = (lx > 0.f) & (l != level[i]);
            lx += wx[i] * l;
            l2 += w[i] * l * l;
            take &= (l2 > 0.f) & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            level[i] = take ? l : level[i];
            sum_lx = take ? lx : sum_lx;
            sum_l2 = take ? l2 : sum_l2;
            changed |= take;
        }
        if (!some(changed)) break;
    }
    for (int i = 0; i < N; ++i) level[i] = empty ? vector{} : level[i] + (float)TOP;
    return empty | ~(sum_l2 > 0.f) ? vector{} : sum_lx / sum_l2;
}

// --- searches: l in [0, top] with a minimum ------------------------------------------------------------------------

// Weighted least squares for scale and minimum over steps + 1 scales (make_qkx2_quants, make_qkx3_quants).
template <int N, int TOP> Found search_with_minimum(const vector* x, const vector* w, float start, float width, int steps) {
    vector least = x[0], most = x[0], sum_w = w[0], sum_x = w[0] * x[0];
    for (int i = 1; i < N; ++i) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
        sum_w += w[i];
        sum_x += w[i] * x[i];
    }
    least = least > 0.f ? vector{} : least;
    Found found{{}, least, every(TOP) / (most - least), least, most == least};
    vector error{}, flat = least, level[N];
    found.scale = 1.f / found.inverse;
    for (int i = 0; i < N; ++i) {
        vector l = clamp(nearest(found.inverse * (x[i] - least)), 0, TOP);
        vector off = found.scale * l + least - x[i];
        error += w[i] * (off * off);
    }
    for (int step = 0; step <= steps; ++step) {
        vector inverse = every(start + width * step + TOP) / (most - found.minimum), sum_l{}, sum_l2{}, sum_xl{};
        for (int i = 0; i < N; ++i) {
            vector l = clamp(nearest(inverse * (x[i] - found.minimum)), 0, TOP), wl = w[i] * l;
            level[i] = l;
            sum_l += wl;
            sum_l2 += wl * l;
            sum_xl += wl * x[i];
        }
        vector determinant = sum_w * sum_l2 - sum_l * sum_l;
        vector scale = (sum_w * sum_xl - sum_x * sum_l) / determinant;
        vector minimum = (sum_l2 * sum_x - sum_l * sum_xl) / determinant, off_by{};
        integers above = minimum > 0.f;
        minimum = above ? vector{} : minimum;
        scale = above ? sum_xl / sum_l2 : scale;
        for (int i = 0; i < N; ++i) {
            vector off = scale * level[i] + minimum - x[i];
            off_by += w[i] * (off * off);
        }
        integers better = (determinant > 0.f) & (off_by < error);
        found.from = better ? found.minimum : found.from;
        found.inverse = better ? inverse : found.inverse;
        found.minimum = better ? minimum : found.minimum;
        found.scale = better ? scale : found.scale;
        error = better ? off_by : error;
    }
    found.scale = found.empty ? vector{} : found.scale;
    found.minimum = found.empty ? flat : found.minimum;
    return found;
}
template <int TOP> inline vector level_above(const Found& found, vector x) {
    return found.empty ? vector{} : clamp(nearest(found.inverse * (x - found.from)), 0, TOP);
}

// Levels 0 .. top for numbers that are not negative, and their scale (make_qp_quants). ggml keeps levels in a byte:
// a negative one wraps.
template <int N, int TOP> vector search_positive(const vector* x, integers* level, const vector* w) {
    vector most{};
    for (int i = 0; i < N; ++i) most = most > x[i] ? most : x[i];
    integers empty = most < ALL_ZERO;
    vector inverse = every(TOP) / most, scale = 1.f / inverse, error{};
    for (int i = 0; i < N; ++i) {
        vector off = x[i] - scale * floats(nearest_integer(inverse * x[i]) & 255);
        error += w[i] * off * off;
    }
    for (int step = -4; step <= 4; ++step) {
        if (step == 0) continue;
        vector shifted = every(0.1f * step + TOP) / most, its_scale = 1.f / shifted, its_error{};
        for (int i = 0; i < N; ++i) {
            vector off = x[i] - its_scale * smaller(nearest(shifted * x[i]), every(TOP));
            its_error += w[i] * off * off;
        }
        integers better = its_error < error;
        error = better ? its_error : error;
        inverse = better ? shifted : inverse;
    }
    vector sum_lx{}, sum_l2{}, kept[N];
    for (int i = 0; i < N; ++i) {
        vector l = smaller(nearest(inverse * x[i]), every(TOP));
        kept[i] = floats(__builtin_convertvector(l, integers) & 255);
        sum_lx += w[i] * x[i] * l;
        sum_l2 += w[i] * l * l;
    }
    for (int turn = 0; turn < 5; ++turn) {
        integers changed{};
        for (int i = 0; i < N; ++i) {
            vector wx = w[i] * x[i], lx = sum_lx - wx * kept[i], l2 = sum_l2 - w[i] * kept[i] * kept[i];
            vector l = smaller(nearest(x[i] * l2 / lx), every(TOP));
            integers take = (lx > 0.f) & (l2 > 0.f) & (l != kept[i]);
            lx += wx * l;
            l2 += w[i] * l * l;
            take &= lx * lx * sum_l2 > sum_lx * sum_lx * l2;
            kept[i] = take ? floats(__builtin_convertvector(l, integers) & 255) : kept[i];
            sum_lx = take ? lx : sum_lx;
            sum_l2 = take ? l2 : sum_l2;
            changed |= take;
        }
        if (!some(changed)) break;
    }
    for (int i = 0; i < N; ++i) level[i] = empty ? integers{} : __builtin_convertvector(kept[i], integers);
    return empty | ~(sum_l2 > 0.f) ? vector{} : sum_lx / sum_l2;
}

// --- blocks of 32 ----------------------------------------------------------------------------------------------------

// Importance of each value: the column's, times the root of the row's mean square plus its own.
inline void weigh(const vector* x, const float* importance, int count, vector mean_square, vector* w) {
    for (int i = 0; i < count; ++i) w[i] = importance[i] * root(mean_square + x[i] * x[i]);
}

// Put 32 levels of 4 bits (and, with `fifth`, their fifth bits before them) into a block.
inline void pack_small(const Block& block, int place, const integers* l, bool fifth) {
    if (fifth) {
        for (int byte = 0; byte < 4; ++byte) {
            integers high{};
            for (int bit = 0; bit < 8; ++bit) high |= ((l[8 * byte + bit] >> 4) & 1) << bit;
            block.byte(place + byte, high);
        }
        place += 4;
    }
    for (int i = 0; i < 16; ++i) block.byte(place + i, (l[i] & 15) | ((l[i + 16] & 15) << 4));
}

// Q4_0 and Q5_0.
template <int TOP> void symmetric(const vector* x, const float* importance, vector mean_square, const Block& block) {
    integers l[SMALL];
    if (importance) {
        vector w[SMALL];
        weigh(x, importance, SMALL, mean_square, w);
        Found found = search_signed<SMALL, TOP>(x, w);
        block.half(0, found.scale);
        for (int i = 0; i < SMALL; ++i) l[i] = __builtin_convertvector(signed_level<TOP>(found, x[i]), integers);
    } else {
        integers empty;
        vector scale = extreme<SMALL>(x, empty) / (float)-TOP, inverse = scale != 0.f ? 1.f / scale : vector{};
        block.half(0, scale);
        for (int i = 0; i < SMALL; ++i) {
            integers level = cut(x[i] * inverse + (TOP + 0.5f));
            l[i] = level < 2 * TOP - 1 ? level : whole(2 * TOP - 1);
        }
    }
    pack_small(block, 2, l, TOP == 16);
}

// Q4_1 and Q5_1.
template <int TOP> void with_minimum(const vector* x, const float* importance, vector mean_square, const Block& block) {
    integers l[SMALL];
    if (importance) {
        vector w[SMALL];
        weigh(x, importance, SMALL, mean_square, w);
        Found found = search_with_minimum<SMALL, TOP>(x, w, -0.9f, 0.05f, 36);
        block.half(0, found.scale);
        block.half(2, found.minimum);
        for (int i = 0; i < SMALL; ++i) l[i] = __builtin_convertvector(level_above<TOP>(found, x[i]), integers);
    } else {
        vector least = every(3.402823466e+38f), most = -least;
        for (int i = 0; i < SMALL; ++i) {
            least = x[i] < least ? x[i] : least;
            most = x[i] > most ? x[i] : most;
        }
        vector scale = (most - least) / (float)TOP, inverse = scale != 0.f ? 1.f / scale : vector{};
        block.half(0, scale);
        block.half(2, least);
        for (int i = 0; i < SMALL; ++i) {
            integers level = cut((x[i] - least) * inverse + 0.5f);
            l[i] = TOP == 31 ? level : level < TOP ? level : whole(TOP);  // ggml's Q5_1 has no limit
        }
    }
    pack_small(block, 4, l, TOP == 31);
}

void q8_0(const vector* x, const Block& block) {
    vector most{};
    for (int i = 0; i < SMALL; ++i) most = larger(most, magnitude(x[i]));
    vector scale = most / 127, inverse = scale != 0.f ? 1.f / scale : vector{};
    block.half(0, scale);
    for (int i = 0; i < SMALL; ++i) {
        vector value = x[i] * inverse;
        integers l = cut(value);
        vector left = value - floats(l);  // halves go away from zero
        l += (left >= 0.5f) & 1;
        l -= (left <= -0.5f) & 1;
        block.byte(2 + i, magnitude(value) < 200.f ? l : integers{});
    }
}

// --- blocks of 256 -----------------------------------------------------------------------------------------------------

inline vector twice_mean_square(const vector* x) {
    vector sum{};
    for (int i = 0; i < SUPER; ++i) sum += x[i] * x[i];
    return 2.f * sum / SUPER;
}

// The scale of a sub-block as a reader gets it: 16 levels each again, or what the search found where it is 0.
template <int N, int LOW, int HIGH, class Level>
inline void requantize(const vector* x, vector scale, vector offset, Level found, vector* level) {
    integers none = scale == 0.f;
    for (int i = 0; i < N; ++i) level[i] = clamp(nearest((x[i] + offset) / scale), LOW, HIGH) - (float)LOW;
    if (!some(none)) return;
    for (int i = 0; i < N; ++i) level[i] = none ? found(i) : level[i];
}

// Q4_K and Q5_K: 8 sub-blocks with scales and minima of 6 bits.
template <int TOP> void k_with_minimum(const vector* x, const float* importance, const Block& block) {
    constexpr int PARTS = 8, N = 32;
    Found found[PARTS];
    vector scales[PARTS], minima[PARTS], sums[PARTS], w[N], level[SUPER];
    vector spread = importance ? twice_mean_square(x) : vector{};
    for (int j = 0; j < PARTS; ++j) {
        const vector* part = x + N * j;
        if (importance) {
            weigh(part, importance + N * j, N, spread, w);
            sums[j] = vector{};
            for (int i = 0; i < N; ++i) sums[j] += w[i];
            found[j] = search_with_minimum<N, TOP>(part, w, -0.9f, 0.05f, 36);
        } else {
            vector sum{};
            for (int i = 0; i < N; ++i) sum += part[i] * part[i];
            vector average = root(sum / N);
            for (int i = 0; i < N; ++i) w[i] = average + magnitude(part[i]);
            found[j] = TOP == 15 ? search_with_minimum<N, TOP>(part, w, -1.f, 0.1f, 20)
                                 : search_with_minimum<N, TOP>(part, w, -0.5f, 0.1f, 15);
        }
        scales[j] = found[j].scale;
        minima[j] = -found[j].minimum;
    }
    integers ls[PARTS], lm[PARTS], packed[12];
    vector scale, minimum;
    if (importance) {
        scale = search_positive<PARTS, 63>(scales, ls, sums);
        minimum = search_positive<PARTS, 63>(minima, lm, sums);
    } else {
        vector most_scale{}, most_minimum{};
        for (int j = 0; j < PARTS; ++j) {
            most_scale = scales[j] > most_scale ? scales[j] : most_scale;
            most_minimum = minima[j] > most_minimum ? minima[j] : most_minimum;
        }
        vector inverse_scale = most_scale > 0.f ? 63.f / most_scale : vector{};
        vector inverse_minimum = most_minimum > 0.f ? 63.f / most_minimum : vector{};
        for (int j = 0; j < PARTS; ++j) {
            ls[j] = nearest_integer(inverse_scale * scales[j]) & 255;
            lm[j] = nearest_integer(inverse_minimum * minima[j]) & 255;
        }
        scale = most_scale / 63.f;
        minimum = most_minimum / 63.f;
    }
    for (int j = 0; j < PARTS; ++j) {
        if (!importance || TOP == 31) {  // ggml's Q4_K with importance does not limit them
            ls[j] = ls[j] < 63 ? ls[j] : whole(63);
            lm[j] = lm[j] < 63 ? lm[j] : whole(63);
        }
        if (j < 4) {
            packed[j] = ls[j];
            packed[j + 4] = lm[j];
        } else {
            packed[j + 4] = (ls[j] & 15) | ((lm[j] & 15) << 4);
            packed[j - 4] = (packed[j - 4] | ((ls[j] >> 4) << 6)) & 255;
            packed[j] = (packed[j] | ((lm[j] >> 4) << 6)) & 255;
        }
    }
    scale = block.half(0, scale);
    minimum = block.half(2, minimum);
    for (int i = 0; i < 12; ++i) block.byte(4 + i, packed[i]);
    for (int j = 0; j < PARTS; ++j) {
        const vector* part = x + N * j;
        integers s = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | ((packed[j - 4] >> 6) << 4);
        integers m = j < 4 ? packed[j + 4] & 63 : (packed[j + 4] >> 4) | ((packed[j] >> 6) << 4);
        requantize<N, 0, TOP>(part, scale * floats(s), minimum * floats(m),
                              [&](int i) { return level_above<TOP>(found[j], part[i]); }, level + N * j);
    }
    integers l[SUPER];
    for (int i = 0; i < SUPER; ++i) l[i] = __builtin_convertvector(level[i], integers);
    int low = 16;
    if (TOP == 31) {
        for (int i = 0; i < 32; ++i) {
            integers high{};
            for (int j = 0; j < PARTS; ++j) high |= (l[32 * j + i] >> 4) << j;
            block.byte(16 + i, high);
        }
        low = 48;
    }
    for (int j = 0; j < PARTS / 2; ++j)
        for (int i = 0; i < 32; ++i)
            block.byte(low + 32 * j + i, (l[64 * j + i] & 15) | ((l[64 * j + 32 + i] & 15) << 4));
}

void q6_k(const vector* x, const float* importance, const Block& block) {
    constexpr int PARTS = 16, N = 16;
    Found found[PARTS];
    vector w[N], level[SUPER], most{}, most_scale{};
    for (int j = 0; j < PARTS; ++j) {
        if (importance)
            for (int i = 0; i < N; ++i) w[i] = every(importance[N * j + i]);
        found[j] = search_signed<N, 32>(x + N * j, importance ? w : nullptr);
        integers more = magnitude(found[j].scale) > most;
        most = more ? magnitude(found[j].scale) : most;
        most_scale = more ? found[j].scale : most_scale;
    }
    integers empty = most < ALL_ZERO, l[SUPER];
    vector inverse = -128.f / most_scale;
    vector scale = block.half(208, empty ? vector{} : 1.f / inverse);
    for (int j = 0; j < PARTS; ++j) {
        integers s = nearest_integer(inverse * found[j].scale);
        s = empty ? integers{} : (s < 127 ? s : whole(127));
        block.byte(192 + j, s & 255);
        s = (s << 24) >> 24;  // stored in a signed byte
        requantize<N, -32, 31>(x + N * j, scale * floats(s), vector{},
                               [&](int i) { return signed_level<32>(found[j], x[N * j + i]); }, level + N * j);
    }
    for (int i = 0; i < SUPER; ++i) l[i] = empty ? integers{} : __builtin_convertvector(level[i], integers);
    for (int part = 0; part < 2; ++part) {
        const integers* from = l + 128 * part;
        for (int i = 0; i < 32; ++i) {
            block.byte(64 * part + i, (from[i] & 15) | ((from[i + 64] & 15) << 4));
            block.byte(64 * part + 32 + i, (from[i + 32] & 15) | ((from[i + 96] & 15) << 4));
            block.byte(128 + 32 * part + i, (from[i] >> 4) | ((from[i + 32] >> 4) << 2) | ((from[i + 64] >> 4) << 4) |
                                                ((from[i + 96] >> 4) << 6));
        }
    }
}

void q3_k(const vector* x, const float* importance, const Block& block) {
    constexpr int PARTS = 16, N = 16;
    Found found[PARTS];
    vector w[N], scales[PARTS], sums[PARTS], turned[SUPER], level[SUPER], scale;
    integers ls[PARTS], packed[12] = {}, l[SUPER];
    if (importance) {
        vector spread = twice_mean_square(x);
        for (int j = 0; j < PARTS; ++j) {
            weigh(x + N * j, importance + N * j, N, spread, w);
            sums[j] = vector{};
            for (int i = 0; i < N; ++i) sums[j] += w[i];
            found[j] = search_signed<N, 4>(x + N * j, w);
            scales[j] = found[j].scale;
        }
        Found outer = search_signed<PARTS, 32>(scales, sums);
        scale = outer.scale;
        for (int j = 0; j < PARTS; ++j) ls[j] = __builtin_convertvector(signed_level<32>(outer, scales[j]), integers);
    } else {
        vector most{}, most_scale{};
        for (int j = 0; j < PARTS; ++j) {
            scales[j] = search_by_turns<N, 4>(x + N * j, turned + N * j);
            integers more = magnitude(scales[j]) > most;
            most = more ? magnitude(scales[j]) : most;
            most_scale = more ? scales[j] : most_scale;
        }
        integers none = most_scale == 0.f;
        vector inverse = -32.f / most_scale;
        scale = none ? vector{} : 1.f / inverse;
        for (int j = 0; j < PARTS; ++j) {
            integers s = (nearest_integer(inverse * scales[j]) << 24) >> 24;  // in a signed byte
            s = s < 31 ? s : whole(31);
            ls[j] = none ? integers{} : (s > -32 ? s : whole(-32)) + 32;
        }
    }
    for (int j = 0; j < PARTS; ++j) {
        packed[j % 8] |= (ls[j] & 15) << (j < 8 ? 0 : 4);
        packed[8 + j % 4] |= (ls[j] >> 4) << (2 * (j / 4));
    }
    scale = block.half(108, scale);
    for (int i = 0; i < 12; ++i) block.byte(96 + i, packed[i]);
    for (int j = 0; j < PARTS; ++j) {
        const vector* part = x + N * j;
        requantize<N, -4, 3>(part, scale * floats(ls[j] - 32), vector{},
                             [&](int i) { return importance ? signed_level<4>(found[j], part[i]) : turned[N * j + i]; },
                             level + N * j);
    }
    for (int i = 0; i < SUPER; ++i) l[i] = __builtin_convertvector(level[i], integers);
    for (int i = 0; i < 32; ++i) {
        integers high{};
        for (int j = 0; j < 8; ++j) high |= (l[32 * j + i] >> 2) << j;
        block.byte(i, high);
    }
    for (int part = 0; part < 2; ++part)
        for (int i = 0; i < 32; ++i) {
            const integers* from = l + 128 * part + i;
            block.byte(32 + 32 * part + i,
                       (from[0] & 3) | ((from[32] & 3) << 2) | ((from[64] & 3) << 4) | ((from[96] & 3) << 6));
        }
}

// --- rows ----------------------------------------------------------------------------------------------------------------

struct Rows {
    const void* from;
    bool narrow;  // bfloat16, else float
    int64_t width, first, count;
    int64_t row(int lane) const { return first + (lane < count ? lane : count - 1); }
    // Values [column, column + n) of sixteen rows, transposed. Lanes past the last row repeat it.
    void read(int64_t column, int n, vector* x) const {
        for (int lane = 0; lane < LANES; ++lane) {
            int64_t at = row(lane) * width + column;
            float* to = reinterpret_cast<float*>(x) + lane;
            if (narrow) {
                const uint16_t* values = static_cast<const uint16_t*>(from) + at;
                for (int i = 0; i < n; ++i) {
                    uint32_t wide = (uint32_t)values[i] << 16;
                    std::memcpy(to + (int64_t)LANES * i, &wide, 4);
                }
            } else {
                const float* values = static_cast<const float*>(from) + at;
                for (int i = 0; i < n; ++i) to[(int64_t)LANES * i] = values[i];
            }
        }
    }
    vector mean_square() const {
        vector sum{}, x[SMALL];
        for (int64_t column = 0; column < width; column += SMALL) {
            read(column, SMALL, x);
            for (int i = 0; i < SMALL; ++i) sum += x[i] * x[i];
        }
        return sum / (float)width;
    }
};

struct Kind {
    int values, bytes;
};
enum { Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q3_K = 11, Q4_K = 12, Q5_K = 13, Q6_K = 14 };  // ggml's numbers
inline Kind kind_of(int type) {
    switch (type) {
        case Q4_0: return {SMALL, 18};
        case Q4_1: return {SMALL, 20};
        case Q5_0: return {SMALL, 22};
        case Q5_1: return {SMALL, 24};
        case Q8_0: return {SMALL, 34};
        case Q3_K: return {SUPER, 110};
        case Q4_K: return {SUPER, 144};
        case Q5_K: return {SUPER, 176};
        default: return {SUPER, 210};
    }
}

void quantize_block(int type, const vector* x, const float* importance, vector mean_square, const Block& block) {
    switch (type) {
        case Q4_0: return symmetric<8>(x, importance, mean_square, block);
        case Q4_1: return with_minimum<15>(x, importance, mean_square, block);
        case Q5_0: return symmetric<16>(x, importance, mean_square, block);
        case Q5_1: return with_minimum<31>(x, importance, mean_square, block);
        case Q8_0: return q8_0(x, block);
        case Q3_K: return q3_k(x, importance, block);
        case Q4_K: return k_with_minimum<15>(x, importance, block);
        case Q5_K: return k_with_minimum<31>(x, importance, block);
        default: return q6_k(x, importance, block);
    }
}

}  // namespace

typedef void* any;
typedef int64_t integer;
#define EXPORT(name, parameters) extern "C" void freehold_##name parameters

// Quantize rows [count, width] of bfloat16 (narrow) or float values. `importance` is null or one float a column. `bad`
// becomes the first row with a value that is not finite, or -1; nothing useful is written then.
EXPORT(quantize, (int type, int narrow, any from, integer count, integer width, any importance, any to, any bad)) {
    int64_t* first_bad = static_cast<int64_t*>(bad);
    Kind kind = kind_of(type);
    int64_t row_bytes = width / kind.values * kind.bytes;
    const float* columns = static_cast<const float*>(importance);
    *first_bad = -1;
    vector x[SUPER];
    for (int64_t first = 0; first < count; first += LANES) {
        Rows rows{from, narrow != 0, width, first, count - first < LANES ? count - first : LANES};
        uint8_t unused[256];
        bool small_weighted = columns && kind.values == SMALL && type != Q8_0;
        vector mean_square = small_weighted ? rows.mean_square() : vector{};
        integers strange{};
        for (int64_t column = 0; column < width; column += kind.values) {
            rows.read(column, kind.values, x);
            for (int i = 0; i < kind.values; ++i) strange |= (bits(x[i]) & 0x7f800000) == 0x7f800000;
            Block block;
            for (int lane = 0; lane < LANES; ++lane)
                block.row[lane] = lane < rows.count ? static_cast<uint8_t*>(to) + (first + lane) * row_bytes +
                                                          column / kind.values * kind.bytes
                                                    : unused;
            quantize_block(type, x, columns ? columns + column : nullptr, mean_square, block);
        }
        for (int lane = 0; lane < rows.count; ++lane)
            if (strange[lane]) {
                *first_bad = first + lane;
                return;
            }
    }
}
