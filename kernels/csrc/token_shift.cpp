// Token shift with the layer norm before it: each token and the one before, mixed once for each of the matrices that follow.

#include "rows7.h"

namespace {

constexpr int64_t TOKENS = 16;  // done by one thread in a row; the token before the first is normed once more

template <typename X, typename P, typename F>
void mix_all(const F& f, const X* x, const P* const* mu) {
    const int64_t size = f.size, padded = round_up(size), blocks = (f.steps + TOKENS - 1) / TOKENS;
    const X* const last = static_cast<const X*>(f.last);
    X *const z = static_cast<X*>(f.z), *const final = static_cast<X*>(f.final);
    const auto read = [&](const X* row, float* to) {
        if (f.weight) return norm(row, static_cast<const P*>(f.weight), static_cast<const P*>(f.bias), size, f.epsilon, to);
        for (int64_t i = 0; i < size; i += WIDTH) store(to + i, load(row + i, size - i));
    };
#pragma omp parallel for num_threads(std::min(f.threads, f.batch * blocks)) schedule(static)
    for (int64_t item = 0; item < f.batch * blocks; item++) {
        const int64_t b = item / blocks, start = item % blocks * TOKENS, end = std::min(start + TOKENS, f.steps);
        const Buffer scratch = buffer(2 * padded);
        float *now = scratch.get(), *before = now + padded;
        const X* const rows = x + b * f.steps * size;
        if (start)
            read(rows + (start - 1) * size, before);
        else
            for (int64_t i = 0; i < size; i += WIDTH) store(before + i, load(last + b * size + i, size - i));
        for (int64_t t = start; t < end; t++, std::swap(now, before)) {
            read(rows + t * size, now);
            mix(now, before, size, f.mixes, mu, z + (b * f.steps + t) * size, f.batch * f.steps * size);
        }
        if (end == f.steps)
            for (int64_t i = 0; i < size; i += WIDTH) store(final + b * size + i, load(before + i), size - i);
    }
}

}  // namespace

// x (B, T, C); last, final (B, C): the token before the first, and the last one, normed; z (mixes, B, T, C): all of one type.
// mu: up to 6 of C values, weight and bias C values or null for no norm: all of one type.
struct Mix {
    const void *x, *last;
    void *z, *final;
    const void *mu[6], *weight, *bias;
    double epsilon;
    int64_t mixes, batch, steps, size, x_is_bf16, p_is_bf16, threads;
};

extern "C" void rwkv_mix(const Mix* f) {
    with_type(f->x_is_bf16, f->x, [&](auto* x) {
        with_type(f->p_is_bf16, f->mu[0], [&](auto* first) {
            decltype(first) mu[6];
            for (int m = 0; m < 6; m++) mu[m] = static_cast<decltype(first)>(f->mu[m]);
            mix_all(*f, x, mu);
        });
    });
}
