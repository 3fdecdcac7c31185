// Products of a matrix and a few rows. Weights are float32 or bfloat16, x and sums float32.
#pragma once

#include <algorithm>

#include "simd.h"

// Rows as floats: as they are, or widened into `wide`.
inline const float* widen(const void* x, bool is_bf16, int64_t size, Buffer& wide) {
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

// A weight's memory is fetched this far ahead: the processor's own prefetch ends at each page of 4096 bytes, and takes a
// while to start anew. On a Xeon of 2019 it took bfloat16 from 0.75 of a plain sum's bandwidth to 0.98.
constexpr int64_t AHEAD = 4096;

template <typename T>
INLINE void prefetch(const T* p) {
    __builtin_prefetch(reinterpret_cast<const char*>(p) + AHEAD);
}

// y[m * WIDTH + r], summed over its sixteen parts, is w[r] . x[m], for R rows of the weight and M of x: more rows of w at once would be more streams, which memory
// serves worse, but each value of x loaded must meet two of w when there are many.
template <int R, int M, typename T>
APART void dot(const T* w, const float* x, int64_t in, floats* y) {
    constexpr int UNROLL = R * M <= 2 ? 4 : R * M <= 8 ? 2 : 1;  // sums enough to hide an addition's latency
    floats part[R][M][UNROLL] = {};
    int64_t i = 0;
    for (; i + UNROLL * WIDTH <= in; i += UNROLL * WIDTH)
        for (int u = 0; u < UNROLL; u++) {
            const int64_t at = i + u * WIDTH;
            floats weight[R];
            for (int r = 0; r < R; r++) {
                prefetch(w + r * in + at);
                weight[r] = load(w + r * in + at);
            }
            for (int m = 0; m < M; m++) {
                const floats value = load(x + m * in + at);
                for (int r = 0; r < R; r++) part[r][m][u] += weight[r] * value;
            }
        }
    for (; i < in; i += WIDTH)
        for (int r = 0; r < R; r++)
            for (int m = 0; m < M; m++) part[r][m][0] += load(w + r * in + i, in - i) * load(x + m * in + i, in - i);
    for (int r = 0; r < R; r++)
        for (int m = 0; m < M; m++) {
            for (int u = 1; u < UNROLL; u++) part[r][m][0] += part[r][m][u];
            y[m * WIDTH + r] = part[r][m][0];
        }
}

// y[m] = the products of `count` <= 16 rows of a weight with x[m].
template <int M, typename T>
APART void products(const T* w, const float* x, int64_t in, int64_t count, floats* y) {
    constexpr int R = M > 2 ? 2 : 1;
    floats found[M][WIDTH] = {};
    int64_t i = 0;
    for (; i + R <= count; i += R) dot<R, M>(w + i * in, x, in, &found[0][i]);
    for (; i < count; i++) dot<1, M>(w + i * in, x, in, &found[0][i]);
    for (int m = 0; m < M; m++) y[m] = sums(found[m]);
}

constexpr int64_t ROWS_AHEAD = 8;

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
            __builtin_prefetch(w + (r + ROWS_AHEAD) * stride + q * WIDTH);
            __builtin_prefetch(w + (r + ROWS_AHEAD + 1) * stride + q * WIDTH);
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
APART void transposed(const float* x, const T* w, int64_t count, int64_t stride, int64_t out, float* y) {
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

// The inner sum of a low-rank pair is cut so often, however many threads there are.
constexpr int64_t SLABS = 8;
