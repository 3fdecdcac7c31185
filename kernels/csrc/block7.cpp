// Blocks of RWKV-7 for one token of a few sequences, all in one call: a block is some 70 small operations, and calling each
// from Python takes longer than all the weights take to come from memory.

#include <utility>

#include "matrix.h"
#include "rows7.h"

namespace {

enum Mixed { XR, XW, XK, XV, XA, XG, MIXES };
enum Pair { DECAY, RATE, VALUE, GATE, PAIRS };

constexpr Mixed READS[PAIRS] = {XW, XA, XV, XG};

}  // namespace

// A block's parameters, all of one type, in the shapes of the checkpoint. N is a multiple of 16.
struct Weights7 {
    double norm_epsilon, group_epsilon;
    int64_t channels, heads, hidden, ranks[PAIRS], is_bf16;
    const void *ln1_weight, *ln1_bias, *mu[MIXES], *down[PAIRS], *up[PAIRS], *bias[PAIRS - 1], *k_k, *k_a, *r_k;
    const void *receptance, *key, *value, *output, *ln_x_weight, *ln_x_bias;
    const void *ln2_weight, *ln2_bias, *ffn_mu, *ffn_key, *ffn_value;
};

// A block and its state before and after: shifts (rows, C) like x, wkv (rows, H, N, N) float32, value by key.
struct Layer7 {
    const void *att_shift, *ffn_shift;
    const float* wkv;
    void *att_shift_out, *ffn_shift_out;
    float* wkv_out;
    const Weights7* weights;
};

// Activations (rows, C) of one type: rows tokens, each of a sequence of its own. v_first is null if the first block is that
// of layer 0, whose value then goes to v0, unless that is null.
struct Blocks7 {
    const void *x, *v_first;
    void *out, *v0;
    int64_t rows, is_bf16, threads, count;
    const Layer7* layers;
};

namespace {

// x (M, C) becomes what it is after the block. M >= rows: the rows beyond are zeros, and their results nobody's. v_first
// (rows, C): layer 0 writes it, the others read it.
template <int M, typename P>
void block(const Weights7& f, const Layer7& state, int64_t rows, bool bf, int64_t threads, bool layer_0, float* x, float* v_first) {
    const auto weight = [](const void* p) { return static_cast<const P*>(p); };
    const int64_t C = f.channels, H = f.heads, N = C / H, F = f.hidden, padded = round_up(C);
    const int64_t pairs = layer_0 ? PAIRS - 1 : PAIRS;
    // layer 0 has no VALUE pair: it stands last here, so that it can be left out
    constexpr Pair ORDER[PAIRS] = {DECAY, RATE, GATE, VALUE};
    int64_t ranks = 0, offset[PAIRS] = {};
    for (int i = 0; i < pairs; i++) offset[ORDER[i]] = ranks, ranks += f.ranks[ORDER[i]];

    const int64_t spare = 7 * WIDTH;  // each part begins on a border
    const Buffer scratch = buffer(M * (10 * C + F) + SLABS * rows * ranks + 2 * padded + spare);
    float* next = scratch.get();
    const auto take = [&](int64_t size) { return std::exchange(next, next + round_up(size)); };
    float *const z = take(MIXES * M * C), *const rkv = take(3 * M * C), *const mixed = take(M * C);
    float *const inner = take(M * F), *const slabs = take(SLABS * rows * ranks), *const now = take(padded), *const before = take(padded);
    std::fill(scratch.get(), next, 0.0f);

    const auto enter = [&](int64_t row, const void* ln_weight, const void* ln_bias, const void* shift, void* shift_out,
                           const void* const* mu, int64_t mixes) {
        norm(x + row * C, weight(ln_weight), weight(ln_bias), C, float(f.norm_epsilon), now);
        with_type(bf, shift, [&](auto* last) {
            for (int64_t i = 0; i < C; i += WIDTH) store(before + i, load(last + row * C + i, C - i));
        });
        for (int64_t i = 0; i < C; i += WIDTH) put(shift_out, bf, row * C + i, load(now + i), C - i);
        const P* shares[MIXES];
        float* to[MIXES];
        for (int64_t m = 0; m < mixes; m++) shares[m] = weight(mu[m]), to[m] = z + m * M * C;
        mix(now, before, C, mixes, shares, to, row * C);
    };
    // 16 results of a matrix from `first` on, for each row handed to `then`
    const auto matrix = [&](const void* w, const float* from, int64_t in, int64_t out, int64_t first, auto then) {
        floats found[M];
        const int64_t count = std::min<int64_t>(WIDTH, out - first);
        products<M>(weight(w) + first * in, from, in, count, found);
        for (int64_t m = 0; m < rows; m++) then(m, first, found[m], count);
    };
    const auto add = [&](int64_t m, int64_t first, floats y, int64_t count) {
        float* const to = x + m * C + first;
        store(to, load(to, count) + y, count);
    };
    const int64_t across = (C + WIDTH - 1) / WIDTH, wide = (F + WIDTH - 1) / WIDTH;
    const void* const projections[3] = {f.receptance, f.key, f.value};
    constexpr Mixed READ[3] = {XR, XK, XV};

#pragma omp parallel num_threads(threads)
    {
#pragma omp single
        for (int64_t row = 0; row < rows; row++)
            enter(row, f.ln1_weight, f.ln1_bias, state.att_shift, state.att_shift_out, f.mu, MIXES);

#pragma omp for schedule(guided)
        for (int64_t item = 0; item < 3 * across + pairs * SLABS; item++) {
            if (item < 3 * across) {
                const int64_t which = item / across;
                float* const to = rkv + which * M * C;
                matrix(projections[which], z + READ[which] * M * C, C, C, item % across * WIDTH,
                       [&](int64_t m, int64_t first, floats y, int64_t count) { store(to + m * C + first, y, count); });
            } else {
                const Pair pair = ORDER[(item - 3 * across) / SLABS];
                const int64_t slab = (item - 3 * across) % SLABS, size = (C + SLABS - 1) / SLABS, rank = f.ranks[pair];
                const int64_t first = std::min(C, slab * size), count = std::min(size, C - first);
                for (int64_t m = 0; m < rows; m++)
                    transposed(z + (READS[pair] * M + m) * C + first, weight(f.down[pair]) + first * rank, count, rank, rank,
                               slabs + (slab * rows + m) * ranks + offset[pair]);
            }
        }

#pragma omp single
        for (int64_t m = 0; m < rows; m++) {
            float* const h = slabs + m * ranks;
            for (int64_t s = 1; s < SLABS; s++)
                for (int64_t i = 0; i < ranks; i++) h[i] += slabs[(s * rows + m) * ranks + i];
            for (int64_t i = 0; i < f.ranks[DECAY]; i++) h[offset[DECAY] + i] = std::tanh(h[offset[DECAY] + i]);
            for (int64_t i = 0; i < f.ranks[GATE]; i++) h[offset[GATE] + i] = 1 / (1 + std::exp(-h[offset[GATE] + i]));
        }

#pragma omp for schedule(dynamic, 1)
        for (int64_t item = 0; item < H * rows; item++) {
            const int64_t head = item / rows, m = item % rows, first = head * N, at = m * C + first;
            const Buffer own = buffer((PAIRS + 5) * N);
            float* const low = own.get();
            float *const k = low + PAIRS * N, *const v = k + N, *const a = k + 2 * N, *const b = k + 3 * N, *const y = k + 4 * N;
            std::fill(low, low + PAIRS * N, 0.0f);
            for (int i = 0; i < pairs; i++) {
                const Pair pair = ORDER[i];
                float* const to = low + pair * N;
                if (pair != GATE)
                    for (int64_t j = 0; j < N; j += WIDTH) store(to + j, load(weight(f.bias[pair]) + first + j));
                transposed(slabs + m * ranks + offset[pair], weight(f.up[pair]) + first, f.ranks[pair], C, N, to);
            }
            const float *const r = rkv + at, *const k0 = rkv + M * C + at, *const v0 = rkv + 2 * M * C + at;
            if (layer_0) std::copy(v0, v0 + N, v_first + at);
            prepare<float, P>(N, k0, v0, layer_0 ? nullptr : v_first + at, low + RATE * N, low + VALUE * N,
                              weight(f.k_k) + first, weight(f.k_a) + first, k, v, a, b);
            squash(low + DECAY * N, N);
            const int64_t square = (m * H + head) * N * N;
            step(N, r, low + DECAY * N, k, v, a, b, state.wkv + square, state.wkv_out + square, y);
            readout<float, P>(N, y, r, k, v, low + GATE * N, weight(f.ln_x_weight) + first, weight(f.ln_x_bias) + first,
                              weight(f.r_k) + first, float(f.group_epsilon), mixed + at);
        }

#pragma omp for schedule(guided)
        for (int64_t i = 0; i < across; i++) matrix(f.output, mixed, C, C, i * WIDTH, add);

#pragma omp single
        for (int64_t row = 0; row < rows; row++)
            enter(row, f.ln2_weight, f.ln2_bias, state.ffn_shift, state.ffn_shift_out, &f.ffn_mu, 1);

#pragma omp for schedule(guided)
        for (int64_t i = 0; i < wide; i++)
            matrix(f.ffn_key, z, C, F, i * WIDTH, [&](int64_t m, int64_t first, floats y, int64_t count) {
                store(inner + m * F + first, relu_squared(y), count);
            });

#pragma omp for schedule(guided)
        for (int64_t i = 0; i < across; i++) matrix(f.ffn_value, inner, F, C, i * WIDTH, add);
    }
}

template <int M>
void blocks(const Blocks7& f) {
    const int64_t C = f.layers->weights->channels;
    const Buffer scratch = buffer(M * C + round_up(M * C));
    float *const x = scratch.get(), *const v_first = x + round_up(M * C);
    std::fill(x, x + M * C, 0.0f);
    const auto read = [&](const void* from, float* to) {
        with_type(f.is_bf16, from, [&](auto* p) {
            for (int64_t i = 0; i < f.rows * C; i += WIDTH) store(to + i, load(p + i, f.rows * C - i), f.rows * C - i);
        });
    };
    const auto write = [&](const float* from, void* to) {
        for (int64_t i = 0; i < f.rows * C; i += WIDTH) put(to, f.is_bf16, i, load(from + i, f.rows * C - i), f.rows * C - i);
    };
    read(f.x, x);
    if (f.v_first) read(f.v_first, v_first);
    for (int64_t i = 0; i < f.count; i++) {
        const Layer7& layer = f.layers[i];
        const bool layer_0 = i == 0 && !f.v_first;
        (layer.weights->is_bf16 ? block<M, bf16> : block<M, float>)(*layer.weights, layer, f.rows, f.is_bf16, f.threads, layer_0,
                                                                    x, v_first);
    }
    write(x, f.out);
    if (f.v0) write(v_first, f.v0);
}

}  // namespace

extern "C" void rwkv_block7(const Blocks7* f) {
    if (f->rows == 1)
        blocks<1>(*f);
    else if (f->rows == 2)
        blocks<2>(*f);
    else if (f->rows <= 4)
        blocks<4>(*f);
    else
        blocks<8>(*f);
}
