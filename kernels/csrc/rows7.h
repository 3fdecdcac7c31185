// What RWKV-7 does to one token, or to one head of one token, between its matrices. The equations are in kernels/time_mix7.py
// and kernels/token_shift.py. X is the type of activations, P that of parameters; all arithmetic is in float32.
#pragma once

#include <algorithm>
#include <cmath>

#include "simd.h"

constexpr float LOG_DECAY_MIN = -0.60653066f;  // of one step: -exp(-1/2)

// Raw decays to decays, a padded row in place.
INLINE void squash(float* w, int64_t padded) {
    for (int64_t i = 0; i < padded; i += WIDTH) store(w + i, exp(LOG_DECAY_MIN * sigmoid(load(w + i))));
}

// One step of WKV-7 for a head whose N is a multiple of 16, on the state as it lies, (N, N), value by key: for a step alone,
// turning it would cost more. `to` may be `from`.
APART inline void step(int64_t n, const float* r, const float* decay, const float* k, const float* v, const float* a, const float* b,
                 const float* from, float* to, float* y) {
    for (int64_t i = 0; i < n; i += WIDTH) {
        const float* const s = from + i * n;
        floats part[WIDTH];
        alignas(64) float removed[WIDTH];
        for (int l = 0; l < WIDTH; l++) {
            part[l] = floats{};
            for (int64_t j = 0; j < n; j += WIDTH) part[l] += load(s + l * n + j) * load(a + j);
        }
        store(removed, sums(part));
        for (int l = 0; l < WIDTH; l++) {
            part[l] = floats{};
            for (int64_t j = 0; j < n; j += WIDTH) {
                floats x = load(s + l * n + j) * load(decay + j);
                x += removed[l] * load(b + j);
                x += v[i + l] * load(k + j);
                store(to + (i + l) * n + j, x);
                part[l] += x * load(r + j);
            }
        }
        store(y + i, sums(part));
    }
}

struct Statistics {
    float mean, scale;
};

// Of a row of `size` values, which are read into y; the padding of y becomes 0.
template <typename X>
APART Statistics statistics(const X* x, int64_t size, float epsilon, float* y) {
    floats total{};
    for (int64_t i = 0; i < size; i += WIDTH) {
        const floats value = load(x + i, size - i);
        store(y + i, value);
        total += value;
    }
    const float mean = sum(total) / size;
    total = floats{};
    for (int64_t i = 0; i < size; i += WIDTH) {
        const floats value = first(load(y + i) - mean, size - i);
        total += value * value;
    }
    return {mean, 1 / std::sqrt(sum(total) / size + epsilon)};
}

// Layer norm of `size` values; the padding of y becomes 0.
template <typename X, typename P>
APART Statistics norm(const X* x, const P* weight, const P* bias, int64_t size, float epsilon, float* y) {
    const Statistics s = statistics(x, size, epsilon, y);
    for (int64_t i = 0; i < size; i += WIDTH)
        store(y + i, (load(y + i) - s.mean) * s.scale * load(weight + i, size - i) + load(bias + i, size - i));
    return s;
}

// From the key k0, the value, layer 0's value (or null) and the raw rates of a head to what the recurrence reads.
template <typename X, typename P>
APART void prepare(int64_t n, const X* k0, const X* v0, const X* v_first, const X* a_raw, const X* v_raw, const P* k_k,
                    const P* k_a, X* k, X* v, X* a, X* b) {
    floats square{};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const floats u = load(k0 + i, n - i) * load(k_k + i, n - i);
        square += u * u;
    }
    const float scale = 1 / std::max(std::sqrt(sum(square)), 1e-12f);
    for (int64_t i = 0; i < n; i += WIDTH) {
        const int64_t count = n - i;
        const floats key = load(k0 + i, count), rate = sigmoid(load(a_raw + i, count));
        const floats kappa = key * load(k_k + i, count) * scale;
        store(a + i, -kappa, count);
        store(b + i, kappa * rate, count);
        floats value = load(v0 + i, count);
        if (v_first) value += (load(v_first + i, count) - value) * sigmoid(load(v_raw + i, count));
        store(v + i, value, count);
        store(k + i, key * (1.0f + (rate - 1.0f) * load(k_a + i, count)), count);
    }
}

// From what the recurrence gave for a head to what the output matrix reads.
template <typename X, typename P>
APART void readout(int64_t n, const X* y, const X* r, const X* k, const X* v, const X* g, const P* weight, const P* bias,
                    const P* r_k, float epsilon, X* out) {
    floats total{}, bonus{};
    for (int64_t i = 0; i < n; i += WIDTH) {
        total += load(y + i, n - i);
        bonus += load(r + i, n - i) * load(k + i, n - i) * load(r_k + i, n - i);
    }
    const float mean = sum(total) / n, along = sum(bonus);
    total = floats{};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const floats value = first(load(y + i, n - i) - mean, n - i);
        total += value * value;
    }
    const float scale = 1 / std::sqrt(sum(total) / n + epsilon);
    for (int64_t i = 0; i < n; i += WIDTH) {
        const int64_t count = n - i;
        floats value = (load(y + i, count) - mean) * scale * load(weight + i, count) + load(bias + i, count);
        value += along * load(v + i, count);
        store(out + i, value * load(g + i, count), count);
    }
}

// z_m = x + (previous - x) mu_m, for one token, whose values begin at z_m + at.
template <typename Z, typename P>
APART void mix(const float* x, const float* previous, int64_t size, int64_t mixes, const P* const* mu, Z* const* z, int64_t at) {
    for (int64_t i = 0; i < size; i += WIDTH) {
        const floats value = load(x + i), change = load(previous + i) - value;
        for (int64_t m = 0; m < mixes; m++) store(z[m] + at + i, value + change * load(mu[m] + i, size - i), size - i);
    }
}

INLINE floats relu_squared(floats x) {
    x = max(x, floats{});
    return x * x;
}
