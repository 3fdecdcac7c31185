// What channel mixing does between its matrices.

#include <algorithm>
#include <limits>

#include "simd.h"

namespace {

// Below this many values a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 14;

int64_t crew(int64_t threads, int64_t values) { return std::max<int64_t>(1, std::min(threads, values / WORTH_A_THREAD)); }

template <typename X>
const X* like(X*, const void* p) {
    return static_cast<const X*>(p);
}

// Square roots of x >= 0, by Newton's steps from a guess at 1 / sqrt(x): the C library's function, which may set errno, keeps
// compilers from taking sixteen at once.
INLINE floats root(floats x) {
    x = min(x, fill(std::numeric_limits<float>::max()));
    floats y = by_parts(x, [](part a) { return (part)(0x5f3759df - ((part_words)a >> 1)); });
    for (int step = 0; step < 3; step++) y *= 1.5f - 0.5f * x * y * y;
    return x * y;
}

}  // namespace

// x and y of `size` values, of one type; y may be x.
struct ReluSquared {
    const void* x;
    void* y;
    int64_t size, is_bf16, threads;
};

extern "C" void rwkv_relu_squared(const ReluSquared* f) {
    with_type(f->is_bf16, f->y, [&](auto* y) {
        const auto* const x = like(y, f->x);
#pragma omp parallel for num_threads(crew(f->threads, f->size)) schedule(static)
        for (int64_t i = 0; i < f->size; i += WIDTH) {
            floats value = load(x + i, f->size - i);
            value = max(value, floats{});
            store(y + i, value * value, f->size - i);
        }
    });
}

// y of the above, its gradient dy, and that of x: all of `size` values, of one type.
struct ReluSquaredBackward {
    const void *y, *dy;
    void* dx;
    int64_t size, is_bf16, threads;
};

extern "C" void rwkv_relu_squared_backward(const ReluSquaredBackward* f) {
    with_type(f->is_bf16, f->dx, [&](auto* dx) {
        const auto *const y = like(dx, f->y), *const dy = like(dx, f->dy);
#pragma omp parallel num_threads(crew(f->threads, f->size))
        {
            const Flush flush;
#pragma omp for schedule(static)
            for (int64_t i = 0; i < f->size; i += WIDTH) {
                const int64_t n = f->size - i;
                store(dx + i, 2.0f * load(dy + i, n) * root(load(y + i, n)), n);
            }
        }
    });
}
