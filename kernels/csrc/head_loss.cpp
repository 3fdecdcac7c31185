// The cross-entropy of a block of logits and, in their place, its gradient: one visit to each row, which a core's own cache
// holds from the first pass over it to the third. Rows are independent: nothing depends on how many threads there are.

#include <algorithm>
#include <cmath>
#include <limits>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "simd.h"

namespace {

constexpr int64_t SEGMENT = 64 * WIDTH;
constexpr float LOWEST = -std::numeric_limits<float>::infinity();

// The first n of sixteen, the rest -infinity.
template <typename T>
INLINE floats load_or_lowest(const T* p, int64_t n) {
    return first(load(p, n), n, fill(LOWEST));
}

INLINE floats larger(floats x, floats y) { return max(y, x); }

INLINE float largest_of(floats x) {
    float y[WIDTH];
    store(y, x);
    return *std::max_element(y, y + WIDTH);
}

INLINE float value(const float* p) { return *p; }
INLINE float value(const bf16* p) { return load(p, 1)[0]; }
INLINE void put(float* p, float x) { *p = x; }
INLINE void put(bf16* p, float x) { store(p, fill(x), 1); }

struct Largest {
    float value;
    int64_t at;  // the first of equals
};

template <typename T>
Largest largest(const T* z, int64_t vocab) {
    float best = LOWEST;
    int64_t where = 0;
    for (int64_t start = 0; start < vocab; start += SEGMENT) {
        const int64_t count = std::min(SEGMENT, vocab - start);
        floats part[4];
        for (int u = 0; u < 4; u++) part[u] = fill(LOWEST);
        int64_t i = 0;
        for (; i + 4 * WIDTH <= count; i += 4 * WIDTH)
            for (int u = 0; u < 4; u++) part[u] = larger(load(z + start + i + u * WIDTH), part[u]);
        for (; i < count; i += WIDTH) part[0] = larger(load_or_lowest(z + start + i, count - i), part[0]);
        const float found = largest_of(larger(larger(part[0], part[1]), larger(part[2], part[3])));
        if (found > best) best = found, where = start;
    }
    while (where + 1 < vocab && value(z + where) != best) where++;
    return {best, where};
}

// The sum of e^(z - shift): sixteen-wide within a segment, in double over the segments.
template <typename T>
double sum_of_exponentials(const T* z, int64_t vocab, float shift) {
    double total = 0;
    for (int64_t start = 0; start < vocab; start += SEGMENT) {
        const int64_t count = std::min(SEGMENT, vocab - start);
        floats part[4] = {};
        int64_t i = 0;
        for (; i + 4 * WIDTH <= count; i += 4 * WIDTH)
            for (int u = 0; u < 4; u++) part[u] += exp(load(z + start + i + u * WIDTH) - shift);
        for (; i < count; i += WIDTH) part[0] += first(exp(load(z + start + i, count - i) - shift), count - i);
        total += sum((part[0] + part[1]) + (part[2] + part[3]));
    }
    return total;
}

template <typename T>
float row(T* z, int64_t vocab, int64_t target, float weight, float l2_wrap, bool wants) {
    const Largest top = largest(z, vocab);
    const double total = sum_of_exponentials(z, vocab, top.value);
    const float aim = value(z + target);
    const float nll = float(std::log(total) - (aim - top.value));
    if (!wants) return nll;
    const float scale = float(weight / total);
    int64_t i = 0;
    for (; i + WIDTH <= vocab; i += WIDTH) store(z + i, exp(load(z + i) - top.value) * scale);
    if (i < vocab) store(z + i, exp(load(z + i, vocab - i) - top.value) * scale, vocab - i);
    // These two are made anew, not changed: a bfloat16 p near 1 has rounded away most of 1 - p.
    const auto remake = [&](int64_t at, float logit) {
        float dz = exp(fill(logit - top.value))[0] * scale;
        if (at == target) dz -= weight;
        if (at == top.at) dz += weight * l2_wrap * top.value;
        put(z + at, dz);
    };
    remake(target, aim);
    remake(top.at, top.value);
    return nll;
}

}  // namespace

// z: (rows, V) contiguous, becomes its gradient if that is wanted. targets in [0, V). weights: (rows,), or null for 1.
// nll: (rows,), not weighted.
struct HeadLoss {
    void* z;
    const int64_t* targets;
    const float* weights;
    float* nll;
    int64_t rows, vocab;
    double l2_wrap;
    int64_t z_is_bf16, wants, threads;
};

extern "C" void rwkv_head_loss(const HeadLoss* f) {
    with_type(f->z_is_bf16, f->z, [&](auto* z) {
#pragma omp parallel for num_threads(std::min(f->threads, f->rows)) schedule(dynamic, 1)
        for (int64_t r = 0; r < f->rows; r++)
            f->nll[r] = row(z + r * f->vocab, f->vocab, f->targets[r], f->weights ? f->weights[r] : 1.0f, float(f->l2_wrap), f->wants);
    });
}

// Asks for large pages in memory that is new. The kernel fills the first touch of each page with zeros: of 64 MB in pages of
// 4096 bytes that takes three times as long as the writing itself.
struct LargePages {
    char* p;
    int64_t size;
};

extern "C" void rwkv_large_pages(const LargePages* f) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t LARGE = uintptr_t(1) << 21;
    const uintptr_t start = (uintptr_t(f->p) + LARGE - 1) / LARGE * LARGE, end = (uintptr_t(f->p) + f->size) / LARGE * LARGE;
    if (end > start) madvise(reinterpret_cast<void*>(start), end - start, MADV_HUGEPAGE);
#else
    (void)f;
#endif
}
