// CPU kernels of the training step: matrix products, experts, attention over windows, norms, cross-entropy, optimizers.
//
// Plain C interface and no PyTorch headers, so that any C++17 compiler builds this file in seconds; native.py builds,
// loads and registers it. Each function has a reference in ops.py which tests hold it to. Work is cut into tasks that
// each write their own part of the output: the result does not depend on the number of threads or on who runs what.
//
// Matrices are row-major. A product C[rows, cols] = A . B reads B packed in panels of 64 columns of 32-bit words
// [step][64]: a word is one float, or two bfloat16 that follow each other along the summed dimension, as the AVX-512
// instruction vdpbf16ps wants them. Widths are multiples of 16; numbers of rows are free.

#include <immintrin.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>
#include <vector>

namespace {

// --- numbers ---------------------------------------------------------------------------------------------------

// Everything elementwise goes over vectors of 16 floats, whatever the numbers in memory are.
constexpr int LANES = 16;
typedef float vector __attribute__((vector_size(64)));
typedef float vector_at_any_address __attribute__((vector_size(64), aligned(4)));
typedef int32_t integers __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

struct bf16 {
    uint16_t bits;
};

inline vector load(const float* from) { return *reinterpret_cast<const vector_at_any_address*>(from); }
inline vector load(const bf16* from) {
    halves narrow;
    std::memcpy(&narrow, from, 32);
    return (vector)(__builtin_convertvector(narrow, words) << 16);
}
inline void store(float* to, vector x) { *reinterpret_cast<vector_at_any_address*>(to) = x; }
inline void store(bf16* to, vector x) {  // to nearest, ties to even; not-a-number stays so
#ifdef __AVX512BF16__
    auto narrow = _mm512_cvtneps_pbh((__m512)x);
#else
    words wide = (words)x, rounded = (wide + 0x7fff + ((wide >> 16) & 1)) >> 16;
    halves narrow = __builtin_convertvector((wide & 0x7fffffff) > 0x7f800000 ? words{} + 0x7fc0 : rounded, halves);
#endif
    std::memcpy(to, &narrow, 32);
}

inline float number(float x) { return x; }
inline float number(bf16 x) {
    uint32_t wide = uint32_t(x.bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
}

inline vector every(float x) { return vector{} + x; }
inline float sum(vector x) { return _mm512_reduce_add_ps((__m512)x); }
inline float maximum(vector x) { return _mm512_reduce_max_ps((__m512)x); }
inline vector larger(vector x, vector y) { return x > y ? x : y; }

// exp to 2 ulp for x <= 88; below -87 it is 0.
inline vector exponential(vector x) {
    constexpr float ROUND = 12582912.f;  // 1.5 * 2^23: adding it leaves no fraction
    vector limited = x < -87.f ? every(-87.f) : (x > 88.f ? every(88.f) : x);
    vector n = (limited * 1.44269504f + ROUND) - ROUND;
    vector r = limited - n * 0.693359375f + n * 2.12194440e-4f;
    vector p = r * 1.9875691500e-4f + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * r * r + r + 1.f;
    vector power = (vector)((__builtin_convertvector(n, integers) + 127) << 23);
    vector result = x < -87.f ? vector{} : p * power;
    return x == x ? result : x;
}

inline vector sigmoid(vector x) { return 1.f / (1.f + exponential(-x)); }

// --- threads ---------------------------------------------------------------------------------------------------

// libgomp's entry points, handed over by cpu.py: PyTorch's own pool of threads does the work.
using Parallel = void (*)(void (*)(void*), void*, unsigned, unsigned);
Parallel parallel = nullptr;
int (*team_size)() = nullptr;

// Threads that stay together through many kernels: each runs the same sequence, and a kernel's tasks go to whoever comes
// first. Waking a team for each of a hundred kernels costs more than the kernels do for one token.
struct Crew {
    std::atomic<int64_t> tickets{0};
    std::atomic<int> arrived{0};
    std::atomic<int> meetings{0};

    void meet(int size) {
        int now = meetings.load(std::memory_order_acquire);
        if (arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == size) {
            arrived.store(0, std::memory_order_relaxed);
            meetings.store(now + 1, std::memory_order_release);
            return;
        }
        for (int spins = 0; meetings.load(std::memory_order_acquire) == now;)
            ++spins < 200 ? _mm_pause() : (void)sched_yield();  // the other may wait for this very core
    }
};

// One thread's part in a crew. Tickets are numbered through all kernels, so that a thread may hold one of the next kernel
// while others finish this one: kernels that do not depend on each other need no meeting in between.
struct Member {
    Crew* crew;
    int size;
    int64_t first = 0, ticket = -1;
    int together = 0;
    int64_t tiles = -1;  // how the tile registers of this thread are set

    template <class F> void share(int64_t tasks, F& work) {
        for (;; ticket = -1) {
            if (ticket < 0) ticket = crew->tickets.fetch_add(1);
            if (ticket >= first + tasks) break;
            work(ticket - first);
        }
        first += tasks;
        if (!together) crew->meet(size);
    }
};
thread_local Member* member = nullptr;
void release_tiles();

// Kernels called while one of these lives do not depend on each other: the crew meets only at its end.
struct Together {
    Together() { if (member) member->together++; }
    ~Together() { if (member && !--member->together) member->crew->meet(member->size); }
};

template <class F> struct Team {
    F& work;
    std::atomic<int64_t> next{0};
    int64_t tasks;
    static __attribute__((noinline)) void run(void* self) {
        auto& team = *static_cast<Team*>(self);
        if (member) return member->share(team.tasks, team.work);
        for (int64_t task; (task = team.next.fetch_add(1)) < team.tasks;) team.work(task);
    }
};

// Call work(task) for every task, each on some thread.
template <class F> void for_tasks(int threads, int64_t tasks, F work) {
    Team<F> team{work, {0}, tasks};
    if (threads > 1 && tasks > 1 && parallel && !member) {
        parallel(&Team<F>::run, &team, unsigned(threads), 0);
    } else {
        Team<F>::run(&team);
    }
}

template <class F> struct Sequence {
    F& work;
    Crew crew;
    static void run(void* self) {
        auto& sequence = *static_cast<Sequence*>(self);
        Member own{&sequence.crew, team_size()};
        member = &own;
        sequence.work();
        release_tiles();
        member = nullptr;
    }
};

// Run a sequence of kernels on threads that stay together.
template <class F> void in_crew(int threads, F work) {
    if (threads <= 1 || !parallel || !team_size) return work();
    Sequence<F> sequence{work, {}};
    parallel(&Sequence<F>::run, &sequence, unsigned(threads), 0);
}

// Waking threads costs more than this many multiplications; bits do not depend on it.
inline int threads_for(int threads, int64_t multiplications) { return multiplications < (1 << 18) ? 1 : threads; }

// Call work(first, last) for stretches of `rows` rows.
template <class F> void for_rows(int threads, int64_t rows, int64_t stretch, F work) {
    for_tasks(threads, (rows + stretch - 1) / stretch,
              [&](int64_t task) { work(task * stretch, std::min(rows, (task + 1) * stretch)); });
}

// Memory of one thread that is kept from call to call.
template <class T> T* scratch(int slot, int64_t size) {
    thread_local std::vector<char> buffers[12];
    auto& buffer = buffers[slot];
    if (int64_t(buffer.size()) < int64_t(size * sizeof(T)) + 64) buffer.resize(size * sizeof(T) + 64);
    return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(buffer.data()) + 63) & ~uintptr_t(63));
}

// --- matrix products -------------------------------------------------------------------------------------------

constexpr int PANEL = 64, TILE_ROWS = 6, BLOCK_ROWS = 96;

using word = uint32_t;

template <class T> constexpr int per_word = 4 / sizeof(T);

inline int64_t round_up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }
template <class T> inline int64_t steps_of(int64_t n) { return (n + per_word<T> - 1) / per_word<T>; }
// Words that a packed matrix of `n` summed rows and `cols` columns takes.
template <class T> inline int64_t packed_size(int64_t n, int64_t cols) { return steps_of<T>(n) * round_up(cols, PANEL); }

template <class T> inline void multiply_add(vector& sum, word a, words b);
template <> inline void multiply_add<float>(vector& sum, word a, words b) {
    float value;
    std::memcpy(&value, &a, 4);
    sum += value * (vector)b;
}
#ifdef __AVX512BF16__
template <> inline void multiply_add<bf16>(vector& sum, word a, words b) {
    sum = (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(int(a)), (__m512bh)b);
}
#else  // never chosen by native.py, but it must compile
template <> inline void multiply_add<bf16>(vector& sum, word a, words b) {
    words left = words{} + a;
    sum += (vector)(left << 16) * (vector)(b << 16) + (vector)(left & 0xffff0000u) * (vector)(b & 0xffff0000u);
}
#endif

// What a product does with what is in C: replace it, add its own sums to it, or let its sums start there. The last is
// bit for bit one product over both, which `ADD` is not.
enum Start { SET, ADD, RESUME };

inline void store(float* to, vector x, Start start) { store(to, start == ADD ? load(to) + x : x); }
inline void store(bf16* to, vector x, Start) { store(to, x); }

// The left side of a product: word (row, step) is at data + row * row_bytes + step * step_bytes.
struct Left {
    const char* data;
    int64_t row_bytes, step_bytes;
    Left from_row(int64_t row) const { return {data + row * row_bytes, row_bytes, step_bytes}; }
};
template <class T> Left rows_of(const T* data, int64_t width) { return {(const char*)data, int64_t(width * sizeof(T)), 4}; }
// Rows of the transpose of a matrix packed by `pack_left`: its column j is row j here.
inline Left columns_of(const word* packed, int64_t cols) { return {(const char*)packed, 4, cols * 4}; }

// R rows times V vectors of one panel, all sums held in registers.
template <class T, class Out, int R, int V>
void tile(Left a, const word* b, int64_t steps, Out* c, int64_t ldc, Start start) {
    vector sum[R][V] = {};
    if (start == RESUME)
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] = load(c + r * ldc + v * LANES);
    for (int64_t step = 0; step < steps; step++) {
        words right[V];
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) right[v] = *reinterpret_cast<const words*>(b + step * PANEL + v * LANES);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
            word left;
            std::memcpy(&left, a.data + r * a.row_bytes + step * a.step_bytes, 4);
#pragma GCC unroll 4
            for (int v = 0; v < V; v++) multiply_add<T>(sum[r][v], left, right[v]);
        }
    }
#pragma GCC unroll 6
    for (int r = 0; r < R; r++)
#pragma GCC unroll 4
        for (int v = 0; v < V; v++) store(c + r * ldc + v * LANES, sum[r][v], start);
}

template <class T, class Out, int V>
void vectors_down(Left a, int64_t rows, const word* b, int64_t steps, Out* c, int64_t ldc, Start start) {
    int64_t row = 0;
    for (; row + TILE_ROWS <= rows; row += TILE_ROWS)
        tile<T, Out, TILE_ROWS, V>(a.from_row(row), b, steps, c + row * ldc, ldc, start);
    a = a.from_row(row), c += row * ldc;
    switch (rows - row) {
        case 1: return tile<T, Out, 1, V>(a, b, steps, c, ldc, start);
        case 2: return tile<T, Out, 2, V>(a, b, steps, c, ldc, start);
        case 3: return tile<T, Out, 3, V>(a, b, steps, c, ldc, start);
        case 4: return tile<T, Out, 4, V>(a, b, steps, c, ldc, start);
        case 5: return tile<T, Out, 5, V>(a, b, steps, c, ldc, start);
    }
}

#ifdef __AMX_BF16__
// Registers of 16 rows of 64 bytes: 16 x 16 sums take 32 products each in one instruction, sixteen times as many as a
// vector does. A row's sums do not depend on the other rows here either, so every bfloat16 product goes this way, from one
// row up. Packed panels already have the shape of a right tile.
constexpr int TILE = 16;
bool tiles = false;

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums of `rows` rows, 4 and 5 the left and right side, 6 and 7 the same of the last `tail` steps.
void set_tiles(int rows, int tail) {
    int64_t key = rows * 64 + tail;
    if (member && member->tiles == key) return;
    TileShapes shapes;
    for (int t = 0; t < 8; t++) shapes.row_bytes[t] = 64, shapes.rows[t] = rows;
    shapes.rows[5] = TILE;
    shapes.row_bytes[6] = 4 * (tail ? tail : TILE), shapes.rows[7] = tail ? tail : TILE;
    asm volatile("" ::: "memory");  // the compiler does not know that the instruction reads every byte
    _tile_loadconfig(&shapes);
    if (member) member->tiles = key;
}
void release_tiles() {
    if (tiles) _tile_release();
}

// sums[rows, 16 V] (= or +=) A . panel, for as many rows as the tiles are set to.
template <int V> void tile_sums(Left a, const word* b, int64_t steps, float* sums, int64_t ld, bool resume) {
#define EACH(does) { does(0) } if (V > 1) { does(1) } if (V > 2) { does(2) } if (V > 3) { does(3) }
#define RESUME_TILE(v) _tile_loadd(v, sums + v * TILE, ld * 4);
#define CLEAR_TILE(v) _tile_zero(v);
#define MULTIPLY_TILE(v) _tile_loadd(5, at + v * TILE, PANEL * 4); _tile_dpbf16ps(v, 4, 5);
#define MULTIPLY_TAIL(v) _tile_loadd(7, at + v * TILE, PANEL * 4); _tile_dpbf16ps(v, 6, 7);
#define STORE_TILE(v) _tile_stored(v, sums + v * TILE, ld * 4);
    asm volatile("" ::: "memory");
    if (resume) { EACH(RESUME_TILE) } else { EACH(CLEAR_TILE) }
    int64_t step = 0;
    for (; step + TILE <= steps; step += TILE) {
        const word* at = b + step * PANEL;
        _tile_loadd(4, a.data + step * 4, a.row_bytes);
        EACH(MULTIPLY_TILE)
    }
    if (step < steps) {
        const word* at = b + step * PANEL;
        _tile_loadd(6, a.data + step * 4, a.row_bytes);
        EACH(MULTIPLY_TAIL)
    }
    EACH(STORE_TILE)
    asm volatile("" ::: "memory");
}

template <class Out, int V>
void tiles_down(Left a, int64_t rows, const word* b, int64_t steps, Out* c, int64_t ldc, Start start) {
    alignas(64) float sums[TILE * PANEL];
    for (int64_t row = 0; row < rows; row += TILE) {
        int some = int(std::min<int64_t>(TILE, rows - row));
        set_tiles(some, int(steps % TILE));
        Out* to = c + row * ldc;
        if constexpr (sizeof(Out) == 4)
            if (start != ADD) {
                tile_sums<V>(a.from_row(row), b, steps, to, ldc, start == RESUME);
                continue;
            }
        tile_sums<V>(a.from_row(row), b, steps, sums, PANEL, false);
        for (int r = 0; r < some; r++)
            for (int v = 0; v < V; v++) store(to + r * ldc + v * LANES, load(sums + r * PANEL + v * LANES), start);
    }
}
#else
constexpr bool tiles = false;
void release_tiles() {}
#endif

template <class T, class Out, int V>
void down(Left a, int64_t rows, const word* b, int64_t steps, Out* c, int64_t ldc, Start start) {
#ifdef __AMX_BF16__
    // By type and layout alone, never by the number of rows: the sums are rounded in another order.
    if constexpr (sizeof(T) == 2)
        if (tiles && a.step_bytes == 4) return tiles_down<Out, V>(a, rows, b, steps, c, ldc, start);
#endif
    vectors_down<T, Out, V>(a, rows, b, steps, c, ldc, start);
}

// C[rows, cols] = (or +=) A . packed B; cols is a multiple of 16. A panel holds `panel_steps` steps (0: just `steps`).
template <class T, class Out>
void multiply(Left a, int64_t rows, const word* b, int64_t steps, int64_t cols, Out* c, int64_t ldc, Start start = SET,
              int64_t panel_steps = 0) {
    if (!panel_steps) panel_steps = steps;
    for (int64_t first = 0; first < rows; first += BLOCK_ROWS) {
        int64_t some = std::min<int64_t>(BLOCK_ROWS, rows - first);
        for (int64_t col = 0; col < cols; col += PANEL) {
            const word* panel = b + col * panel_steps;
            Left left = a.from_row(first);
            Out* out = c + first * ldc + col;
            switch (std::min<int64_t>(PANEL, cols - col) / LANES) {
                case 1: down<T, Out, 1>(left, some, panel, steps, out, ldc, start); break;
                case 2: down<T, Out, 2>(left, some, panel, steps, out, ldc, start); break;
                case 3: down<T, Out, 3>(left, some, panel, steps, out, ldc, start); break;
                default: down<T, Out, 4>(left, some, panel, steps, out, ldc, start);
            }
        }
    }
}

template <int S, size_t... I> inline void swap_blocks(words& a, words& b, std::index_sequence<I...>) {
    words even = __builtin_shufflevector(a, b, int((I & S) ? I - S + LANES : I)...);
    words odd = __builtin_shufflevector(a, b, int((I & S) ? I + LANES : I + S)...);
    a = even, b = odd;
}
template <int S> inline void transpose_stage(words* rows) {
#pragma GCC unroll 16
    for (int i = 0; i < LANES; i++)
        if (!(i & S)) swap_blocks<S>(rows[i], rows[i + S], std::make_index_sequence<LANES>());
}

// Pack the transpose of source [cols, n] (the weight of a linear map, or keys): column j of a panel is source row j.
template <class T> void pack_transposed(const T* source, int64_t ld, int64_t n, int64_t cols, word* packed) {
    int64_t steps = steps_of<T>(n), row_words = ld / per_word<T>;
    auto* from = reinterpret_cast<const word*>(source);
    for (int64_t col = 0; col < round_up(cols, PANEL); col += LANES) {
        word* to = packed + col / PANEL * PANEL * steps + col % PANEL;
        for (int64_t step = 0; step < steps; step += LANES) {
            int64_t deep = std::min<int64_t>(LANES, steps - step);
            words rows[LANES];
            for (int i = 0; i < LANES; i++) {
                const word* row = from + (col + i) * row_words + step;
                rows[i] = words{};
                if (col + i < cols && deep == LANES) std::memcpy(&rows[i], row, 4 * LANES);
                else if (col + i < cols) std::memcpy(&rows[i], row, 4 * deep);
            }
            transpose_stage<1>(rows), transpose_stage<2>(rows), transpose_stage<4>(rows), transpose_stage<8>(rows);
            for (int64_t i = 0; i < deep; i++) *reinterpret_cast<words*>(to + (step + i) * PANEL) = rows[i];
        }
    }
}

// One row of words out of `per_word` source rows that follow each other; a missing second row counts as zero.
inline void interleave(const float* first, const float*, int64_t cols, word* to) { std::memcpy(to, first, cols * 4); }
inline void interleave(const bf16* first, const bf16* second, int64_t cols, word* to) {
    for (int64_t j = 0; j < cols; j++) to[j] = uint32_t(first[j].bits) | (second ? uint32_t(second[j].bits) << 16 : 0u);
}

// Pack source [n, cols] as it is: column j of a panel is source column j.
template <class T> void pack_straight(const T* source, int64_t ld, int64_t n, int64_t cols, word* packed) {
    int64_t steps = steps_of<T>(n);
    for (int64_t step = 0; step < steps; step++) {
        const T* first = source + step * per_word<T> * ld;
        const T* second = step * per_word<T> + 1 < n ? first + ld : nullptr;
        for (int64_t col = 0; col < cols; col += PANEL)
            interleave(first + col, second ? second + col : nullptr, std::min<int64_t>(PANEL, cols - col),
                       packed + col * steps + step * PANEL);
    }
}

// Pack source [n, cols] as the left side of a product that sums over n: [steps, cols].
template <class T> void pack_left(const T* source, int64_t ld, int64_t n, int64_t cols, word* packed) {
    for (int64_t step = 0; step < steps_of<T>(n); step++) {
        const T* first = source + step * per_word<T> * ld;
        interleave(first, step * per_word<T> + 1 < n ? first + ld : nullptr, cols, packed + step * cols);
    }
}

// dW[outs, ins] = dY^T . X over `rows` rows, for the columns [first, last) of X; float sums, blocks of rows.
constexpr int64_t SUM_ROWS = 512;
template <class T>
void weight_gradient(const T* dy, int64_t ld_dy, int64_t outs, const T* x, int64_t ld_x, int64_t first, int64_t last,
                     int64_t rows, T* dw, int64_t ld_dw) {
    int64_t cols = last - first, block = std::min(rows, SUM_ROWS);
    word* left = scratch<word>(0, steps_of<T>(block) * outs);
    word* right = scratch<word>(1, packed_size<T>(block, cols));
    bool direct = rows <= SUM_ROWS;
    float* sums = direct ? nullptr : scratch<float>(2, outs * cols);
    for (int64_t row = 0; row < rows; row += SUM_ROWS) {
        int64_t some = std::min(SUM_ROWS, rows - row);
        pack_left(dy + row * ld_dy, ld_dy, some, outs, left);
        pack_straight(x + row * ld_x + first, ld_x, some, cols, right);
        Left a = columns_of(left, outs);
        if (direct)
            multiply<T, T>(a, outs, right, steps_of<T>(some), cols, dw + first, ld_dw);
        else
            multiply<T, float>(a, outs, right, steps_of<T>(some), cols, sums, cols, row > 0 ? ADD : SET);
    }
    if (direct) return;
    for (int64_t i = 0; i < outs; i++)
        for (int64_t j = 0; j < cols; j += LANES)
            store(dw + i * ld_dw + first + j, load(sums + i * cols + j));
}

// --- linear maps -----------------------------------------------------------------------------------------------

constexpr int64_t TASK_ROWS = 480;

inline int64_t stretch_of(int64_t rows, int threads) { return std::min(TASK_ROWS, round_up((rows + threads - 1) / threads, TILE_ROWS)); }

// y[rows, outs] = x[rows, ins] . w[outs, ins]^T
template <class T>
void linear(int threads, const T* x, const T* w, T* y, int64_t rows, int64_t ins, int64_t outs) {
    threads = threads_for(threads, (rows + 4) * ins * outs);
    word* packed = scratch<word>(11, packed_size<T>(ins, outs));
    int64_t steps = steps_of<T>(ins);
    for_rows(threads, outs, PANEL, [&](int64_t first, int64_t last) {
        pack_transposed(w + first * ins, ins, ins, last - first, packed + first * steps);
    });
    for_rows(threads, rows, stretch_of(rows, threads), [&](int64_t first, int64_t last) {
        multiply<T, T>(rows_of(x + first * ins, ins), last - first, packed, steps, outs, y + first * outs, outs);
    });
}

// The same with a weight packed once, for any number of rows: a row's sums do not depend on how the work is cut.
template <class T> void pack(int threads, const T* w, word* packed, int64_t matrices, int64_t ins, int64_t outs) {
    int64_t panels = round_up(outs, PANEL) / PANEL, steps = steps_of<T>(ins);
    for_tasks(threads, matrices * panels, [&](int64_t task) {
        int64_t matrix = task / panels, col = task % panels * PANEL;
        pack_transposed(w + (matrix * outs + col) * ins, ins, ins, std::min<int64_t>(PANEL, outs - col),
                        packed + matrix * packed_size<T>(ins, outs) + col * steps);
    });
}

// A task is one panel for some rows: each thread reads its own part of the weight.
template <class T>
void linear_packed(int threads, const T* x, const word* packed, T* y, int64_t rows, int64_t ins, int64_t outs) {
    threads = threads_for(threads, rows * ins * outs);
    int64_t steps = steps_of<T>(ins), panels = (outs + PANEL - 1) / PANEL, down = (rows + TASK_ROWS - 1) / TASK_ROWS;
    for_tasks(threads, panels * down, [&](int64_t task) {
        int64_t col = task % panels * PANEL, row = task / panels * TASK_ROWS;
        multiply<T, T>(rows_of(x + row * ins, ins), std::min(TASK_ROWS, rows - row), packed + col * steps, steps,
                       std::min<int64_t>(PANEL, outs - col), y + row * outs + col, outs);
    });
}

// dx[rows, ins] = dy[rows, outs] . w[outs, ins]
template <class T>
void linear_input_gradient(int threads, const T* dy, const T* w, T* dx, int64_t rows, int64_t ins, int64_t outs) {
    threads = threads_for(threads, (rows + 4) * ins * outs);
    word* packed = scratch<word>(11, packed_size<T>(outs, ins));
    int64_t steps = steps_of<T>(outs);
    for_rows(threads, ins, PANEL, [&](int64_t first, int64_t last) {
        pack_straight(w + first, ins, outs, last - first, packed + first * steps);
    });
    for_rows(threads, rows, stretch_of(rows, threads), [&](int64_t first, int64_t last) {
        multiply<T, T>(rows_of(dy + first * outs, outs), last - first, packed, steps, ins, dx + first * ins, ins);
    });
}

// dw[outs, ins] = dy[rows, outs]^T . x[rows, ins]
template <class T>
void linear_weight_gradient(int threads, const T* dy, const T* x, T* dw, int64_t rows, int64_t ins, int64_t outs) {
    threads = threads_for(threads, (rows + 4) * ins * outs);
    // Long sides are cut in two ways so that the float sums of a task stay in its cache.
    int64_t wide = std::max<int64_t>(PANEL, round_up((ins + threads - 1) / threads, PANEL)), high = 256;
    wide = std::min<int64_t>(wide, 512);
    int64_t across = (ins + wide - 1) / wide, down = (outs + high - 1) / high;
    for_tasks(threads, across * down, [&](int64_t task) {
        int64_t col = task % across * wide, row = task / across * high;
        weight_gradient(dy + row, outs, std::min(high, outs - row), x, ins, col, std::min(ins, col + wide), rows,
                        dw + row * ins, ins);
    });
}

// --- experts ---------------------------------------------------------------------------------------------------

struct Part {
    int64_t expert, first, last;
};

// The rows of each expert in parts of at most TASK_ROWS.
std::vector<Part> parts_of(const int64_t* counts, int64_t experts) {
    std::vector<Part> parts;
    for (int64_t e = 0, start = 0; e < experts; start += counts[e++])
        for (int64_t row = 0; row < counts[e]; row += TASK_ROWS)
            parts.push_back({e, start + row, start + std::min(counts[e], row + TASK_ROWS)});
    return parts;
}

// Never inlined, as all that training and answering share: inlined twice, a compiler may round twice in different ways.
#define ONE_COPY __attribute__((noinline))

// product = silu(gate) * up for columns [first, last) of `both` = gate | up, [rows, 2 inner].
template <class T>
ONE_COPY void silu_product(const T* both, T* product, int64_t rows, int64_t inner, int64_t first, int64_t last) {
    for (int64_t row = 0; row < rows; row++) {
        const T *gate = both + row * 2 * inner, *up = gate + inner;
        for (int64_t j = first; j < last; j += LANES) {
            vector g = load(gate + j);
            store(product + row * inner + j, g * sigmoid(g) * load(up + j));
        }
    }
}

// y = down(silu(gate(x)) * up(x)) for rows sorted by expert; `both` keeps gate(x) and up(x), [rows, 2 inner].
// Matrices of expert e are at gate + e * stride, up + e * stride and down + e * width * inner.
template <class T>
void swiglu(int threads, const T* x, const int64_t* counts, int64_t experts, const T* gate, const T* up, int64_t stride,
            const T* down, T* both, T* y, int64_t width, int64_t inner) {
    auto parts = parts_of(counts, experts);
    int64_t steps = steps_of<T>(width), size = packed_size<T>(width, inner);
    int64_t rows_here = parts.empty() ? 0 : parts.back().last + 4 * int64_t(parts.size());
    threads = threads_for(threads, rows_here * width * inner * 3);
    for_tasks(threads, parts.size(), [&](int64_t task) {
        auto [e, first, last] = parts[task];
        int64_t rows = last - first;
        word* packed = scratch<word>(0, std::max(2 * size, packed_size<T>(inner, width)));
        pack_transposed(gate + e * stride, width, width, inner, packed);
        pack_transposed(up + e * stride, width, width, inner, packed + size);
        Left in = rows_of(x + first * width, width);
        T* kept = both + first * 2 * inner;
        multiply<T, T>(in, rows, packed, steps, inner, kept, 2 * inner);
        multiply<T, T>(in, rows, packed + size, steps, inner, kept + inner, 2 * inner);
        T* product = scratch<T>(1, rows * inner);
        silu_product(kept, product, rows, inner, 0, inner);
        pack_transposed(down + e * width * inner, inner, inner, width, packed);
        multiply<T, T>(rows_of(product, inner), rows, packed, steps_of<T>(inner), width, y + first * width, width);
    });
}

// `swiglu` with weights packed once, in two parts. The first: gate and up of each expert, then silu(gate) * up.
template <class T>
void swiglu_in(int threads, const T* x, const std::vector<Part>& parts, const word* gate_up, T* both, T* product,
               int64_t width, int64_t inner) {
    int64_t steps = steps_of<T>(width), size = packed_size<T>(width, inner), pieces = (inner + PANEL - 1) / PANEL;
    for_tasks(threads, int64_t(parts.size()) * pieces, [&](int64_t task) {
        auto [e, first, last] = parts[task / pieces];
        int64_t col = task % pieces * PANEL, cols = std::min<int64_t>(PANEL, inner - col);
        const word* packed = gate_up + 2 * e * size + col * steps;
        T* kept = both + first * 2 * inner;
        Left rows = rows_of(x + first * width, width);
        multiply<T, T>(rows, last - first, packed, steps, cols, kept + col, 2 * inner);
        multiply<T, T>(rows, last - first, packed + size, steps, cols, kept + inner + col, 2 * inner);
        silu_product(kept, product + first * inner, last - first, inner, col, col + cols);
    });
}

// The second: down.
template <class T>
void swiglu_out(int threads, const T* product, const std::vector<Part>& parts, const word* down, T* y, int64_t width,
                int64_t inner) {
    int64_t steps = steps_of<T>(inner), size = packed_size<T>(inner, width), pieces = (width + PANEL - 1) / PANEL;
    for_tasks(threads, int64_t(parts.size()) * pieces, [&](int64_t task) {
        auto [e, first, last] = parts[task / pieces];
        int64_t col = task % pieces * PANEL;
        multiply<T, T>(rows_of(product + first * inner, inner), last - first, down + e * size + col * steps, steps,
                       std::min<int64_t>(PANEL, width - col), y + first * width + col, width);
    });
}

// Both. `both` [rows, 2 inner] and `product` [rows, inner] are room to work in.
template <class T>
void swiglu_packed(int threads, const T* x, const int64_t* counts, int64_t experts, const word* gate_up, const word* down,
                   T* both, T* product, T* y, int64_t width, int64_t inner) {
    auto parts = parts_of(counts, experts);
    int64_t rows = parts.empty() ? 0 : parts.back().last;
    threads = threads_for(threads, rows * width * inner * 3);
    swiglu_in(threads, x, parts, gate_up, both, product, width, inner);
    swiglu_out(threads, product, parts, down, y, width, inner);
}

// All gradients of `swiglu`. `product` [rows, inner] and `dboth` [rows, 2 inner] are room to work in.
// dx, or the three weight gradients together, may be null. An idle expert's weight gradient is zero.
template <class T>
void swiglu_backward(int threads, const T* dy, const T* x, const T* both, const int64_t* counts, int64_t experts,
                     const T* gate, const T* up, int64_t stride, const T* down, T* product, T* dboth, T* dx, T* dgate,
                     T* dup, T* ddown, int64_t width, int64_t inner) {
    auto parts = parts_of(counts, experts);
    int64_t size = packed_size<T>(inner, width);
    int64_t rows_here = parts.empty() ? 0 : parts.back().last + 4 * int64_t(parts.size());
    threads = threads_for(threads, rows_here * width * inner * 6);
    for_tasks(threads, parts.size(), [&](int64_t task) {
        auto [e, first, last] = parts[task];
        int64_t rows = last - first;
        word* packed = scratch<word>(0, std::max(2 * size, packed_size<T>(width, inner)));
        float* dproduct = scratch<float>(1, rows * inner);
        pack_straight(down + e * width * inner, inner, width, inner, packed);
        multiply<T, float>(rows_of(dy + first * width, width), rows, packed, steps_of<T>(width), inner, dproduct, inner);
        for (int64_t row = 0; row < rows; row++) {
            const T *g = both + (first + row) * 2 * inner, *u = g + inner;
            T *dg = dboth + (first + row) * 2 * inner, *du = dg + inner, *p = product + (first + row) * inner;
            const float* d = dproduct + row * inner;
            for (int64_t j = 0; j < inner; j += LANES) {
                vector a = load(g + j), b = load(u + j), s = sigmoid(a), up_stream = load(d + j);
                store(p + j, a * s * b);
                store(du + j, up_stream * a * s);
                store(dg + j, up_stream * b * s * (1.f + a * (1.f - s)));
            }
        }
        if (!dx) return;
        pack_straight(gate + e * stride, width, inner, width, packed);
        pack_straight(up + e * stride, width, inner, width, packed + size);
        // Panel by panel the steps of gate and up are apart, so their products are summed in two passes.
        float* sums = scratch<float>(2, rows * width);
        const T* d = dboth + first * 2 * inner;
        int64_t steps = steps_of<T>(inner);
        multiply<T, float>(rows_of(d, 2 * inner), rows, packed, steps, width, sums, width);
        multiply<T, float>(rows_of(d + inner, 2 * inner), rows, packed + size, steps, width, sums, width, ADD);
        for (int64_t j = 0; j < rows * width; j += LANES)
            store(dx + first * width + j, load(sums + j));
    });
    if (!dgate) return;
    std::vector<int64_t> starts(experts + 1, 0);
    for (int64_t e = 0; e < experts; e++) starts[e + 1] = starts[e] + counts[e];
    // With few experts their matrices are cut, so that every thread has work.
    int64_t cuts = experts >= 4 * threads ? 1 : std::min<int64_t>(std::min(width, inner) / LANES, 2 * threads);
    auto cut = [&](int64_t n, int64_t piece) { return n / LANES * piece / cuts * LANES; };
    for_tasks(threads, experts * cuts, [&](int64_t task) {
        int64_t e = task / cuts, piece = task % cuts, first = starts[e], rows = counts[e];
        T *to_gate = dgate + e * stride, *to_up = dup + e * stride, *to_down = ddown + e * width * inner;
        int64_t x0 = cut(width, piece), x1 = cut(width, piece + 1), p0 = cut(inner, piece), p1 = cut(inner, piece + 1);
        if (rows == 0) {
            for (int64_t i = 0; i < inner; i++) {
                std::memset(to_gate + i * width + x0, 0, (x1 - x0) * sizeof(T));
                std::memset(to_up + i * width + x0, 0, (x1 - x0) * sizeof(T));
            }
            for (int64_t i = 0; i < width; i++) std::memset(to_down + i * inner + p0, 0, (p1 - p0) * sizeof(T));
            return;
        }
        const T *from = x + first * width, *d = dboth + first * 2 * inner;
        weight_gradient(d, 2 * inner, inner, from, width, x0, x1, rows, to_gate, width);
        weight_gradient(d + inner, 2 * inner, inner, from, width, x0, x1, rows, to_up, width);
        weight_gradient(dy + first * width, width, width, product + first * inner, inner, p0, p1, rows, to_down, inner);
    });
}

// --- grouped maps: adapters, and weights in blocks of four bits -------------------------------------------------

// How the weights of a map are stored: rows of numbers, words packed once, or blocks that are unpacked where they are
// multiplied, one stretch at a time, so that no copy of a whole stack ever exists.
enum Form : int64_t { PLAIN = 0, WORDS = 1, Q4_0 = 2, Q8_0 = 3, Q4_K = 4, NF4 = 5 };

inline float half_at(const uint8_t* from) {
    uint16_t bits;
    std::memcpy(&bits, from, 2);
    return _mm512_cvtss_f32(_mm512_cvtph_ps(_mm256_castsi128_si256(_mm_cvtsi32_si128(bits))));
}

struct Blocks {
    int64_t values, bytes;
};
inline Blocks blocks_of(int64_t form) {
    switch (form) {
        case Q4_0: return {32, 18};
        case Q8_0: return {32, 34};
        case Q4_K: return {256, 144};
        default: return {64, 34};  // NF4
    }
}

// Quantiles of a normal distribution, as QLoRA defines them (Dettmers et al. 2023, appendix E).
alignas(64) constexpr float NF4_LEVELS[16] = {
    -1.f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f,
    -0.18477343022823334f, -0.09105003625154495f, 0.f, 0.07958029955625534f, 0.16093020141124725f,
    0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.f};

inline integers bytes_of(const uint8_t* from) {
    return (integers)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
inline vector floats_of(integers x) { return (vector)_mm512_cvtepi32_ps((__m512i)x); }

// Scale and minimum `j` of a Q4_K block: eight of six bits each in twelve bytes.
inline void scale_min(const uint8_t* q, int j, float& scale, float& low) {
    if (j < 4) scale = q[j] & 63, low = q[j + 4] & 63;
    else scale = (q[j + 4] & 15) | (q[j - 4] >> 6 << 4), low = (q[j + 4] >> 4) | (q[j] >> 6 << 4);
}

template <class T> void unpack_block(int64_t form, const uint8_t* block, T* to) {
    float d = half_at(block);
    if (form == Q4_0) {
        integers q = bytes_of(block + 2);
        store(to, floats_of((q & 15) - 8) * d), store(to + 16, floats_of((q >> 4) - 8) * d);
    } else if (form == Q8_0) {
        for (int j = 0; j < 32; j += LANES) {
            __m128i q = _mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 2 + j));
            store(to + j, floats_of((integers)_mm512_cvtepi8_epi32(q)) * d);
        }
    } else if (form == NF4) {
        __m512 levels = _mm512_load_ps(NF4_LEVELS);
        for (int j = 0; j < 32; j += LANES) {
            integers q = bytes_of(block + 2 + j);
            store(to + j, (vector)_mm512_permutexvar_ps((__m512i)(q & 15), levels) * d);
            store(to + 32 + j, (vector)_mm512_permutexvar_ps((__m512i)(q >> 4), levels) * d);
        }
    } else {
        float low = half_at(block + 2), scale, minimum;
        for (int pair = 0; pair < 4; pair++) {
            const uint8_t* q = block + 16 + 32 * pair;
            for (int high = 0; high < 2; high++) {
                scale_min(block + 4, 2 * pair + high, scale, minimum);
                float step = d * scale, base = low * minimum;
                for (int j = 0; j < 32; j += LANES) {
                    integers level = high ? bytes_of(q + j) >> 4 : bytes_of(q + j) & 15;
                    store(to + 64 * pair + 32 * high + j, floats_of(level) * step - base);
                }
            }
        }
    }
}

// The columns [first, last) of a row of `width` numbers in blocks; both are at the edge of a block.
template <class T> void unpack_row(int64_t form, const uint8_t* row, int64_t first, int64_t last, T* to) {
    Blocks block = blocks_of(form);
    for (int64_t at = first; at < last; at += block.values)
        unpack_block(form, row + at / block.values * block.bytes, to + at - first);
}

// A stack of maps [outs, ins], one for `share` groups that follow each other.
struct Stack {
    const char* data;
    int64_t form, share, outs, ins;
    template <class T> int64_t row_bytes() const {
        if (form == PLAIN) return ins * int64_t(sizeof(T));
        Blocks block = blocks_of(form);
        return ins / block.values * block.bytes;
    }
    template <class T> const char* row(int64_t group, int64_t row) const {
        return data + (group / share * outs + row) * row_bytes<T>();
    }
};

// The weights of a group for outputs [first, last), as the right side of x W^T.
template <class T>
const word* packed_outputs(const Stack& w, int64_t group, int64_t first, int64_t last, word* room, T* rows) {
    int64_t steps = steps_of<T>(w.ins);
    if (w.form == WORDS)
        return reinterpret_cast<const word*>(w.data) + group / w.share * packed_size<T>(w.ins, w.outs) + first * steps;
    if (w.form == PLAIN) {
        pack_transposed(reinterpret_cast<const T*>(w.row<T>(group, first)), w.ins, w.ins, last - first, room);
        return room;
    }
    for (int64_t row = first; row < last; row += PANEL) {
        int64_t some = std::min<int64_t>(PANEL, last - row);
        for (int64_t i = 0; i < some; i++)
            unpack_row(w.form, (const uint8_t*)w.row<T>(group, row + i), 0, w.ins, rows + i * w.ins);
        pack_transposed(rows, w.ins, w.ins, some, room + (row - first) * steps);
    }
    return room;
}

// The weights of a group for inputs [first, last), as the right side of dy W.
template <class T>
const word* packed_inputs(const Stack& w, int64_t group, int64_t first, int64_t last, word* room, T* rows) {
    if (w.form == PLAIN) {
        pack_straight(reinterpret_cast<const T*>(w.row<T>(group, 0)) + first, w.ins, w.outs, last - first, room);
        return room;
    }
    int64_t cols = last - first;
    for (int64_t i = 0; i < w.outs; i++)
        unpack_row(w.form, (const uint8_t*)w.row<T>(group, i), first, last, rows + i * cols);
    pack_straight(rows, cols, w.outs, cols, room);
    return room;
}

// Columns of one task: enough tasks for the threads, and at the edges of panels and of every kind of block.
constexpr int64_t GROUP_COLS = 512, GROUP_EDGE = 256;
inline int64_t columns_of_task(int64_t parts, int64_t cols, int threads) {
    int64_t wanted = std::max<int64_t>(1, 2 * threads / std::max<int64_t>(parts, 1));
    return std::min(GROUP_COLS, round_up((cols + wanted - 1) / wanted, GROUP_EDGE));
}

// y = x W^T + u B^T in one sum and one rounding, for rows sorted by group; b [groups, outs, rank] may be null.
template <class T>
void grouped(int threads, const T* x, const int64_t* counts, int64_t groups, int64_t share, const char* w, int64_t form,
             const T* u, const T* b, int64_t rank, T* y, int64_t ins, int64_t outs) {
    auto parts = parts_of(counts, groups);
    Stack stack{w, form, share, outs, ins};
    int64_t rows_here = parts.empty() ? 0 : parts.back().last + 4 * int64_t(parts.size());
    threads = threads_for(threads, rows_here * ins * outs);
    int64_t wide = columns_of_task(parts.size(), outs, threads), across = (outs + wide - 1) / wide;
    for_tasks(threads, parts.size() * across, [&](int64_t task) {
        auto [g, first, last] = parts[task / across];
        int64_t col = task % across * wide, end = std::min(outs, col + wide), cols = end - col, rows = last - first;
        word* room = scratch<word>(0, packed_size<T>(ins, cols));
        T* unpacked = form > WORDS ? scratch<T>(1, PANEL * ins) : nullptr;
        const word* packed = packed_outputs(stack, g, col, end, room, unpacked);
        Left left = rows_of(x + first * ins, ins);
        T* out = y + first * outs + col;
        if (!b) return multiply<T, T>(left, rows, packed, steps_of<T>(ins), cols, out, outs);
        float* sums = scratch<float>(2, rows * cols);
        multiply<T, float>(left, rows, packed, steps_of<T>(ins), cols, sums, cols);
        word* factor = scratch<word>(3, packed_size<T>(rank, cols));
        pack_transposed(b + (g * outs + col) * rank, rank, rank, cols, factor);
        // Resumed, not added: the factor is one more stretch of the same sum, and a factor of zeros changes no bit.
        multiply<T, float>(rows_of(u + first * rank, rank), rows, factor, steps_of<T>(rank), cols, sums, cols, RESUME);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j += LANES) store(out + i * outs + j, load(sums + i * cols + j));
    });
}

// dx = dy W + du A in one sum; a [groups, rank, ins] may be null.
template <class T>
void grouped_input_gradient(int threads, const T* dy, const int64_t* counts, int64_t groups, int64_t share, const char* w,
                            int64_t form, const T* du, const T* a, int64_t rank, T* dx, int64_t ins, int64_t outs) {
    auto parts = parts_of(counts, groups);
    Stack stack{w, form, share, outs, ins};
    int64_t rows_here = parts.empty() ? 0 : parts.back().last + 4 * int64_t(parts.size());
    threads = threads_for(threads, rows_here * ins * outs);
    int64_t wide = columns_of_task(parts.size(), ins, threads), across = (ins + wide - 1) / wide;
    for_tasks(threads, parts.size() * across, [&](int64_t task) {
        auto [g, first, last] = parts[task / across];
        int64_t col = task % across * wide, end = std::min(ins, col + wide), cols = end - col, rows = last - first;
        word* room = scratch<word>(0, packed_size<T>(outs, cols));
        T* unpacked = form > WORDS ? scratch<T>(1, outs * cols) : nullptr;
        const word* packed = packed_inputs(stack, g, col, end, room, unpacked);
        Left left = rows_of(dy + first * outs, outs);
        T* out = dx + first * ins + col;
        if (!a) return multiply<T, T>(left, rows, packed, steps_of<T>(outs), cols, out, ins);
        float* sums = scratch<float>(2, rows * cols);
        multiply<T, float>(left, rows, packed, steps_of<T>(outs), cols, sums, cols);
        word* factor = scratch<word>(3, packed_size<T>(rank, cols));
        pack_straight(a + g * rank * ins + col, ins, rank, cols, factor);
        multiply<T, float>(rows_of(du + first * rank, rank), rows, factor, steps_of<T>(rank), cols, sums, cols, RESUME);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j += LANES) store(out + i * ins + j, load(sums + i * cols + j));
    });
}

// dw[groups, outs, ins] = dy^T x over the rows of each group; zero for a group without rows.
template <class T>
void grouped_weight_gradient(int threads, const T* dy, const T* x, const int64_t* counts, int64_t groups, T* dw,
                             int64_t ins, int64_t outs) {
    std::vector<int64_t> starts(groups + 1, 0);
    for (int64_t g = 0; g < groups; g++) starts[g + 1] = starts[g] + counts[g];
    threads = threads_for(threads, (starts[groups] + 4 * groups) * ins * outs);
    int64_t wide = 512, high = 256, across = (ins + wide - 1) / wide, down = (outs + high - 1) / high;
    for_tasks(threads, groups * across * down, [&](int64_t task) {
        int64_t g = task / (across * down), piece = task % (across * down);
        int64_t col = piece % across * wide, end = std::min(ins, col + wide), row = piece / across * high;
        int64_t some = std::min(high, outs - row), rows = counts[g], first = starts[g];
        T* to = dw + (g * outs + row) * ins;
        if (rows) return weight_gradient(dy + first * outs + row, outs, some, x + first * ins, ins, col, end, rows, to, ins);
        for (int64_t i = 0; i < some; i++) std::memset(to + i * ins + col, 0, (end - col) * sizeof(T));
    });
}

// product = silu(gate) * up for both = gate | up, [rows, 2 inner]; the same function as inside `swiglu`.
template <class T> void silu(int threads, const T* both, T* product, int64_t rows, int64_t inner) {
    for_rows(threads_for(threads, rows * inner * 16), rows, 64, [&](int64_t first, int64_t last) {
        silu_product(both + first * 2 * inner, product + first * inner, last - first, inner, 0, inner);
    });
}

template <class T> void silu_gradient(int threads, const T* dproduct, const T* both, T* dboth, int64_t rows, int64_t inner) {
    for_rows(threads_for(threads, rows * inner * 16), rows, 64, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++) {
            const T *gate = both + row * 2 * inner, *up = gate + inner, *d = dproduct + row * inner;
            T* to = dboth + row * 2 * inner;
            for (int64_t j = 0; j < inner; j += LANES) {
                vector a = load(gate + j), s = sigmoid(a), down = load(d + j);
                store(to + inner + j, down * a * s);
                store(to + j, down * load(up + j) * s * (1.f + a * (1.f - s)));
            }
        }
    });
}

// Numbers out of blocks: `rows` rows of `width`.
template <class T> void unpack(int threads, const char* blocks, int64_t form, T* to, int64_t rows, int64_t width) {
    Stack stack{blocks, form, 1, rows, width};
    for_rows(threads, rows, 16, [&](int64_t first, int64_t last) {
        for (int64_t row = first; row < last; row++)
            unpack_row(form, (const uint8_t*)stack.row<T>(0, row), 0, width, to + row * width);
    });
}

// --- routing ---------------------------------------------------------------------------------------------------

// For each row of logits the k experts of the largest sigmoid(logit) + bias, best first, the lower index in a tie, and
// their weights: the sigmoids without bias, divided by their sum, times `scale`.
template <class T>  // always float
void choose(int threads, const T* logits, const float* bias, float scale, int64_t* chosen, float* weights, int64_t rows,
            int64_t experts, int64_t k) {
    for_rows(threads, rows, 64, [&](int64_t first, int64_t last) {
        int64_t size = round_up(experts, LANES);
        float *scores = scratch<float>(0, size), *ranks = scratch<float>(1, size);
        for (int64_t r = first; r < last; r++) {
            std::fill(scores, scores + size, 0.f);
            std::memcpy(scores, logits + r * experts, experts * 4);
            for (int64_t e = 0; e < experts; e += LANES) store(scores + e, sigmoid(load(scores + e)));
            for (int64_t e = 0; e < experts; e++) ranks[e] = scores[e] + bias[e];
            float total = 0.f;
            for (int64_t j = 0; j < k; j++) {
                int64_t best = -1;
                for (int64_t e = 0; e < experts; e++)  // not-a-number loses, but some expert is always chosen
                    if (ranks[e] != -INFINITY && (best < 0 || ranks[e] > ranks[best] || ranks[best] != ranks[best])) best = e;
                best = std::max<int64_t>(best, 0);
                ranks[best] = -INFINITY;
                chosen[r * k + j] = best;
                weights[r * k + j] = scores[best];
                total += scores[best];
            }
            float factor = scale / (total + 1e-20f);
            for (int64_t j = 0; j < k; j++) weights[r * k + j] *= factor;
        }
    });
}

// The gradient of the weights of `choose` by the logits.
template <class T>
void choose_backward(int threads, const T* dweights, const float* logits, const int64_t* chosen, float scale,
                     float* dlogits, int64_t rows, int64_t experts, int64_t k) {
    for_rows(threads, rows, 64, [&](int64_t first, int64_t last) {
        float* scores = scratch<float>(0, round_up(k, LANES));
        for (int64_t r = first; r < last; r++) {
            const int64_t* own = chosen + r * k;
            const float* given = dweights + r * k;
            float *to = dlogits + r * experts, total = 0.f, along = 0.f;
            std::fill(to, to + experts, 0.f);
            for (int64_t j = 0; j < k; j++) scores[j] = logits[r * experts + own[j]];
            for (int64_t j = 0; j < k; j += LANES) store(scores + j, sigmoid(load(scores + j)));
            for (int64_t j = 0; j < k; j++) total += scores[j], along += given[j] * scores[j];
            total += 1e-20f;
            for (int64_t j = 0; j < k; j++)
                to[own[j]] = scale / total * (given[j] - along / total) * scores[j] * (1.f - scores[j]);
        }
    });
}

// --- moving rows -----------------------------------------------------------------------------------------------

constexpr int64_t ROWS = 128;

// to[r] = from[index[r]]
template <class T>
void take_rows(int threads, const T* from, const int64_t* index, T* to, int64_t rows, int64_t width) {
    for_rows(threads, rows, ROWS, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++) std::memcpy(to + r * width, from + index[r] * width, width * sizeof(T));
    });
}

// to[n] = base[n] + sum over j of weights[n, j] * from[inverse[n, j]]; base and weights may be null (0 and 1).
template <class T>
void sum_rows(int threads, const T* from, const int64_t* inverse, const float* weights, const T* base, T* to,
              int64_t tokens, int64_t k, int64_t width) {
    for_rows(threads, tokens, ROWS, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++)
            for (int64_t i = 0; i < width; i += LANES) {
                vector total = base ? load(base + n * width + i) : vector{};
                for (int64_t j = 0; j < k; j++)
                    total += (weights ? weights[n * k + j] : 1.f) * load(from + inverse[n * k + j] * width + i);
                store(to + n * width + i, total);
            }
    });
}

// The gradients of `sum_rows`: dfrom[inverse[n, j]] = weights[n, j] dto[n], dweights[n, j] = dto[n] . from[inverse[n, j]].
template <class T>
void sum_rows_backward(int threads, const T* dto, const T* from, const int64_t* inverse, const float* weights, T* dfrom,
                       float* dweights, int64_t tokens, int64_t k, int64_t width) {
    for_rows(threads, tokens, ROWS, [&](int64_t first, int64_t last) {
        for (int64_t n = first; n < last; n++)
            for (int64_t j = 0; j < k; j++) {
                const T *row = from + inverse[n * k + j] * width, *d = dto + n * width;
                T* to = dfrom + inverse[n * k + j] * width;
                vector dot{};
                for (int64_t i = 0; i < width; i += LANES) {
                    vector value = load(d + i);
                    dot += value * load(row + i);
                    store(to + i, weights[n * k + j] * value);
                }
                dweights[n * k + j] = sum(dot);
            }
    });
}

// --- norms, rotation and gates ---------------------------------------------------------------------------------

// y = x / sqrt(mean(x^2) + eps) * gain for each row; with angles, its halves then rotated by row / heads % angle_rows.
template <class T>
void norm(int threads, const T* x, const float* gain, float eps, const float* cos, const float* sin, int64_t angle_rows,
          int64_t heads, T* y, int64_t rows, int64_t width) {
    for_rows(threads, rows, ROWS, [&](int64_t first, int64_t last) {
        int64_t half = width / 2;
        for (int64_t r = first; r < last; r++) {
            const T* from = x + r * width;
            T* to = y + r * width;
            vector square{};
            for (int64_t i = 0; i < width; i += LANES) square += load(from + i) * load(from + i);
            float scale = 1.f / std::sqrt(sum(square) / float(width) + eps);
            for (int64_t i = 0; i < width; i += LANES) store(to + i, load(from + i) * scale * load(gain + i));
            if (!cos) continue;
            // From memory, so rounded in between as the two operations one after the other are.
            const float *c = cos + r / heads % angle_rows * half, *s = sin + r / heads % angle_rows * half;
            for (int64_t i = 0; i < half; i += LANES) {
                vector a = load(to + i), b = load(to + half + i);
                store(to + i, a * load(c + i) - b * load(s + i));
                store(to + half + i, b * load(c + i) + a * load(s + i));
            }
        }
    });
}

template <class T>
void norm_backward(int threads, const T* dy, const T* x, const float* gain, float eps, const float* cos,
                   const float* sin, int64_t angle_rows, int64_t heads, T* dx, float* dgain, int64_t rows,
                   int64_t width) {
    int64_t stretch = 512, stretches = (rows + stretch - 1) / stretch, half = width / 2;
    std::vector<float> parts(stretches * width, 0.f);
    for_rows(threads, rows, stretch, [&](int64_t first, int64_t last) {
        float *value = scratch<float>(0, width), *own = parts.data() + first / stretch * width;
        for (int64_t r = first; r < last; r++) {
            const T *from = x + r * width, *d = dy + r * width;
            if (cos) {  // the gradient is rotated back
                const float *c = cos + r / heads % angle_rows * half, *s = sin + r / heads % angle_rows * half;
                for (int64_t i = 0; i < half; i += LANES) {
                    vector a = load(d + i), b = load(d + half + i);
                    store(value + i, a * load(c + i) + b * load(s + i));
                    store(value + half + i, b * load(c + i) - a * load(s + i));
                }
            } else {
                for (int64_t i = 0; i < width; i += LANES) store(value + i, load(d + i));
            }
            vector square{}, along{};
            for (int64_t i = 0; i < width; i += LANES) {
                vector v = load(from + i);
                square += v * v;
                along += v * load(value + i) * load(gain + i);
            }
            float scale = 1.f / std::sqrt(sum(square) / float(width) + eps);
            float pull = sum(along) * scale * scale * scale / float(width);
            for (int64_t i = 0; i < width; i += LANES) {
                vector v = load(from + i), g = load(value + i) * scale;
                store(own + i, load(own + i) + v * g);
                store(dx + r * width + i, g * load(gain + i) - v * pull);
            }
        }
    });
    for (int64_t i = 0; i < width; i++) {
        dgain[i] = 0.f;
        for (int64_t part = 0; part < stretches; part++) dgain[i] += parts[part * width + i];
    }
}

// y = x * sigmoid(gate)
template <class T> void gated(int threads, const T* x, const T* gate, T* y, int64_t size) {
    for_rows(threads, size, 16384, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += LANES) store(y + i, load(x + i) * sigmoid(load(gate + i)));
    });
}

template <class T>
void gated_backward(int threads, const T* dy, const T* x, const T* gate, T* dx, T* dgate, int64_t size) {
    for_rows(threads, size, 16384, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += LANES) {
            vector d = load(dy + i), s = sigmoid(load(gate + i));
            store(dx + i, d * s);
            store(dgate + i, d * load(x + i) * s * (1.f - s));
        }
    });
}

// --- attention -------------------------------------------------------------------------------------------------

constexpr int64_t QUERIES = 64;

struct Heads {  // of one tensor [batch, tokens, heads, width]
    int64_t tokens, heads, width;
    int64_t at(int64_t row, int64_t token, int64_t head) const { return ((row * tokens + token) * heads + head) * width; }
    int64_t ld() const { return heads * width; }
};

// Queries [first, last) see keys from `low` (a whole panel) to `high`; the first key seen by query t is start[t].
struct Span {
    int64_t first, last, low, high, keys;
};
inline Span span_of(int64_t first, int64_t tokens, const int32_t* start) {
    int64_t last = std::min(first + QUERIES, tokens);
    int64_t low = *std::min_element(start + first, start + last) / PANEL * PANEL;
    return {first, last, low, last, round_up(last - low, LANES)};
}

// Give the numbers of a line outside [from, to) one value.
inline void hide(float* line, int64_t from, int64_t to, int64_t size, float value) {
    std::fill(line, line + from, value), std::fill(line + to, line + size, value);
}

// Turn scores of the keys [from, to) into shares exp((score - largest) scale), 0 for the other keys of the line; return
// the factor that makes them sum to 1, and log(sum(exp(score scale))). `line` starts at a key whose position in its
// sequence is a multiple of 16: lane l then sums the positions l, l + 16, ... whatever the line's length.
template <class T>
ONE_COPY float soften(float* line, int64_t from, int64_t to, int64_t size, float scale, T* share, float* log_sum) {
    hide(line, from, to, size, -INFINITY);
    vector most = every(-INFINITY), total{};
    for (int64_t j = 0; j < size; j += LANES) most = larger(load(line + j), most);
    float largest = maximum(most);
    for (int64_t j = 0; j < size; j += LANES) {
        vector p = exponential((load(line + j) - largest) * scale);
        store(share + j, p);
        total += p;
    }
    *log_sum = largest * scale + std::log(sum(total));
    return 1.f / sum(total);
}

// q [B, T, H, D], k and v [B, T, K, D]: query t of row b sees keys start[b, t] .. t. out [B, T, H, D], and per query
// log(sum(exp(score))) [B, H, T].
template <class T>
void attention(int threads, const T* q, const T* k, const T* v, const int32_t* start, float scale, T* out,
               float* log_sums, int64_t batch, int64_t tokens, int64_t heads, int64_t groups, int64_t width) {
    Heads hq{tokens, heads, width}, hk{tokens, groups, width};
    int64_t steps = steps_of<T>(width), all = round_up(tokens, PANEL), each = heads / groups;
    threads = threads_for(threads, batch * heads * tokens * tokens * width);
    for_tasks(threads, batch * groups, [&](int64_t task) {
        int64_t row = task / groups, group = task % groups;
        word* keys = scratch<word>(0, packed_size<T>(width, tokens));
        word* values = scratch<word>(1, packed_size<T>(tokens, width));
        pack_transposed(k + hk.at(row, 0, group), hk.ld(), width, tokens, keys);
        pack_straight(v + hk.at(row, 0, group), hk.ld(), tokens, width, values);
        float* scores = scratch<float>(2, QUERIES * all);
        T* shares = scratch<T>(3, QUERIES * all);
        float* sums = scratch<float>(4, QUERIES * width);
        for (int64_t at = 0; at < tokens; at += QUERIES) {
            Span s = span_of(at, tokens, start + row * tokens);
            for (int64_t head = group * each; head < (group + 1) * each; head++) {
                Left query{(const char*)(q + hq.at(row, s.first, head)), int64_t(hq.ld() * sizeof(T)), 4};
                multiply<T, float>(query, s.last - s.first, keys + s.low * steps, steps, s.keys, scores, s.keys);
                float inverse[QUERIES];
                for (int64_t t = s.first; t < s.last; t++) {
                    float* line = scores + (t - s.first) * s.keys;
                    T* share = shares + (t - s.first) * s.keys;
                    inverse[t - s.first] = soften(line, start[row * tokens + t] - s.low, t + 1 - s.low, s.keys, scale,
                                                  share, log_sums + (row * heads + head) * tokens + t);
                }
                // The panels of `values` hold all tokens: start within them at the step of key `low`.
                int64_t whole = steps_of<T>(tokens), skip = s.low / per_word<T> * PANEL;
                multiply<T, float>(rows_of(shares, s.keys), s.last - s.first, values + skip, steps_of<T>(s.high - s.low),
                                   width, sums, width, SET, whole);
                for (int64_t t = s.first; t < s.last; t++) {
                    T* to = out + hq.at(row, t, head);
                    for (int64_t i = 0; i < width; i += LANES)
                        store(to + i, load(sums + (t - s.first) * width + i) * inverse[t - s.first]);
                }
            }
        }
    });
}

template <class T>
void attention_backward(int threads, const T* dout, const T* q, const T* k, const T* v, const T* out,
                        const float* log_sums, const int32_t* start, float scale, T* dq, T* dk, T* dv, int64_t batch,
                        int64_t tokens, int64_t heads, int64_t groups, int64_t width) {
    Heads hq{tokens, heads, width}, hk{tokens, groups, width};
    int64_t steps = steps_of<T>(width), all = round_up(tokens, PANEL), each = heads / groups;
    threads = threads_for(threads, batch * heads * tokens * tokens * width);
    for_tasks(threads, batch * groups, [&](int64_t task) {
        int64_t row = task / groups, group = task % groups;
        word* keys = scratch<word>(0, packed_size<T>(width, tokens));
        word* values = scratch<word>(1, packed_size<T>(width, tokens));
        word* keys_straight = scratch<word>(2, packed_size<T>(tokens, width));
        pack_transposed(k + hk.at(row, 0, group), hk.ld(), width, tokens, keys);
        pack_transposed(v + hk.at(row, 0, group), hk.ld(), width, tokens, values);
        pack_straight(k + hk.at(row, 0, group), hk.ld(), tokens, width, keys_straight);
        float *scores = scratch<float>(3, QUERIES * all), *dshares = scratch<float>(4, QUERIES * all);
        T *shares = scratch<T>(5, QUERIES * all), *dscores = scratch<T>(6, QUERIES * all);
        word* left = scratch<word>(7, QUERIES * all);
        word* right = scratch<word>(8, packed_size<T>(QUERIES, width));
        float *sum_k = scratch<float>(9, all * width), *sum_v = scratch<float>(10, all * width);
        std::memset(sum_k, 0, all * width * 4), std::memset(sum_v, 0, all * width * 4);
        for (int64_t at = 0; at < tokens; at += QUERIES) {
            Span s = span_of(at, tokens, start + row * tokens);
            int64_t queries = s.last - s.first;
            for (int64_t head = group * each; head < (group + 1) * each; head++) {
                const T *queried = q + hq.at(row, s.first, head), *given = dout + hq.at(row, s.first, head);
                int64_t row_bytes = hq.ld() * sizeof(T);
                multiply<T, float>({(const char*)queried, row_bytes, 4}, queries, keys + s.low * steps, steps, s.keys,
                                   scores, s.keys);
                multiply<T, float>({(const char*)given, row_bytes, 4}, queries, values + s.low * steps, steps, s.keys,
                                   dshares, s.keys);
                for (int64_t t = s.first; t < s.last; t++) {
                    float *line = scores + (t - s.first) * s.keys, *d = dshares + (t - s.first) * s.keys;
                    T *share = shares + (t - s.first) * s.keys, *dscore = dscores + (t - s.first) * s.keys;
                    int64_t from = start[row * tokens + t] - s.low, to = t + 1 - s.low;
                    const T *o = out + hq.at(row, t, head), *g = dout + hq.at(row, t, head);
                    vector along{};
                    for (int64_t i = 0; i < width; i += LANES) along += load(o + i) * load(g + i);
                    float log_sum = log_sums[(row * heads + head) * tokens + t], mean = sum(along);
                    hide(line, from, to, s.keys, -INFINITY);
                    hide(d, from, to, s.keys, 0.f);
                    for (int64_t j = 0; j < s.keys; j += LANES) {
                        vector p = exponential(load(line + j) * scale - log_sum);
                        store(share + j, p);
                        store(dscore + j, p * (load(d + j) - mean) * scale);
                    }
                }
                float* sums = scratch<float>(11, QUERIES * width);
                int64_t whole = steps_of<T>(tokens), skip = s.low / per_word<T> * PANEL;
                multiply<T, float>(rows_of(dscores, s.keys), queries, keys_straight + skip, steps_of<T>(s.high - s.low),
                                   width, sums, width, SET, whole);
                for (int64_t t = 0; t < queries; t++)
                    for (int64_t i = 0; i < width; i += LANES)
                        store(dq + hq.at(row, s.first + t, head) + i, load(sums + t * width + i));
                pack_left(dscores, s.keys, queries, s.keys, left);
                pack_straight(queried, hq.ld(), queries, width, right);
                multiply<T, float>(columns_of(left, s.keys), s.high - s.low, right, steps_of<T>(queries), width,
                                   sum_k + s.low * width, width, ADD);
                pack_left(shares, s.keys, queries, s.keys, left);
                pack_straight(given, hq.ld(), queries, width, right);
                multiply<T, float>(columns_of(left, s.keys), s.high - s.low, right, steps_of<T>(queries), width,
                                   sum_v + s.low * width, width, ADD);
            }
        }
        for (int64_t t = 0; t < tokens; t++)
            for (int64_t i = 0; i < width; i += LANES) {
                store(dk + hk.at(row, t, group) + i, load(sum_k + t * width + i));
                store(dv + hk.at(row, t, group) + i, load(sum_v + t * width + i));
            }
    });
}

// --- attention over pages --------------------------------------------------------------------------------------

// A page holds one layer's keys and values of PANEL tokens that follow each other: for each key head the keys packed as
// the right side of q . k^T, then the values packed as the right side of share . v.
template <class T> struct Page {
    int64_t width;
    int64_t key_words() const { return steps_of<T>(width) * PANEL; }
    int64_t head_words() const { return key_words() + packed_size<T>(PANEL, width); }
    void put(word* head, int64_t place, const T* k, const T* v) const {
        if (place == 0) std::memset(head, 0, head_words() * 4);  // a share of 0 times old not-a-numbers is not 0
        auto* from = reinterpret_cast<const word*>(k);
        for (int64_t step = 0; step < steps_of<T>(width); step++) head[step * PANEL + place] = from[step];
        auto* values = reinterpret_cast<T*>(head + key_words());
        int64_t row = place / per_word<T>, part = place % per_word<T>, steps = steps_of<T>(PANEL);
        for (int64_t i = 0; i < width; i++)
            values[(i / PANEL * steps * PANEL + row * PANEL + i % PANEL) * per_word<T> + part] = v[i];
    }
};

// The same with 8 bits a value: for each key head the keys of PANEL tokens, their scales (bfloat16, one for each SHARED
// values of a token), then the values and theirs. A token's numbers depend on no other token. They are opened into a
// Page<T> before any query reads, so what follows is the same for both.
constexpr int64_t SHARED = 32;
struct Page8 {
    int64_t width;
    int64_t half_bytes() const { return PANEL * (width + width / SHARED * 2); }
    int64_t head_words() const { return 2 * half_bytes() / 4; }
    template <class T> void put(word* head, int64_t place, const T* k, const T* v) const {
        for (const T* from : {k, v}) {
            auto* half = reinterpret_cast<int8_t*>(head) + (from == v ? half_bytes() : 0);
            auto* scales = reinterpret_cast<bf16*>(half + PANEL * width) + place * (width / SHARED);
            for (int64_t part = 0; part < width / SHARED; part++) {
                const T* x = from + part * SHARED;
                float most = 0;
                for (int64_t i = 0; i < SHARED; i++) most = std::max(most, std::fabs(number(x[i])));
                vector scale = every(most / 127.f);
                bf16 rounded[LANES];
                store(rounded, scale);
                scales[part] = rounded[0];
                // By the scale that is kept: half of a step is then the most that is lost.
                float inverse = number(rounded[0]) > 0 ? 1.f / number(rounded[0]) : 0.f;
                for (int64_t i = 0; i < SHARED; i++)
                    half[place * width + part * SHARED + i] =
                        int8_t(std::max(-127.f, std::min(127.f, std::nearbyint(number(x[i]) * inverse))));
            }
        }
    }
    template <class T> void open(const word* head, int64_t places, const Page<T>& page, word* to) const {
        T* rows = scratch<T>(7, 2 * width);
        for (int64_t place = 0; place < places; place++) {
            for (int64_t of = 0; of < 2; of++) {
                auto* half = reinterpret_cast<const int8_t*>(head) + of * half_bytes();
                auto* scales = reinterpret_cast<const bf16*>(half + PANEL * width) + place * (width / SHARED);
                for (int64_t i = 0; i < width; i += LANES) {
                    float values[LANES];
                    for (int64_t j = 0; j < LANES; j++) values[j] = float(half[place * width + i + j]);
                    store(rows + of * width + i, load(values) * number(scales[i / SHARED]));
                }
            }
            page.put(to, place, rows, rows + width);
        }
    }
};

// The new tokens of sequence s are rows offsets[s] .. offsets[s + 1] of q [N, H, D], k and v [N, K, D]; the first stands
// at position first[s]. Their keys and values go to the pages table[s, position / PANEL] of `store`, then every query
// attends to the `window` keys up to itself (0: all). The same sums in the same order as `attention`, whose rows start
// at position 0. small: pages hold 8 bits a value, and a token's own key is read as it is kept.
template <class T>
void attention_pages(int threads, const T* q, const T* k, const T* v, const int64_t* offsets, const int64_t* first,
                     const int32_t* table, int64_t blocks, word* store_, int64_t window, float scale, T* out,
                     int64_t sequences, int64_t heads, int64_t groups, int64_t width, int64_t small) {
    Page<T> page{width};
    Page8 page8{width};
    int64_t each = heads / groups, steps = steps_of<T>(width), value_steps = steps_of<T>(PANEL);
    threads = threads_for(threads, offsets[sequences] * heads * width * blocks * PANEL);
    for_tasks(threads, sequences * groups, [&](int64_t task) {
        int64_t s = task / groups, group = task % groups, row = offsets[s], count = offsets[s + 1] - row;
        auto start = [&](int64_t position) { return window ? std::max<int64_t>(0, position - window + 1) : 0; };
        auto kept = [&](int64_t block) {
            int64_t number = int64_t(table[s * blocks + block]) * groups + group;
            return store_ + number * (small ? page8.head_words() : page.head_words());
        };
        for (int64_t t = 0; t < count; t++) {
            word* to = kept((first[s] + t) / PANEL);
            int64_t place = (first[s] + t) % PANEL, from = ((row + t) * groups + group) * width;
            small ? page8.put(to, place, k + from, v + from) : page.put(to, place, k + from, v + from);
        }
        // Opened once for all queries and heads of this step.
        int64_t end = first[s] + count, lowest = start(first[s]) / PANEL, over = (end - 1) / PANEL + 1;
        word* opened = small ? scratch<word>(6, (over - lowest) * page.head_words()) : nullptr;
        for (int64_t b = lowest; small && b < over; b++)
            page8.open(kept(b), std::min<int64_t>(PANEL, end - b * PANEL), page, opened + (b - lowest) * page.head_words());
        auto at = [&](int64_t block) { return small ? opened + (block - lowest) * page.head_words() : kept(block); };
        // One token: its heads are the rows of a product. More: queries of one head are.
        int64_t rows = count == 1 ? each : QUERIES, step = count == 1 ? 0 : 1;
        for (int64_t t = 0; t < count; t += QUERIES) {
            int64_t some = count == 1 ? rows : std::min(QUERIES, count - t), position = first[s] + t;
            int64_t low = start(position) / PANEL, high = (position + step * (some - 1)) / PANEL + 1;
            int64_t keys = (high - low) * PANEL, ld = count == 1 ? width : heads * width;
            float *scores = scratch<float>(2, some * keys), *sums = scratch<float>(4, some * width), inverse, log_sum;
            T* shares = scratch<T>(3, some * keys);
            for (int64_t head = group * each; head < (group + 1) * each; head += count == 1 ? each : 1) {
                const T* query = q + ((row + t) * heads + head) * width;
                T* to = out + ((row + t) * heads + head) * width;
                Left left{(const char*)query, int64_t(ld * sizeof(T)), 4};
                for (int64_t b = low; b < high; b++)
                    multiply<T, float>(left, some, at(b), steps, PANEL, scores + (b - low) * PANEL, keys);
                float* inverses = scratch<float>(5, some);
                for (int64_t r = 0; r < some; r++) {
                    int64_t own = position + step * r;
                    inverse = soften(scores + r * keys, start(own) - low * PANEL, own + 1 - low * PANEL, keys, scale,
                                     shares + r * keys, &log_sum);
                    inverses[r] = inverse;
                }
                for (int64_t b = low; b < high; b++)
                    multiply<T, float>({(const char*)(shares + (b - low) * PANEL), int64_t(keys * sizeof(T)), 4}, some,
                                       at(b) + page.key_words(), value_steps, width, sums, width, b > low ? RESUME : SET,
                                       value_steps);
                for (int64_t r = 0; r < some; r++)
                    for (int64_t i = 0; i < width; i += LANES)
                        store(to + r * ld + i, load(sums + r * width + i) * inverses[r]);
            }
        }
    });
}

// --- cross-entropy ---------------------------------------------------------------------------------------------

// Return log(sum(exp(line))); `value` becomes exp(line - largest), with their sum in `total`.
template <class T> ONE_COPY float log_sum_exp(const T* line, int64_t vocab, float* value, float* total) {
    vector most = every(-INFINITY), sums{};
    for (int64_t j = 0; j < vocab; j += LANES) {
        store(value + j, load(line + j));
        most = larger(load(value + j), most);
    }
    float largest = maximum(most);
    for (int64_t j = 0; j < vocab; j += LANES) {
        store(value + j, exponential(load(value + j) - largest));
        sums += load(value + j);
    }
    *total = sum(sums);
    return std::log(*total) + largest;
}

// log(sum(exp(logits))) of each row: with the logit of a token, its log-probability.
template <class T>
void log_partition(int threads, const T* logits, float* result, int64_t rows, int64_t vocab) {
    for_rows(threads_for(threads, rows * vocab * 8), rows, 1, [&](int64_t first, int64_t last) {
        float *value = scratch<float>(0, vocab), total;
        for (int64_t r = first; r < last; r++) result[r] = log_sum_exp(logits + r * vocab, vocab, value, &total);
    });
}

// Turn logits [rows, vocab] into the gradient of scale * (-log p(target) + z_loss * log_partition^2), in place;
// nll and log_partition [rows] in float.
template <class T>
void cross_entropy(int threads, T* logits, const int64_t* targets, float scale, float z_loss, float* nll,
                   float* log_partition, int64_t rows, int64_t vocab) {
    for_rows(threads, rows, 16, [&](int64_t first, int64_t last) {
        float* value = scratch<float>(0, vocab);
        for (int64_t r = first; r < last; r++) {
            T* line = logits + r * vocab;
            float total, chosen = number(line[targets[r]]);
            log_partition[r] = log_sum_exp(line, vocab, value, &total);
            nll[r] = log_partition[r] - chosen;
            float factor = (1.f + 2.f * z_loss * log_partition[r]) * (scale / total);
            value[targets[r]] -= scale / factor;
            for (int64_t j = 0; j < vocab; j += LANES) store(line + j, load(value + j) * factor);
        }
    });
}

// --- optimizers ------------------------------------------------------------------------------------------------

constexpr int64_t STRETCH = 16384;

// The sum of squares of each stretch of 16,384 numbers.
template <class T> void squares(int threads, const T* x, float* sums, int64_t size) {
    for_rows(threads, size, STRETCH, [&](int64_t first, int64_t last) {
        vector square{};
        for (int64_t i = first; i < last; i += LANES) square += load(x + i) * load(x + i);
        sums[first / STRETCH] = sum(square);
    });
}

inline vector root(vector x) { return (vector)_mm512_sqrt_ps((__m512)x); }

// One step of AdamW on float weights, from a gradient that counts `scale` times, and the new weights once more in the
// gradient's own type (unless `copy` is null), in a single pass over memory.
template <class T>
void adamw(int threads, const T* gradient, float* weight, float* mean, float* square, T* copy, float scale, float step,
           float decay, float beta1, float beta2, float root_correction, float eps, int64_t size) {
    for_rows(threads, size, STRETCH, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += LANES) {
            vector g = load(gradient + i) * scale, m = load(mean + i), v = load(square + i);
            m += (1.f - beta1) * (g - m);
            v = beta2 * v + (1.f - beta2) * (g * g);
            vector w = load(weight + i) * decay - step * (m / (root(v) / root_correction + eps));
            store(mean + i, m), store(square + i, v), store(weight + i, w);
            if (copy) store(copy + i, w);
        }
    });
}

// Move a momentum by a gradient that counts `scale` times, and write the update, not yet orthogonalised, in bfloat16.
template <class T>
void muon_momentum(int threads, const T* gradient, float* momentum, bf16* update, float scale, float decay,
                   int64_t nesterov, int64_t size) {
    for_rows(threads, size, STRETCH, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += LANES) {
            vector g = load(gradient + i) * scale, m = decay * load(momentum + i) + g;
            store(momentum + i, m);
            store(update + i, nesterov ? g + decay * m : m);
        }
    });
}

// weight <- decay * weight - step * update, and the new weights once more in another type (unless `copy` is null).
template <class T>
void muon_move(int threads, float* weight, const bf16* update, T* copy, float step, float decay, int64_t size) {
    for_rows(threads, size, STRETCH, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += LANES) {
            vector w = load(weight + i) * decay - step * load(update + i);
            store(weight + i, w);
            if (copy) store(copy + i, w);
        }
    });
}

// --- Newton-Schulz ---------------------------------------------------------------------------------------------

template <class T> void transpose(const T* from, int64_t rows, int64_t cols, T* to) {
    for (int64_t row = 0; row < rows; row += LANES)  // in blocks, so that neither side leaves the cache
        for (int64_t col = 0; col < cols; col++)
            for (int64_t i = row; i < row + LANES; i++) to[col * rows + i] = from[i * cols + col];
}

// C = S . B for a symmetric result: only blocks on and right of the diagonal are computed, the others mirrored.
// `blend(row, col, product)` turns 16 sums into what is stored.
template <class T, class F>
void symmetric_product(Left a, const word* b, int64_t steps, int64_t n, float* room, T* c, F blend) {
    for (int64_t row = 0; row < n; row += PANEL) {
        int64_t rows = std::min<int64_t>(PANEL, n - row), cols = n - row;
        multiply<T, float>(a.from_row(row), rows, b + row * steps, steps, cols, room, cols);
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = 0; j < cols; j += LANES)
                store(c + (row + i) * n + row + j, blend(row + i, row + j, load(room + i * cols + j)));
        for (int64_t i = 0; i < rows; i++)
            for (int64_t j = PANEL; j < cols; j++) c[(row + j) * n + row + i] = c[(row + i) * n + row + j];
    }
}

// Draw the singular values of each of n matrices [height, width] towards 1, in place: with X the matrix, or its
// transpose if it is tall, and G = X X^T, X <- a X + (b G + c G G) X for each of the `steps` triples (a, b, c), after scaling to Frobenius
// norm 1.
template <class T>
void orthogonalize(int threads, T* matrices, const float* coefficients, int64_t steps, int64_t n, int64_t height,
                   int64_t width) {
    int64_t rows = std::min(height, width), cols = std::max(height, width), size = rows * cols;
    for_tasks(threads, n, [&](int64_t task) {
        T *matrix = matrices + task * size, *x = height > width ? scratch<T>(4, size) : matrix;
        T *gram = scratch<T>(0, rows * rows), *mixed = scratch<T>(1, rows * rows);
        word* packed = scratch<word>(2, std::max(packed_size<T>(cols, rows), packed_size<T>(rows, std::max(rows, cols))));
        float* room = scratch<float>(3, std::max(PANEL * rows, size));
        vector square{};
        for (int64_t i = 0; i < size; i += LANES) square += load(matrix + i) * load(matrix + i);
        float scale = 1.f / (std::sqrt(sum(square)) + 1e-7f);
        if (x != matrix) transpose(matrix, height, width, x);
        for (int64_t i = 0; i < size; i += LANES) store(x + i, load(x + i) * scale);
        for (int64_t step = 0; step < steps; step++) {
            float a = coefficients[3 * step], b = coefficients[3 * step + 1], c = coefficients[3 * step + 2];
            pack_transposed(x, cols, cols, rows, packed);
            symmetric_product(rows_of(x, cols), packed, steps_of<T>(cols), rows, room, gram,
                              [](int64_t, int64_t, vector product) { return product; });
            pack_straight(gram, rows, rows, rows, packed);
            symmetric_product(rows_of(gram, rows), packed, steps_of<T>(rows), rows, room, mixed,
                              [&](int64_t i, int64_t j, vector product) { return b * load(gram + i * rows + j) + c * product; });
            pack_straight(x, cols, rows, cols, packed);
            multiply<T, float>(rows_of(mixed, rows), rows, packed, steps_of<T>(rows), cols, room, cols);
            for (int64_t i = 0; i < size; i += LANES) store(x + i, a * load(x + i) + load(room + i));
        }
        if (x != matrix) transpose(x, width, height, matrix);
    });
}

#include "step.cpp"

}  // namespace

// --- the C interface: `wide` chooses float, otherwise bfloat16 -------------------------------------------------

struct any {  // passed like void*, taken as a pointer to whatever the function asks for
    void* address;
    template <class T> operator T*() const { return static_cast<T*>(address); }
};
using integer = int64_t;

#define EXPORT(name, parameters, ...)                                                                        \
    extern "C" __attribute__((visibility("default"))) void freehold_##name parameters {                      \
        wide ? name<float>(threads, __VA_ARGS__) : name<bf16>(threads, __VA_ARGS__);                          \
    }

#define EXPORT_FLOAT(name, parameters, ...)                                                                  \
    extern "C" __attribute__((visibility("default"))) void freehold_##name parameters {                      \
        (void)wide;                                                                                          \
        name<float>(threads, __VA_ARGS__);                                                                   \
    }

extern "C" __attribute__((visibility("default"))) void freehold_threads(any entry, any size) {
    parallel = reinterpret_cast<Parallel>(entry.address);
    team_size = reinterpret_cast<int (*)()>(size.address);
}
// Ask the kernel for the tile registers, once; return whether products use them.
extern "C" __attribute__((visibility("default"))) int freehold_tiles() {
#ifdef __AMX_BF16__
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;
    tiles = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#endif
    return tiles;
}
extern "C" __attribute__((visibility("default"))) int freehold_bf16() {
#ifdef __AVX512BF16__
    return 1;
#else
    return 0;
#endif
}
EXPORT(linear, (int wide, int threads, any x, any w, any y, integer rows, integer ins, integer outs),
       x, w, y, rows, ins, outs)
EXPORT(linear_input_gradient, (int wide, int threads, any dy, any w, any dx, integer rows, integer ins, integer outs),
       dy, w, dx, rows, ins, outs)
EXPORT(linear_weight_gradient, (int wide, int threads, any dy, any x, any dw, integer rows, integer ins, integer outs),
       dy, x, dw, rows, ins, outs)
EXPORT(swiglu,
       (int wide, int threads, any x, any counts, integer experts, any gate, any up, integer stride, any down, any both,
        any y, integer width, integer inner),
       x, counts, experts, gate, up, stride, down, both, y, width, inner)
EXPORT(swiglu_backward,
       (int wide, int threads, any dy, any x, any both, any counts, integer experts, any gate, any up, integer stride,
        any down, any product, any dboth, any dx, any dgate, any dup, any ddown, integer width, integer inner),
       dy, x, both, counts, experts, gate, up, stride, down, product, dboth, dx, dgate, dup, ddown, width, inner)
EXPORT(pack, (int wide, int threads, any w, any packed, integer matrices, integer ins, integer outs),
       w, packed, matrices, ins, outs)
EXPORT(linear_packed, (int wide, int threads, any x, any packed, any y, integer rows, integer ins, integer outs),
       x, packed, y, rows, ins, outs)
EXPORT(swiglu_packed,
       (int wide, int threads, any x, any counts, integer experts, any gate_up, any down, any both, any product, any y,
        integer width, integer inner),
       x, counts, experts, gate_up, down, both, product, y, width, inner)
EXPORT(grouped,
       (int wide, int threads, any x, any counts, integer groups, integer share, any w, integer form, any u, any b,
        integer rank, any y, integer ins, integer outs),
       x, counts, groups, share, w, form, u, b, rank, y, ins, outs)
EXPORT(grouped_input_gradient,
       (int wide, int threads, any dy, any counts, integer groups, integer share, any w, integer form, any du, any a,
        integer rank, any dx, integer ins, integer outs),
       dy, counts, groups, share, w, form, du, a, rank, dx, ins, outs)
EXPORT(grouped_weight_gradient,
       (int wide, int threads, any dy, any x, any counts, integer groups, any dw, integer ins, integer outs),
       dy, x, counts, groups, dw, ins, outs)
EXPORT(silu, (int wide, int threads, any both, any product, integer rows, integer inner), both, product, rows, inner)
EXPORT(silu_gradient, (int wide, int threads, any dproduct, any both, any dboth, integer rows, integer inner),
       dproduct, both, dboth, rows, inner)
EXPORT(unpack, (int wide, int threads, any blocks, integer form, any to, integer rows, integer width),
       blocks, form, to, rows, width)
EXPORT(step,
       (int wide, int threads, any model, any layers, any ids, any positions, any embedding, any cos, any sin,
        any offsets, any first, any tables, integer blocks, any store, integer small, any gain, any out, integer rows,
        integer sequences, any ends, integer draws, any picked, any logits, any partition),
       model, layers, ids, positions, embedding, cos, sin, offsets, first, tables, blocks, store, small, gain, out, rows,
       sequences, ends, draws, picked, logits, partition)
EXPORT(attention_pages,
       (int wide, int threads, any q, any k, any v, any offsets, any first, any table, integer blocks, any store,
        integer window, float scale, any out, integer sequences, integer heads, integer groups, integer width,
        integer small),
       q, k, v, offsets, first, table, blocks, store, window, scale, out, sequences, heads, groups, width, small)
EXPORT(log_partition, (int wide, int threads, any logits, any result, integer rows, integer vocab),
       logits, result, rows, vocab)
EXPORT_FLOAT(choose,
       (int wide, int threads, any logits, any bias, float scale, any chosen, any weights, integer rows, integer experts,
        integer k),
       logits, bias, scale, chosen, weights, rows, experts, k)
EXPORT_FLOAT(choose_backward,
       (int wide, int threads, any dweights, any logits, any chosen, float scale, any dlogits, integer rows,
        integer experts, integer k),
       dweights, logits, chosen, scale, dlogits, rows, experts, k)
EXPORT(take_rows, (int wide, int threads, any from, any index, any to, integer rows, integer width),
       from, index, to, rows, width)
EXPORT(sum_rows,
       (int wide, int threads, any from, any inverse, any weights, any base, any to, integer tokens, integer k,
        integer width),
       from, inverse, weights, base, to, tokens, k, width)
EXPORT(sum_rows_backward,
       (int wide, int threads, any dto, any from, any inverse, any weights, any dfrom, any dweights, integer tokens,
        integer k, integer width),
       dto, from, inverse, weights, dfrom, dweights, tokens, k, width)
EXPORT(norm,
       (int wide, int threads, any x, any gain, float eps, any cos, any sin, integer angle_rows, integer heads, any y,
        integer rows, integer width),
       x, gain, eps, cos, sin, angle_rows, heads, y, rows, width)
EXPORT(norm_backward,
       (int wide, int threads, any dy, any x, any gain, float eps, any cos, any sin, integer angle_rows, integer heads,
        any dx, any dgain, integer rows, integer width),
       dy, x, gain, eps, cos, sin, angle_rows, heads, dx, dgain, rows, width)
EXPORT(gated, (int wide, int threads, any x, any gate, any y, integer size), x, gate, y, size)
EXPORT(gated_backward, (int wide, int threads, any dy, any x, any gate, any dx, any dgate, integer size),
       dy, x, gate, dx, dgate, size)
EXPORT(attention,
       (int wide, int threads, any q, any k, any v, any start, float scale, any out, any log_sums, integer batch,
        integer tokens, integer heads, integer groups, integer width),
       q, k, v, start, scale, out, log_sums, batch, tokens, heads, groups, width)
EXPORT(attention_backward,
       (int wide, int threads, any dout, any q, any k, any v, any out, any log_sums, any start, float scale, any dq,
        any dk, any dv, integer batch, integer tokens, integer heads, integer groups, integer width),
       dout, q, k, v, out, log_sums, start, scale, dq, dk, dv, batch, tokens, heads, groups, width)
EXPORT(cross_entropy,
       (int wide, int threads, any logits, any targets, float scale, float z_loss, any nll, any log_partition,
        integer rows, integer vocab),
       logits, targets, scale, z_loss, nll, log_partition, rows, vocab)
EXPORT(orthogonalize, (int wide, int threads, any matrices, any coefficients, integer steps, integer n, integer height,
        integer width),
       matrices, coefficients, steps, n, height, width)
EXPORT(squares, (int wide, int threads, any x, any sums, integer size), x, sums, size)
EXPORT(adamw,
       (int wide, int threads, any gradient, any weight, any mean, any square, any copy, float scale, float step,
        float decay, float beta1, float beta2, float root_correction, float eps, integer size),
       gradient, weight, mean, square, copy, scale, step, decay, beta1, beta2, root_correction, eps, size)
EXPORT(muon_momentum,
       (int wide, int threads, any gradient, any momentum, any update, float scale, float decay, integer nesterov,
        integer size),
       gradient, momentum, update, scale, decay, nesterov, size)
EXPORT(muon_move, (int wide, int threads, any weight, any update, any copy, float step, float decay, integer size),
       weight, update, copy, step, decay, size)
