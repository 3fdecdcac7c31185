// The parts of RWKV-7's time mixing before and after the recurrence, and of its channel mixing between the matrices.

#include "rows7.h"

namespace {

// Below this many values a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 14;

int64_t crew(int64_t threads, int64_t values) { return std::max<int64_t>(1, std::min(threads, values / WORTH_A_THREAD)); }

}  // namespace

// All (rows, H, N) of one type, v_first and v_raw null in layer 0; k_k, k_a (H, N) of one type.
struct Prepare {
    const void *k0, *v0, *v_first, *a_raw, *v_raw, *k_k, *k_a;
    void *k, *v, *a, *b;
    int64_t rows, heads, size, x_is_bf16, p_is_bf16, threads;
};

extern "C" void rwkv_prepare7(const Prepare* f) {
    with_type(f->x_is_bf16, f->k0, [&](auto* k0) {
        with_type(f->p_is_bf16, f->k_k, [&](auto* k_k) {
            using X = std::remove_const_t<std::remove_pointer_t<decltype(k0)>>;
            const auto in = [&](const void* p, int64_t i) { return p ? static_cast<const X*>(p) + i : nullptr; };
            const auto out = [&](void* p, int64_t i) { return static_cast<X*>(p) + i; };
            const auto* const k_a = static_cast<decltype(k_k)>(f->k_a);
            const int64_t n = f->size, all = f->rows * f->heads;
#pragma omp parallel for num_threads(crew(f->threads, all * n)) schedule(static)
            for (int64_t h = 0; h < all; h++) {
                const int64_t i = h * n, p = h % f->heads * n;
                prepare(n, k0 + i, in(f->v0, i), in(f->v_first, i), in(f->a_raw, i), in(f->v_raw, i), k_k + p, k_a + p,
                        out(f->k, i), out(f->v, i), out(f->a, i), out(f->b, i));
            }
        });
    });
}

// y to g and out (rows, H, N) of one type; weight, bias, r_k (H, N) of one type.
struct Readout {
    const void *y, *r, *k, *v, *g, *weight, *bias, *r_k;
    void* out;
    double epsilon;
    int64_t rows, heads, size, x_is_bf16, p_is_bf16, threads;
};

extern "C" void rwkv_readout7(const Readout* f) {
    with_type(f->x_is_bf16, f->y, [&](auto* y) {
        with_type(f->p_is_bf16, f->weight, [&](auto* weight) {
            using X = decltype(y);
            using P = decltype(weight);
            auto *const r = static_cast<X>(f->r), *const k = static_cast<X>(f->k), *const v = static_cast<X>(f->v),
                       *const g = static_cast<X>(f->g);
            auto *const bias = static_cast<P>(f->bias), *const r_k = static_cast<P>(f->r_k);
            auto* const out = static_cast<std::remove_const_t<std::remove_pointer_t<X>>*>(f->out);
            const int64_t n = f->size, all = f->rows * f->heads;
#pragma omp parallel for num_threads(crew(f->threads, all * n)) schedule(static)
            for (int64_t h = 0; h < all; h++) {
                const int64_t i = h * n, p = h % f->heads * n;
                readout(n, y + i, r + i, k + i, v + i, g + i, weight + p, bias + p, r_k + p, float(f->epsilon), out + i);
            }
        });
    });
}

struct Values {
    void* x;
    int64_t size, is_bf16, threads;
};

extern "C" void rwkv_relu_squared(const Values* f) {
    with_type(f->is_bf16, f->x, [&](auto* x) {
#pragma omp parallel for num_threads(crew(f->threads, f->size)) schedule(static)
        for (int64_t i = 0; i < f->size; i += WIDTH) store(x + i, relu_squared(load(x + i, f->size - i)), f->size - i);
    });
}
