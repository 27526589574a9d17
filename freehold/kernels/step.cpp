// The whole forward pass of answering in one call: the kernels of cpu.cpp in the order of the model's layers, by a crew
// of threads that wakes once. Part of cpu.cpp. It rounds nowhere itself, so its bits are those of kernel after kernel.

// What step.py fills in; every field has 8 bytes.
struct Model {
    int64_t layers, width, heads, groups, head_width, experts, chosen, inner, vocab;
    const word* head;
    double embedding_scale, route_scale, eps, attention_scale;
};
struct Layer {
    const float *input_norm, *q_norm, *k_norm, *post_attention_norm, *pre_mlp_norm, *post_mlp_norm;
    const word *q, *k, *v, *gate, *o, *router, *gate_up, *down;  // no router: a dense layer, whose weights are the next two
    const word *shared_gate_up, *shared_down;
    const float* bias;
    int64_t shared_inner, window, rotates;
};

// What one pass works in, in one piece of memory.
template <class T> struct Activations {
    T *h, *x, *q, *k, *v, *gate, *mixed, *added, *rows, *both, *product, *results, *shared_both, *shared_product, *base;
    float *exact, *logits, *weights, *cos, *sin;
    int64_t* chosen;

    Activations(std::vector<char>& memory, const Model& m, int64_t n, int64_t shared_inner) {
        int64_t bytes = place(nullptr, m, n, shared_inner) - static_cast<char*>(nullptr);
        if (int64_t(memory.size()) < bytes) memory.resize(bytes);
        place(memory.data(), m, n, shared_inner);
    }

    // Set every pointer, from `at` on; return where the last one ends.
    char* place(char* at, const Model& m, int64_t n, int64_t shared_inner) {
        int64_t query = m.heads * m.head_width, key = m.groups * m.head_width, copies = n * m.chosen;
        auto take = [&](auto& to, int64_t size) {
            to = reinterpret_cast<std::remove_reference_t<decltype(to)>>(at);
            at += round_up(size * int64_t(sizeof(*to)), 64);
        };
        for (T** to : {&h, &x, &added, &base}) take(*to, n * m.width);
        for (T** to : {&q, &gate, &mixed}) take(*to, n * query);
        for (T** to : {&k, &v}) take(*to, n * key);
        for (T** to : {&rows, &results}) take(*to, copies * m.width);
        take(both, copies * 2 * m.inner), take(product, copies * m.inner);
        take(shared_both, n * 2 * shared_inner), take(shared_product, n * shared_inner);
        take(exact, n * m.width), take(logits, n * round_up(m.experts, LANES)), take(weights, copies);
        take(chosen, copies), take(cos, n * m.head_width / 2), take(sin, n * m.head_width / 2);
        return at;
    }
};

// h = the embedding's row of each id, times `scale`.
template <class T>
void embed(const int64_t* ids, const T* table, float scale, T* h, int64_t rows, int64_t width) {
    for_rows(1, rows, ROWS, [&](int64_t first, int64_t last) {
        for (int64_t r = first; r < last; r++)
            for (int64_t i = 0; i < width; i += LANES) store(h + r * width + i, load(table + ids[r] * width + i) * scale);
    });
}

template <class T> void add(const T* x, T* h, int64_t size) {
    for_rows(1, size, 16384, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += LANES) store(h + i, load(h + i) + load(x + i));
    });
}

template <class T> void widen(const T* x, float* y, int64_t size) {
    for_rows(1, size, 16384, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; i += LANES) store(y + i, load(x + i));
    });
}

// Drop the columns that filled rows of logits up to whole vectors.
inline void close_up(float* logits, int64_t rows, int64_t experts) {
    int64_t filled = round_up(experts, LANES);
    if (filled == experts) return;
    for_tasks(1, 1, [&](int64_t) {
        for (int64_t r = 1; r < rows; r++) std::memmove(logits + r * experts, logits + r * filled, experts * 4);
    });
}

// Rows sorted by expert, in the order of tokens within one: counts, the token of each row, the row of each choice.
struct Sorted {
    std::vector<int64_t> counts, token, inverse;
    Sorted(const int64_t* chosen, int64_t n, int64_t k, int64_t experts) : counts(experts), token(n * k), inverse(n * k) {
        std::vector<int64_t> next(experts + 1);
        for (int64_t i = 0; i < n * k; i++) counts[chosen[i]]++;
        for (int64_t e = 0; e < experts; e++) next[e + 1] = next[e] + counts[e];
        for (int64_t i = 0; i < n * k; i++) token[inverse[i] = next[chosen[i]]++] = i / k;
    }
};

template <class T> struct Step {
    int threads;
    const Model& m;
    const int64_t *offsets, *first;
    int64_t blocks, rows, sequences, small;
    word* store;
    Activations<T>& a;

    void linear(const T* x, const word* w, T* y, int64_t ins, int64_t outs) {
        linear_packed<T>(threads, x, w, y, rows, ins, outs);
    }
    void normalise(const T* x, const float* gain, T* y) {
        norm<T>(threads, x, gain, float(m.eps), nullptr, nullptr, 1, 1, y, rows, m.width);
    }
    void heads(const Layer& layer, T* x, const float* gain, int64_t heads) {
        bool turn = layer.rotates;
        norm<T>(threads, x, gain, float(m.eps), turn ? a.cos : nullptr, turn ? a.sin : nullptr, turn ? rows : 1,
                turn ? heads : 1, x, rows * heads, m.head_width);
    }

    void attend(const Layer& layer, const int32_t* table) {
        int64_t query = m.heads * m.head_width, key = m.groups * m.head_width;
        normalise(a.h, layer.input_norm, a.x);
        {
            Together independent;
            linear(a.x, layer.q, a.q, m.width, query);
            linear(a.x, layer.gate, a.gate, m.width, query);
            linear(a.x, layer.k, a.k, m.width, key);
            linear(a.x, layer.v, a.v, m.width, key);
        }
        {
            Together independent;
            heads(layer, a.q, layer.q_norm, m.heads);
            heads(layer, a.k, layer.k_norm, m.groups);
        }
        attention_pages<T>(threads, a.q, a.k, a.v, offsets, first, table, blocks, store, layer.window,
                           float(m.attention_scale), a.mixed, sequences, m.heads, m.groups, m.head_width, small);
        gated<T>(threads, a.mixed, a.gate, a.mixed, rows * query);
        linear(a.mixed, layer.o, a.added, query, m.width);
        normalise(a.added, layer.post_attention_norm, a.added);
        add(a.added, a.h, rows * m.width);
    }

    // The feed-forward of a dense layer, or the shared expert: one expert that takes every row.
    std::vector<Part> all_rows() const {
        int64_t count = rows;
        return parts_of(&count, 1);
    }
    void feed_forward(const Layer& layer) {
        auto parts = all_rows();
        swiglu_in(threads, a.x, parts, layer.shared_gate_up, a.shared_both, a.shared_product, m.width, layer.shared_inner);
        swiglu_out(threads, a.shared_product, parts, layer.shared_down, a.added, m.width, layer.shared_inner);
    }

    void mixture(const Layer& layer) {
        const float* exact = a.exact;
        if constexpr (sizeof(T) == 4) exact = a.x;
        else widen(a.x, a.exact, rows * m.width);
        linear_packed<float>(threads, exact, layer.router, a.logits, rows, m.width, round_up(m.experts, LANES));
        close_up(a.logits, rows, m.experts);
        choose<float>(threads, a.logits, layer.bias, float(m.route_scale), a.chosen, a.weights, rows, m.experts, m.chosen);
        Sorted sorted(a.chosen, rows, m.chosen, m.experts);
        auto parts = parts_of(sorted.counts.data(), m.experts), every = all_rows();
        take_rows<T>(threads, a.x, sorted.token.data(), a.rows, rows * m.chosen, m.width);
        {
            Together independent;
            swiglu_in(threads, a.rows, parts, layer.gate_up, a.both, a.product, m.width, m.inner);
            swiglu_in(threads, a.x, every, layer.shared_gate_up, a.shared_both, a.shared_product, m.width,
                      layer.shared_inner);
        }
        {
            Together independent;
            swiglu_out(threads, a.product, parts, layer.down, a.results, m.width, m.inner);
            swiglu_out(threads, a.shared_product, every, layer.shared_down, a.base, m.width, layer.shared_inner);
        }
        sum_rows<T>(threads, a.results, sorted.inverse.data(), a.weights, a.base, a.added, rows, m.chosen, m.width);
    }

    void layer(const Layer& layer, const int32_t* table) {
        attend(layer, table);
        normalise(a.h, layer.pre_mlp_norm, a.x);
        layer.router ? mixture(layer) : feed_forward(layer);
        normalise(a.added, layer.post_mlp_norm, a.added);
        add(a.added, a.h, rows * m.width);
    }
};

// Read the tokens `ids` of some sequences, as `attention_pages` describes them, each at its position, a row of the tables
// of angles; write what the head is applied to, out [rows, width], and for the `draws` rows `ends` the logits and
// their log(sum(exp)). tables [layers, sequences, blocks].
template <class T>
void step(int threads, const int64_t* model, const int64_t* layers_, const int64_t* ids, const int64_t* positions,
          const T* embedding, const float* cos, const float* sin, const int64_t* offsets, const int64_t* first,
          const int32_t* tables, int64_t blocks, word* store, int64_t small, const float* gain, T* out, int64_t rows,
          int64_t sequences, const int64_t* ends, int64_t draws, T* picked, T* logits, float* partition) {
    const Model& m = *reinterpret_cast<const Model*>(model);
    const Layer* layers = reinterpret_cast<const Layer*>(layers_);
    int64_t shared_inner = 0, half = m.head_width / 2;
    for (int64_t i = 0; i < m.layers; i++) shared_inner = std::max(shared_inner, layers[i].shared_inner);
    thread_local std::vector<char> memory;
    Activations<T> a(memory, m, rows, shared_inner);
    in_crew(threads, [&] {
        {
            Together independent;
            embed(ids, embedding, float(m.embedding_scale), a.h, rows, m.width);
            take_rows<float>(threads, cos, positions, a.cos, rows, half);
            take_rows<float>(threads, sin, positions, a.sin, rows, half);
        }
        Step<T> pass{threads, m, offsets, first, blocks, rows, sequences, small, store, a};
        for (int64_t i = 0; i < m.layers; i++) pass.layer(layers[i], tables + i * sequences * blocks);
        norm<T>(threads, a.h, gain, float(m.eps), nullptr, nullptr, 1, 1, out, rows, m.width);
        if (!draws) return;
        take_rows<T>(threads, out, ends, picked, draws, m.width);
        linear_packed<T>(threads, picked, m.head, logits, draws, m.width, m.vocab);
        log_partition<T>(threads, logits, partition, draws, m.vocab);
    });
}
