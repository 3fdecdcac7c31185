// Products of a matrix and a few rows, as generating text makes them: each weight is read once, so memory's bandwidth is the
// limit. Weights are float32 or bfloat16, sums float32. No sum depends on how many threads there are.

#include <algorithm>
#include <cmath>

#include "matrix.h"

namespace {

constexpr int64_t MAX_ROWS = 8;

template <int M, typename T>
void linear(const float* x, const T* w, void* y, bool y_is_bf16, int64_t in, int64_t out, int64_t threads) {
    const int64_t blocks = (out + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(guided)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * WIDTH, count = std::min<int64_t>(WIDTH, out - first);
        floats found[M];
        products<M>(w + first * in, x, in, count, found);
        for (int m = 0; m < M; m++) put(y, y_is_bf16, m * out + first, found[m], count);
    }
}

template <typename T, int M = 1>
void linear(int64_t rows, const float* x, const T* w, void* y, bool y_is_bf16, int64_t in, int64_t out, int64_t threads) {
    if constexpr (M < MAX_ROWS)
        if (rows > M) return linear<T, M + 1>(rows, x, w, y, y_is_bf16, in, out, threads);
    linear<M, T>(x, w, y, y_is_bf16, in, out, threads);
}

enum Activation { NONE, TANH, SIGMOID };

template <typename T, typename F>
void low_rank(const float* x, const T* down, const T* up, const T* bias, const F& f) {
    const int64_t rows = f.rows, in = f.in, rank = f.rank, out = f.out;
    const Buffer hidden = buffer(SLABS * rows * rank);
    float* const h = hidden.get();
    std::fill(h, h + SLABS * rows * rank, 0.0f);
    const int64_t slab = (in + SLABS - 1) / SLABS, tiles = (out + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(f.threads)
    {
#pragma omp for schedule(static)
        for (int64_t s = 0; s < SLABS; s++) {
            const int64_t first = std::min(in, s * slab), count = std::min(slab, in - first);
            for (int64_t m = 0; m < rows; m++)
                transposed(x + m * in + first, down + first * rank, count, rank, rank, h + (s * rows + m) * rank);
        }
#pragma omp single
        for (int64_t i = 0; i < rows * rank; i++) {
            for (int64_t s = 1; s < SLABS; s++) h[i] += h[s * rows * rank + i];
            if (f.activation == TANH) h[i] = std::tanh(h[i]);
            if (f.activation == SIGMOID) h[i] = 1.0f / (1.0f + std::exp(-h[i]));
        }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = tile * COLUMNS, count = std::min(COLUMNS, out - first);
            for (int64_t m = 0; m < rows; m++) {
                alignas(64) float part[COLUMNS] = {};
                transposed(h + m * rank, up + first, rank, out, count, part);
                for (int64_t i = 0; i < count; i += WIDTH) {
                    floats value = load(part + i);
                    if (bias) value += load(bias + first + i, count - i);
                    put(f.y, f.x_is_bf16, m * out + first + i, value, count - i);
                }
            }
        }
    }
}

}  // namespace

// y = x w'. x (rows, in), rows of 1 to 8; w (out, in); y (rows, out) in the dtype of x; all contiguous.
struct Linear {
    const void *x, *w;
    void* y;
    int64_t rows, in, out, x_is_bf16, w_is_bf16, threads;
};

extern "C" void rwkv_linear(const Linear* f) {
    Buffer wide;
    const float* const x = widen(f->x, f->x_is_bf16, f->rows * f->in, wide);
    const auto run = [&](auto* w) { linear(f->rows, x, w, f->y, f->x_is_bf16, f->in, f->out, f->threads); };
    if (f->w_is_bf16)
        run(static_cast<const bf16*>(f->w));
    else
        run(static_cast<const float*>(f->w));
}

// y = bias + activation(x down) up. x (rows, in), down (in, rank), up (rank, out), bias (out,) or null; y in the dtype of x.
struct LowRank {
    const void *x, *down, *up, *bias;
    void* y;
    int64_t rows, in, rank, out, activation, x_is_bf16, w_is_bf16, threads;
};

extern "C" void rwkv_low_rank(const LowRank* f) {
    Buffer wide;
    const float* const x = widen(f->x, f->x_is_bf16, f->rows * f->in, wide);
    const auto run = [&](auto* down) {
        low_rank(x, down, static_cast<decltype(down)>(f->up), static_cast<decltype(down)>(f->bias), *f);
    };
    if (f->w_is_bf16)
        run(static_cast<const bf16*>(f->down));
    else
        run(static_cast<const float*>(f->down));
}

// The sum of a buffer: what memory can deliver, to measure the others by.
struct Sum {
    const float* x;
    int64_t size;
    float* y;
    int64_t threads;
};

extern "C" void rwkv_sum(const Sum* f) {
    constexpr int64_t BLOCK = 1 << 14;
    float total = 0;
#pragma omp parallel for num_threads(f->threads) schedule(static) reduction(+ : total)
    for (int64_t first = 0; first < f->size; first += BLOCK) {
        const float* const x = f->x + first;
        const int64_t count = std::min(BLOCK, f->size - first);
        floats part[4] = {};
        for (int64_t i = 0; i < count; i += 4 * WIDTH)
            for (int64_t u = 0, at = i; u < 4 && at < count; u++, at += WIDTH) {
                prefetch(x + at);
                part[u] += load(x + at, count - at);
            }
        total += sum(part[0] + part[1] + part[2] + part[3]);
    }
    *f->y = total;
}
