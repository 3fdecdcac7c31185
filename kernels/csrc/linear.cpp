// Products of a matrix and a few rows, as generating text makes them: each weight is read once, so memory's bandwidth is the
// limit. Weights are float32 or bfloat16, sums float32. No sum depends on how many threads there are.

#include <algorithm>
#include <cmath>

#include "simd.h"

namespace {

constexpr int64_t MAX_ROWS = 8;

// A weight's memory is fetched this far ahead: the processor's own prefetch ends at each page of 4096 bytes, and takes a
// while to start anew. On a Xeon of 2019 it took bfloat16 from 0.75 of a plain sum's bandwidth to 0.98.
constexpr int64_t AHEAD = 4096;

template <typename T>
INLINE void prefetch(const T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
}

// Rows as floats: as they are, or widened into `wide`.
const float* widen(const void* x, bool is_bf16, int64_t size, Buffer& wide) {
    if (!is_bf16) return static_cast<const float*>(x);
    wide = buffer(size);
    const bf16* const p = static_cast<const bf16*>(x);
    for (int64_t i = 0; i < size; i += WIDTH) store(wide.get() + i, load(p + i, size - i));
    return wide.get();
}

INLINE void put(void* y, bool is_bf16, int64_t at, floats value, int64_t count) {
    if (is_bf16)
        store(static_cast<bf16*>(y) + at, value, count);
    else
        store(static_cast<float*>(y) + at, value, count);
}

// y[m] = w . x[m] for one row of the weight.
template <int M, typename T>
INLINE void dot(const T* w, const float* x, int64_t in, float* y) {
    constexpr int UNROLL = M == 1 ? 4 : 2;  // sums enough to hide an addition's latency
    floats part[M][UNROLL] = {};
    int64_t i = 0;
    for (; i + UNROLL * WIDTH <= in; i += UNROLL * WIDTH)
        for (int u = 0; u < UNROLL; u++) {
            const int64_t at = i + u * WIDTH;
            if (at * sizeof(T) % 64 == 0) prefetch(w + at);
            const floats weight = load(w + at);
            for (int m = 0; m < M; m++) part[m][u] += weight * load(x + m * in + at);
        }
    for (; i < in; i += WIDTH) {
        const floats weight = load(w + i, in - i);
        for (int m = 0; m < M; m++) part[m][0] += weight * load(x + m * in + i, in - i);
    }
    for (int m = 0; m < M; m++) {
        for (int u = 1; u < UNROLL; u++) part[m][0] += part[m][u];
        y[m] = sum(part[m][0]);
    }
}

template <int M, typename T>
void linear(const float* x, const T* w, void* y, bool y_is_bf16, int64_t in, int64_t out, int64_t threads) {
    const int64_t blocks = (out + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(guided)
    for (int64_t block = 0; block < blocks; block++) {
        const int64_t first = block * WIDTH, count = std::min<int64_t>(WIDTH, out - first);
        alignas(64) float results[WIDTH][M] = {};
        for (int64_t i = 0; i < count; i++) dot<M>(w + (first + i) * in, x, in, results[i]);
        for (int m = 0; m < M; m++) {
            floats column;
            for (int i = 0; i < WIDTH; i++) column[i] = results[i][m];
            put(y, y_is_bf16, m * out + first, column, count);
        }
    }
}

template <typename T, int M = 1>
void linear(int64_t rows, const float* x, const T* w, void* y, bool y_is_bf16, int64_t in, int64_t out, int64_t threads) {
    if constexpr (M < MAX_ROWS)
        if (rows > M) return linear<T, M + 1>(rows, x, w, y, y_is_bf16, in, out, threads);
    linear<M, T>(x, w, y, y_is_bf16, in, out, threads);
}

// y += x w for some rows of w, (count, out), of which row r begins at w + r * stride: `out` sums side by side.
template <int Q, typename T>
INLINE void columns(const float* x, const T* w, int64_t count, int64_t stride, int64_t out, float* y) {
    floats part[2][Q] = {};
    const auto at = [&](int64_t r, int q) {
        const T* const p = w + r * stride + q * WIDTH;
        return q + 1 < Q ? load(p) : load(p, out - q * WIDTH);
    };
    int64_t r = 0;
    for (; r + 2 <= count; r += 2)
        for (int q = 0; q < Q; q++) {
            part[0][q] += x[r] * at(r, q);
            part[1][q] += x[r + 1] * at(r + 1, q);
        }
    for (int q = 0; q < Q && r < count; q++) part[0][q] += x[r] * at(r, q);
    for (int q = 0; q < Q; q++) {
        const int64_t n = out - q * WIDTH;
        store(y + q * WIDTH, load(y + q * WIDTH, n) + part[0][q] + part[1][q], n);
    }
}

constexpr int64_t COLUMNS = 4 * WIDTH;

template <typename T>
INLINE void transposed(const float* x, const T* w, int64_t count, int64_t stride, int64_t out, float* y) {
    for (; out > 0; out -= COLUMNS, w += COLUMNS, y += COLUMNS) {
        const int64_t vectors = (std::min(out, COLUMNS) + WIDTH - 1) / WIDTH;
        switch (vectors) {
            case 1: columns<1>(x, w, count, stride, out, y); break;
            case 2: columns<2>(x, w, count, stride, out, y); break;
            case 3: columns<3>(x, w, count, stride, out, y); break;
            default: columns<4>(x, w, count, stride, std::min(out, COLUMNS), y);
        }
    }
}

enum Activation { NONE, TANH, SIGMOID };

constexpr int64_t SLABS = 8;  // the inner sum is cut so often, however many threads there are

template <typename T>
void low_rank(const float* x, const T* down, const T* up, const void* bias, bool bias_is_bf16, int64_t activation, void* y,
              bool y_is_bf16, int64_t rows, int64_t in, int64_t rank, int64_t out, int64_t threads) {
    const Buffer hidden = buffer(SLABS * rows * rank);
    float* const h = hidden.get();
    std::fill(h, h + SLABS * rows * rank, 0.0f);
    const int64_t slab = (in + SLABS - 1) / SLABS, tiles = (out + COLUMNS - 1) / COLUMNS;
#pragma omp parallel num_threads(threads)
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
            if (activation == TANH) h[i] = std::tanh(h[i]);
            if (activation == SIGMOID) h[i] = 1.0f / (1.0f + std::exp(-h[i]));
        }
#pragma omp for schedule(static)
        for (int64_t tile = 0; tile < tiles; tile++) {
            const int64_t first = tile * COLUMNS, count = std::min(COLUMNS, out - first);
            for (int64_t m = 0; m < rows; m++) {
                alignas(64) float part[COLUMNS] = {};
                transposed(h + m * rank, up + first, rank, out, count, part);
                for (int64_t i = 0; i < count; i += WIDTH) {
                    floats value = load(part + i);
                    if (bias && bias_is_bf16) value += load(static_cast<const bf16*>(bias) + first + i, count - i);
                    if (bias && !bias_is_bf16) value += load(static_cast<const float*>(bias) + first + i, count - i);
                    put(y, y_is_bf16, m * out + first + i, value, count - i);
                }
            }
        }
    }
}

}  // namespace

// y = x w'. x (rows, in), rows of 1 to 8; w (out, in); y (rows, out) in the dtype of x; all contiguous.
extern "C" void rwkv_linear(const void* x, const void* w, void* y, int64_t rows, int64_t in, int64_t out, int64_t x_is_bf16,
                            int64_t w_is_bf16, int64_t threads) {
    Buffer wide;
    const float* const from = widen(x, x_is_bf16, rows * in, wide);
    if (w_is_bf16)
        linear(rows, from, static_cast<const bf16*>(w), y, x_is_bf16, in, out, threads);
    else
        linear(rows, from, static_cast<const float*>(w), y, x_is_bf16, in, out, threads);
}

// y = bias + activation(x down) up. x (rows, in), down (in, rank), up (rank, out), bias (out,) or null; y in the dtype of x.
extern "C" void rwkv_low_rank(const void* x, const void* down, const void* up, const void* bias, void* y, int64_t rows,
                              int64_t in, int64_t rank, int64_t out, int64_t activation, int64_t x_is_bf16,
                              int64_t w_is_bf16, int64_t threads) {
    Buffer wide;
    const float* const from = widen(x, x_is_bf16, rows * in, wide);
    if (w_is_bf16)
        low_rank(from, static_cast<const bf16*>(down), static_cast<const bf16*>(up), bias, true, activation, y, x_is_bf16, rows,
                 in, rank, out, threads);
    else
        low_rank(from, static_cast<const float*>(down), static_cast<const float*>(up), bias, false, activation, y, x_is_bf16,
                 rows, in, rank, out, threads);
}

// The sum of a buffer: what memory can deliver, to measure the others by.
extern "C" void rwkv_sum(const float* x, int64_t size, float* y, int64_t threads) {
    constexpr int64_t BLOCK = 1 << 14;
    float total = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(+ : total)
    for (int64_t first = 0; first < size; first += BLOCK) {
        const int64_t count = std::min(BLOCK, size - first);
        floats part[4] = {};
        for (int64_t i = 0; i < count; i += 4 * WIDTH)
            for (int u = 0; u < 4; u++) {
                const int64_t at = i + u * WIDTH;
                prefetch(x + first + at);
                if (at < count) part[u] += load(x + first + at, count - at);
            }
        total += sum(part[0] + part[1] + part[2] + part[3]);
    }
    *y = total;
}
