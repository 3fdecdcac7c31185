// Sixteen floats at a time, by the vector types of GCC and Clang: AVX-512, AVX2 and NEON alike.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#define INLINE inline __attribute__((always_inline))
#define APART __attribute__((noinline))  // of what is long: copies of it in every caller would only slow the compiler

typedef float floats __attribute__((vector_size(64)));
typedef int32_t ints __attribute__((vector_size(64)));
typedef uint32_t words __attribute__((vector_size(64)));
typedef uint16_t halves __attribute__((vector_size(32)));

constexpr int WIDTH = 16;

struct bf16 {
    uint16_t bits;
};

constexpr int64_t round_up(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

INLINE floats load(const float* p) {
    floats x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

INLINE floats load(const bf16* p) {
    halves x;
    std::memcpy(&x, p, sizeof x);
    return (floats)(__builtin_convertvector(x, words) << 16);
}

INLINE void store(float* p, floats x) { std::memcpy(p, &x, sizeof x); }

// To the nearest, ties to even; a NaN stays one.
INLINE void store(bf16* p, floats x) {
    words bits = (words)x;
    const words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    bits = x == x ? rounded : ((bits >> 16) | 0x40);
    const halves low = __builtin_convertvector(bits, halves);
    std::memcpy(p, &low, sizeof low);
}

// The first n of sixteen; the rest reads as zero and is not written.
template <typename T>
INLINE floats load(const T* p, int64_t n) {
    if (n >= WIDTH) return load(p);
    T all[WIDTH] = {};
    std::memcpy(all, p, n * sizeof(T));
    return load(all);
}

template <typename T>
INLINE void store(T* p, floats x, int64_t n) {
    if (n >= WIDTH) return store(p, x);
    T all[WIDTH];
    store(all, x);
    std::memcpy(p, all, n * sizeof(T));
}

// The first n of sixteen, the rest zero.
INLINE floats first(floats x, int64_t n) {
    const ints index = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    return n >= WIDTH ? x : (index < int32_t(n) ? x : floats{});
}

INLINE floats fill(float x) { return floats{} + x; }

// e^x within a rounding or two, x held to where the result is a normal number. Taylor's series to x^7 on |x| < ln(2) / 2.
INLINE floats exp(floats x) {
    const floats low = fill(-87.0f), high = fill(88.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const floats n = (x * 1.44269504f + magic) - magic;
    x = x - n * 0.693359375f;  // ln(2) in two parts, the first exact in few bits
    x = x - n * -2.12194440e-4f;
    floats y = fill(1.0f / 5040);
    y = y * x + 1.0f / 720;
    y = y * x + 1.0f / 120;
    y = y * x + 1.0f / 24;
    y = y * x + 1.0f / 6;
    y = y * x + 0.5f;
    y = y * x + 1.0f;
    y = y * x + 1.0f;
    return y * (floats)((__builtin_convertvector(n, ints) + 127) << 23);
}

INLINE floats sigmoid(floats x) { return 1.0f / (1.0f + exp(-x)); }

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SHUFFLES
#endif
#endif

// Sixteen vectors to the vector of their sixteen sums.
INLINE floats sums(const floats* x) {
#ifdef SHUFFLES
    floats by2[8], by4[4], by8[2];
    for (int i = 0; i < 8; i++) {
        const floats a = x[2 * i], b = x[2 * i + 1];
        by2[i] = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29) +
                 __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
    }
    for (int i = 0; i < 4; i++) {
        const floats a = by2[2 * i], b = by2[2 * i + 1];
        by4[i] = __builtin_shufflevector(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
                 __builtin_shufflevector(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    for (int i = 0; i < 2; i++) {
        const floats a = by4[2 * i], b = by4[2 * i + 1];
        by8[i] = __builtin_shufflevector(a, b, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
                 __builtin_shufflevector(a, b, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    const floats a = by8[0], b = by8[1];
    return __builtin_shufflevector(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
           __builtin_shufflevector(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
#else
    floats y{};
    for (int i = 0; i < WIDTH; i++)
        for (int j = 0; j < WIDTH; j++) y[i] += x[i][j];
    return y;
#endif
}

INLINE float sum(floats x) {
    float y[WIDTH];
    store(y, x);
    for (int width = WIDTH / 2; width; width /= 2)
        for (int i = 0; i < width; i++) y[i] += y[i + width];
    return y[0];
}

// Memory on a cache line's border, not initialised.
struct Free {
    void operator()(float* p) const { std::free(p); }
};
using Buffer = std::unique_ptr<float[], Free>;

inline Buffer buffer(int64_t size) {
    return Buffer(static_cast<float*>(std::aligned_alloc(64, round_up(size) * sizeof(float))));
}

// Calls f with p as what it points to.
template <typename F>
INLINE void with_type(bool is_bf16, const void* p, F f) {
    if (is_bf16)
        f(static_cast<const bf16*>(p));
    else
        f(static_cast<const float*>(p));
}

template <typename F>
INLINE void with_type(bool is_bf16, void* p, F f) {
    if (is_bf16)
        f(static_cast<bf16*>(p));
    else
        f(static_cast<float*>(p));
}
