// Sixteen floats at a time, by the vector types of GCC and Clang, on whatever registers the processor has.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#if defined(__x86_64__)
#include <xmmintrin.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define ALWAYS __attribute__((always_inline))  // of a lambda
#define APART __attribute__((noinline))  // of what is long: copies of it in every caller would only slow the compiler

constexpr int WIDTH = 16;

// What a register holds.
#if defined(__AVX512F__)
#define LANES 16
#elif defined(__AVX__)
#define LANES 8
#else
#define LANES 4
#endif
constexpr int PARTS = WIDTH / LANES;

typedef float part __attribute__((vector_size(4 * LANES)));
typedef int32_t part_ints __attribute__((vector_size(4 * LANES)));
typedef uint32_t part_words __attribute__((vector_size(4 * LANES)));
typedef uint16_t part_halves __attribute__((vector_size(2 * LANES)));

// Sixteen floats. A vector wider than a register would be kept in memory by GCC, so these are several, and then comparisons
// and ?: do not work on them: max, min and first do.
#if LANES == 16
typedef part floats;
#else
struct floats {
    part parts[PARTS];
    float& operator[](int i) { return reinterpret_cast<float*>(parts)[i]; }
    float operator[](int i) const { return parts[i / LANES][i % LANES]; }
};
#endif

struct bf16 {
    uint16_t bits;
};

constexpr int64_t round_up(int64_t n) { return (n + WIDTH - 1) / WIDTH * WIDTH; }

// f of each part of x, or of x and y.
template <typename F>
INLINE floats by_parts(floats x, F f) {
#if LANES == 16
    return f(x);
#else
    floats z;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) z.parts[i] = f(x.parts[i]);
    return z;
#endif
}

template <typename F>
INLINE floats by_parts(floats x, floats y, F f) {
#if LANES == 16
    return f(x, y);
#else
    floats z;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) z.parts[i] = f(x.parts[i], y.parts[i]);
    return z;
#endif
}

#if LANES < 16
#define OPERATOR(op)                                                                                            \
    INLINE floats operator op(floats x, floats y) { return by_parts(x, y, [](part a, part b) { return a op b; }); } \
    INLINE floats operator op(floats x, float y) { return by_parts(x, [=](part a) { return a op y; }); }            \
    INLINE floats operator op(float x, floats y) { return by_parts(y, [=](part b) { return x op b; }); }            \
    template <typename T>                                                                                       \
    INLINE floats& operator op##=(floats& x, T y) {                                                              \
        return x = x op y;                                                                                      \
    }
OPERATOR(+)
OPERATOR(-)
OPERATOR(*)
OPERATOR(/)
#undef OPERATOR
INLINE floats operator-(floats x) {
    return by_parts(x, [](part a) { return -a; });
}
#endif

INLINE part load_part(const float* p) {
    part x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

INLINE part load_part(const bf16* p) {
    part_halves x;
    std::memcpy(&x, p, sizeof x);
    return (part)(__builtin_convertvector(x, part_words) << 16);
}

INLINE void store_part(float* p, part x) { std::memcpy(p, &x, sizeof x); }

// To the nearest, ties to even; a NaN stays one.
INLINE void store_part(bf16* p, part x) {
    const part_words bits = (part_words)x;
    const part_words rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    const part_words high = x == x ? rounded : ((bits >> 16) | 0x40);
    const part_halves low = __builtin_convertvector(high, part_halves);
    std::memcpy(p, &low, sizeof low);
}

template <typename T>
INLINE floats load(const T* p) {
#if LANES == 16
    return load_part(p);
#else
    floats x;
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) x.parts[i] = load_part(p + i * LANES);
    return x;
#endif
}

template <typename T>
INLINE void store(T* p, floats x) {
#if LANES == 16
    store_part(p, x);
#else
#pragma GCC unroll 4
    for (int i = 0; i < PARTS; i++) store_part(p + i * LANES, x.parts[i]);
#endif
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

INLINE floats fill(float x) { return floats{} + x; }

// NaN if x is.
INLINE floats max(floats x, floats y) {
    return by_parts(x, y, [](part a, part b) { return a < b ? b : a; });
}

INLINE floats min(floats x, floats y) {
    return by_parts(x, y, [](part a, part b) { return a > b ? b : a; });
}

// The first n of sixteen, the rest that of `otherwise`.
INLINE floats first(floats x, int64_t n, floats otherwise = floats{}) {
    if (n >= WIDTH) return x;
    alignas(64) float all[WIDTH], rest[WIDTH];
    store(all, x);
    store(rest, otherwise);
    for (int64_t i = n; i < WIDTH; i++) all[i] = rest[i];
    return load(all);
}

// e^x within a rounding or two, x held to where the result is a normal number. Taylor's series to x^7 on |x| < ln(2) / 2.
INLINE part exp_part(part x) {
    x = x < -87.0f ? part{} - 87.0f : x;
    x = x > 88.0f ? part{} + 88.0f : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    const part n = (x * 1.44269504f + magic) - magic;
    x = x - n * 0.693359375f;  // ln(2) in two parts, the first exact in few bits
    x = x - n * -2.12194440e-4f;
    part y = part{} + 1.0f / 5040;
    y = y * x + 1.0f / 720;
    y = y * x + 1.0f / 120;
    y = y * x + 1.0f / 24;
    y = y * x + 1.0f / 6;
    y = y * x + 0.5f;
    y = y * x + 1.0f;
    y = y * x + 1.0f;
    return y * (part)((__builtin_convertvector(n, part_ints) + 127) << 23);
}

INLINE floats exp(floats x) { return by_parts(x, exp_part); }

INLINE floats sigmoid(floats x) { return 1.0f / (1.0f + exp(-x)); }

// Shuffles of two registers, alike within each of their quarters of four floats, and of the quarters.
#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, part_ints{__VA_ARGS__})
#endif
#if LANES == 16
INLINE part low_singles(part a, part b) { return SHUFFLE(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29); }
INLINE part high_singles(part a, part b) { return SHUFFLE(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31); }
INLINE part low_pairs(part a, part b) { return SHUFFLE(a, b, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29); }
INLINE part high_pairs(part a, part b) { return SHUFFLE(a, b, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31); }
INLINE part even_quarters(part a, part b) { return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27); }
INLINE part odd_quarters(part a, part b) { return SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31); }
#elif LANES == 8
INLINE part low_singles(part a, part b) { return SHUFFLE(a, b, 0, 8, 1, 9, 4, 12, 5, 13); }
INLINE part high_singles(part a, part b) { return SHUFFLE(a, b, 2, 10, 3, 11, 6, 14, 7, 15); }
INLINE part low_pairs(part a, part b) { return SHUFFLE(a, b, 0, 1, 8, 9, 4, 5, 12, 13); }
INLINE part high_pairs(part a, part b) { return SHUFFLE(a, b, 2, 3, 10, 11, 6, 7, 14, 15); }
INLINE part even_quarters(part a, part b) { return SHUFFLE(a, b, 0, 1, 2, 3, 8, 9, 10, 11); }
INLINE part odd_quarters(part a, part b) { return SHUFFLE(a, b, 4, 5, 6, 7, 12, 13, 14, 15); }
#else
INLINE part low_singles(part a, part b) { return SHUFFLE(a, b, 0, 4, 1, 5); }
INLINE part high_singles(part a, part b) { return SHUFFLE(a, b, 2, 6, 3, 7); }
INLINE part low_pairs(part a, part b) { return SHUFFLE(a, b, 0, 1, 4, 5); }
INLINE part high_pairs(part a, part b) { return SHUFFLE(a, b, 2, 3, 6, 7); }
#endif

// Sixteen registers to their sixteen sums, which make PARTS registers.
INLINE void sums(const part* x, part* y) {
    part quads[4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const part a = low_singles(x[4 * i], x[4 * i + 1]) + high_singles(x[4 * i], x[4 * i + 1]);
        const part b = low_singles(x[4 * i + 2], x[4 * i + 3]) + high_singles(x[4 * i + 2], x[4 * i + 3]);
        quads[i] = low_pairs(a, b) + high_pairs(a, b);
    }
#if LANES == 4
    for (int i = 0; i < 4; i++) y[i] = quads[i];
#else
    const part a = even_quarters(quads[0], quads[1]) + odd_quarters(quads[0], quads[1]);
    const part b = even_quarters(quads[2], quads[3]) + odd_quarters(quads[2], quads[3]);
#if LANES == 8
    y[0] = a, y[1] = b;
#else
    y[0] = even_quarters(a, b) + odd_quarters(a, b);
#endif
#endif
}

// Sixteen times sixteen floats to the floats of their sixteen sums.
INLINE floats sums(const floats* x) {
#if LANES == 16
    floats y;
    sums(x, &y);
    return y;
#else
    part folded[WIDTH];
#pragma GCC unroll 16
    for (int i = 0; i < WIDTH; i++) {
        folded[i] = x[i].parts[0] + x[i].parts[1];
#if LANES == 4
        folded[i] += x[i].parts[2] + x[i].parts[3];
#endif
    }
    floats y;
    sums(folded, y.parts);
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

// Sixteen rows of sixteen, turned.
INLINE void turn(const float* from, int64_t stride, float* to, int64_t to_stride) {
    for (int64_t row = 0; row < WIDTH; row += LANES)
        for (int64_t column = 0; column < WIDTH; column += LANES) {
            part x[LANES], y[LANES];
#pragma GCC unroll 16
            for (int i = 0; i < LANES; i++) x[i] = load_part(from + (row + i) * stride + column);
#pragma GCC unroll 4
            for (int i = 0; i < LANES; i += 4) {  // four by four within each quarter
                const part a = low_singles(x[i], x[i + 1]), b = low_singles(x[i + 2], x[i + 3]);
                const part c = high_singles(x[i], x[i + 1]), d = high_singles(x[i + 2], x[i + 3]);
                y[i] = low_pairs(a, b), y[i + 1] = high_pairs(a, b), y[i + 2] = low_pairs(c, d), y[i + 3] = high_pairs(c, d);
            }
            const auto put = [&](int i, part z) { store_part(to + (column + i) * to_stride + row, z); };
#pragma GCC unroll 4
            for (int i = 0; i < 4; i++) {
#if LANES == 4
                put(i, y[i]);
#elif LANES == 8
                put(i, even_quarters(y[i], y[4 + i]));
                put(4 + i, odd_quarters(y[i], y[4 + i]));
#else
                const part even = even_quarters(y[i], y[4 + i]), even2 = even_quarters(y[8 + i], y[12 + i]);
                const part odd = odd_quarters(y[i], y[4 + i]), odd2 = odd_quarters(y[8 + i], y[12 + i]);
                put(i, even_quarters(even, even2));
                put(4 + i, even_quarters(odd, odd2));
                put(8 + i, odd_quarters(even, even2));
                put(12 + i, odd_quarters(odd, odd2));
#endif
            }
        }
}

// While one lives, this thread takes numbers below 1e-38 for 0: the processor is slow at them, and decays make many.
class Flush {
#if defined(__x86_64__)
    unsigned before = _mm_getcsr();

  public:
    Flush() { _mm_setcsr(before | 0x8040); }
    ~Flush() { _mm_setcsr(before); }
#elif defined(__aarch64__)
    uint64_t before;

  public:
    Flush() {
        asm volatile("mrs %0, fpcr" : "=r"(before));
        asm volatile("msr fpcr, %0" : : "r"(before | 1 << 24));
    }
    ~Flush() { asm volatile("msr fpcr, %0" : : "r"(before)); }
#else
  public:
    Flush() {}
#endif
    Flush(const Flush&) = delete;
};

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
