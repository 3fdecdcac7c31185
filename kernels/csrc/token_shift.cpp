// Token shift with the layer norm before it: each token and the one before, mixed once for each of the matrices that follow.
// The equations, and those of the backward, are in kernels/token_shift.py.

#include "rows7.h"

constexpr int64_t MOST = 6;  // mixes

// x (B, T, C); last, final (B, C): the token before the first, and the last one, normed: all of one type. z: up to 6 of
// (B, T, C), of one type. statistics (B, T) or null. mu: as many as z, of C values, weight and bias C values or null for no norm:
// all of one type.
struct Mix {
    const void *x, *last;
    void *z[MOST], *final;
    Statistics* statistics;
    const void *mu[MOST], *weight, *bias;
    double epsilon;
    int64_t mixes, batch, steps, size, x_is_bf16, z_is_bf16, p_is_bf16, threads;
};

// All as above; the gradients of parameters in float32, dmus (mixes, C), or null where they are not wanted.
struct MixBackward {
    const void *dz[MOST], *dfinal, *x, *last;
    const Statistics* statistics;
    const void *mu[MOST], *weight, *bias;
    void *dx, *dlast;
    float *dmus, *dweight, *dbias;
    int64_t mixes, batch, steps, size, x_is_bf16, z_is_bf16, p_is_bf16, threads;
};

namespace {

constexpr int64_t TOKENS = 16;  // done by one thread in a row; the token at the border is done once more

// Gradients of parameters are summed over so many parts of the tokens first, however many threads there are.
constexpr int64_t PARTS = 64;

template <typename X, typename Z, typename P>
void mix_all(const Mix& f, const X* x, const Z*, const P*) {
    const int64_t size = f.size, padded = round_up(size), blocks = (f.steps + TOKENS - 1) / TOKENS;
    const P *const weight = static_cast<const P*>(f.weight), *const bias = static_cast<const P*>(f.bias);
    const X* const last = static_cast<const X*>(f.last);
    X* const final = static_cast<X*>(f.final);
    Z* z[MOST];
    const P* mu[MOST];
    for (int64_t m = 0; m < f.mixes; m++) z[m] = static_cast<Z*>(f.z[m]), mu[m] = static_cast<const P*>(f.mu[m]);
    const auto copy = [&](const X* row, float* to) {
        for (int64_t i = 0; i < size; i += WIDTH) store(to + i, load(row + i, size - i));
    };
    const auto normed = [&](int64_t row, float* to) {
        if (weight) return norm(x + row * size, weight, bias, size, float(f.epsilon), to);
        copy(x + row * size, to);
        return Statistics{};
    };
#pragma omp parallel for num_threads(std::max<int64_t>(1, std::min(f.threads, f.batch * blocks))) schedule(static)
    for (int64_t item = 0; item < f.batch * blocks; item++) {
        const int64_t b = item / blocks, start = item % blocks * TOKENS, end = std::min(start + TOKENS, f.steps);
        const Buffer scratch = buffer(2 * padded);
        float *now = scratch.get(), *before = now + padded;
        if (start)
            normed(b * f.steps + start - 1, before);
        else
            copy(last + b * size, before);
        for (int64_t t = start; t < end; t++, std::swap(now, before)) {
            const int64_t row = b * f.steps + t;
            const Statistics s = normed(row, now);
            if (f.statistics) f.statistics[row] = s;
            mix(now, before, size, f.mixes, mu, z, row * size);
        }
        if (end == f.steps)
            for (int64_t i = 0; i < size; i += WIDTH) store(final + b * size + i, load(before + i), size - i);
    }
}

INLINE void add(float* to, floats x) { store(to, load(to) + x); }

template <typename X, typename Z, typename P>
void mix_backward_all(const MixBackward& f, const X* x, const Z*, const P*) {
    const int64_t size = f.size, padded = round_up(size), blocks = (f.steps + TOKENS - 1) / TOKENS;
    const P *const weight = static_cast<const P*>(f.weight), *const bias = static_cast<const P*>(f.bias);
    const X *const last = static_cast<const X*>(f.last), *const dfinal = static_cast<const X*>(f.dfinal);
    X *const dx = static_cast<X*>(f.dx), *const dlast = static_cast<X*>(f.dlast);
    const Z* dz[MOST];
    const P* mu[MOST];
    for (int64_t m = 0; m < f.mixes; m++) dz[m] = static_cast<const Z*>(f.dz[m]), mu[m] = static_cast<const P*>(f.mu[m]);
    // rows of sums: the mixes', then the weight's and the bias's
    const int64_t of_mus = f.dmus ? f.mixes : 0, sums = of_mus + (f.dweight ? 2 : 0);
    const int64_t items = f.batch * blocks, parts = sums ? std::min(PARTS, items) : items;
    const Buffer totals = buffer(parts * sums * padded);

    const auto normed = [&](int64_t row, int64_t i) {
        const floats value = load(x + row * size + i, size - i);
        if (!weight) return value;
        const Statistics s = f.statistics[row];
        return (value - s.mean) * s.scale * load(weight + i, size - i) + load(bias + i, size - i);
    };
    // One token. `after` holds what the token behind it asks of this one, and is left with what this one asks of the one before.
    const auto token = [&](int64_t b, int64_t t, float* after, float* dn, float* sum_of) {
        const int64_t row = b * f.steps + t, at = row * size;
        const Statistics s = weight ? f.statistics[row] : Statistics{};
        floats total{}, along{};
        for (int64_t i = 0; i < size; i += WIDTH) {
            const int64_t n = size - i;
            floats all{}, passed{};
            for (int64_t m = 0; m < f.mixes; m++) {
                const floats g = load(dz[m] + at + i, n);
                all += g;
                passed += g * load(mu[m] + i, n);
            }
            const floats own = all - passed + load(after + i);
            store(after + i, passed);
            if (of_mus) {
                const floats change = (t ? normed(row - 1, i) : load(last + b * size + i, n)) - normed(row, i);
                for (int64_t m = 0; m < f.mixes; m++) add(sum_of + m * padded + i, load(dz[m] + at + i, n) * change);
            }
            if (!weight) {
                store(dx + at + i, own, n);
                continue;
            }
            const floats value = (load(x + at + i, n) - s.mean) * s.scale, scaled = own * load(weight + i, n);
            store(dn + i, scaled);
            total += scaled;
            along += scaled * value;
            if (sums > of_mus) {
                add(sum_of + of_mus * padded + i, own * value);
                add(sum_of + (of_mus + 1) * padded + i, own);
            }
        }
        if (!weight) return;
        const float mean = sum(total) / size, slope = sum(along) / size;
        for (int64_t i = 0; i < size; i += WIDTH) {
            const floats value = (load(x + at + i, size - i) - s.mean) * s.scale;
            store(dx + at + i, (load(dn + i) - mean - value * slope) * s.scale, size - i);
        }
    };

#pragma omp parallel num_threads(std::max<int64_t>(1, std::min(f.threads, parts)))
    {
        const Buffer scratch = buffer((2 + sums) * padded);
        float *const after = scratch.get(), *const dn = after + padded, *const block = dn + padded;
#pragma omp for schedule(static)
        for (int64_t part = 0; part < parts; part++) {
            float* const total = totals.get() + part * sums * padded;
            std::fill_n(total, sums * padded, 0.0f);
            for (int64_t item = part * items / parts; item < (part + 1) * items / parts; item++) {
                const int64_t b = item / blocks, start = item % blocks * TOKENS, end = std::min(start + TOKENS, f.steps);
                for (int64_t i = 0; i < size; i += WIDTH) {
                    floats asked{};
                    if (end == f.steps)
                        asked = load(dfinal + b * size + i, size - i);
                    else
                        for (int64_t m = 0; m < f.mixes; m++)
                            asked += load(dz[m] + (b * f.steps + end) * size + i, size - i) * load(mu[m] + i, size - i);
                    store(after + i, asked);
                }
                std::fill_n(block, sums * padded, 0.0f);
                for (int64_t t = end; t-- > start;) token(b, t, after, dn, block);
                for (int64_t i = 0; i < sums * padded; i += WIDTH) add(total + i, load(block + i));
                if (start == 0)
                    for (int64_t i = 0; i < size; i += WIDTH) store(dlast + b * size + i, load(after + i), size - i);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < sums * padded; i += WIDTH) {
            floats total{};
            for (int64_t part = 0; part < parts; part++) total += load(totals.get() + part * sums * padded + i);
            const int64_t row = i / padded, column = i % padded;
            float* const to = row < of_mus ? f.dmus + row * size : row == of_mus ? f.dweight : f.dbias;
            store(to + column, total, size - column);
        }
    }
}

// Calls run with pointers of the types of x, the mixes and the parameters. No mix is wider than x.
template <typename F, typename G>
void by_type(const F& f, const void* z, G run) {
    with_type(f.x_is_bf16, f.x, [&](auto* x) {
        with_type(f.z_is_bf16, z, [&](auto* mixed) {
            if constexpr (sizeof(*mixed) <= sizeof(*x))
                with_type(f.p_is_bf16, f.mu[0], [&](auto* parameter) { run(x, mixed, parameter); });
        });
    });
}

}  // namespace

extern "C" void rwkv_mix(const Mix* f) {
    by_type(*f, f->z[0], [&](auto* x, auto* z, auto* mu) { mix_all(*f, x, z, mu); });
}

extern "C" void rwkv_mix_backward(const MixBackward* f) {
    by_type(*f, f->dz[0], [&](auto* x, auto* z, auto* mu) { mix_backward_all(*f, x, z, mu); });
}
