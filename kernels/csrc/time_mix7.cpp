// The parts of RWKV-7's time mixing before and after the recurrence.

#include <type_traits>

#include "rows7.h"

namespace {

// Below this many values a second thread costs more than it brings.
constexpr int64_t WORTH_A_THREAD = 1 << 14;

int64_t crew(int64_t threads, int64_t values) { return std::max<int64_t>(1, std::min(threads, values / WORTH_A_THREAD)); }

// So many rows are summed into the gradient of a parameter by one thread, and these sums then in their order: the result is
// the same for any number of threads.
constexpr int64_t SLAB = 16;

// Calls f(row, scratch, sums) for each row of `size` values; scratch is `apart` values of a thread's own, sums is `count` rows
// to add to, or null if count is 0. Each of the `count` totals is written to where it belongs.
template <typename P, typename F>
void for_each_row(int64_t rows, int64_t size, int64_t apart, int64_t threads, int64_t count, P* const* totals, const F& f) {
    const int64_t each = count ? SLAB : 1, slabs = (rows + each - 1) / each, width = round_up(size);
    const Buffer sums = buffer(slabs * count * width);
#pragma omp parallel num_threads(crew(threads, rows * size))
    {
        const Buffer scratch = buffer(apart);
#pragma omp for schedule(static)
        for (int64_t slab = 0; slab < slabs; slab++) {
            float* const own = count ? sums.get() + slab * count * width : nullptr;
            std::fill_n(own, count * width, 0.0f);
            for (int64_t row = slab * each; row < std::min(rows, (slab + 1) * each); row++) f(row, scratch.get(), own);
        }
#pragma omp for schedule(static)
        for (int64_t at = 0; at < count * width; at += WIDTH) {
            double total[WIDTH] = {};
            for (int64_t slab = 0; slab < slabs; slab++)
                for (int l = 0; l < WIDTH; l++) total[l] += sums[slab * count * width + at + l];
            floats rounded;
            for (int l = 0; l < WIDTH; l++) rounded[l] = float(total[l]);
            store(totals[at / width] + at % width, rounded, size - at % width);
        }
    }
}

INLINE void add(float* to, floats x, int64_t n) { store(to, load(to, n) + x, n); }

// sigmoid(x) and sigmoid(-x): 1 - sigmoid(x) has no correct digit left at x = 17.
struct Share {
    floats of, rest;
};

INLINE Share share(floats x) {
    const floats e = exp(-max(x, fill(-80.0f)));  // beyond, the first of the two would not be a normal number
    const floats of = 1.0f / (1.0f + e);
    return {of, e * of};
}

// The backward of `prepare`, for one head of one token. v is what it gave: v_first - v is (v_first - v0) sigmoid(-v_raw), so
// that nobody need keep v0. `scratch` has two rows of floats; dk_k and dk_a are added to, or null.
template <typename X, typename P>
APART void prepare_backward(int64_t n, const X* k0, const X* v_first, const X* a_raw, const X* v_raw, const X* v, const P* k_k,
                            const P* k_a, const X* dk, const X* dv, const X* da, const X* db, float* scratch, X* dk0, X* dv0,
                            X* dv_first, X* da_raw, X* dv_raw, float* dk_k, float* dk_a) {
    float *const rates = scratch, *const rests = scratch + round_up(n);
    floats square{}, inner{};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const int64_t count = n - i;
        const floats u = load(k0 + i, count) * load(k_k + i, count);
        const Share rate = share(load(a_raw + i, count));
        store(rates + i, rate.of);
        store(rests + i, rate.rest);
        square += u * u;
        inner += u * (load(db + i, count) * rate.of - load(da + i, count));
    }
    const float length = std::sqrt(sum(square)), scale = 1 / std::max(length, 1e-12f);
    const float along = length < 1e-12f ? 0.0f : sum(inner) * scale;  // kappa is u scaled by a constant where u is that short
    for (int64_t i = 0; i < n; i += WIDTH) {
        const int64_t count = n - i;
        const floats key = load(k0 + i, count), direction = load(k_k + i, count), replace = load(k_a + i, count);
        const floats kappa = key * direction * scale, rate = load(rates + i), rest = load(rests + i);
        const floats gk = load(dk + i, count), gb = load(db + i, count);
        const floats du = (rate * gb - load(da + i, count) - kappa * along) * scale;
        store(dk0 + i, gk * (1.0f - rest * replace) + du * direction, count);
        store(da_raw + i, (gk * key * replace + gb * kappa) * rate * rest, count);
        if (dk_k) {
            add(dk_k + i, du * key, count);
            add(dk_a + i, -gk * key * rest, count);
        }
        const floats gv = load(dv + i, count);
        if (v_first) {
            const Share first = share(load(v_raw + i, count));
            store(dv0 + i, gv * first.rest, count);
            store(dv_first + i, gv * first.of, count);
            store(dv_raw + i, gv * (load(v_first + i, count) - load(v + i, count)) * first.of, count);
        } else {
            store(dv0 + i, gv, count);
        }
    }
}

// The backward of `readout`, for one head of one token. `scratch` as before; dweight, dbias, dr_k are added to, or null.
template <typename X, typename P>
APART void readout_backward(int64_t n, const X* y, const X* r, const X* k, const X* v, const X* g, const P* weight,
                            const P* bias, const P* r_k, float epsilon, const X* dout, float* scratch, X* dy, X* dr, X* dk,
                            X* dv, X* dg, float* dweight, float* dbias, float* dr_k) {
    float *const given = scratch, *const centred = scratch + round_up(n);
    floats total{}, bonus{}, dbonus{};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const int64_t count = n - i;
        const floats value = load(y + i, count), q = load(dout + i, count) * load(g + i, count);
        store(centred + i, value);
        store(given + i, q);
        total += value;
        bonus += load(r + i, count) * load(k + i, count) * load(r_k + i, count);
        dbonus += q * load(v + i, count);
    }
    const float mean = sum(total) / n, along = sum(bonus), dalong = sum(dbonus);
    floats square{}, sum_d{}, sum_dx{};
    for (int64_t i = 0; i < n; i += WIDTH) {
        const floats value = first(load(centred + i) - mean, n - i), d = load(given + i) * load(weight + i, n - i);
        store(centred + i, value);
        square += value * value;
        sum_d += d;
        sum_dx += d * value;
    }
    const float scale = 1 / std::sqrt(sum(square) / n + epsilon);
    const float mean_d = sum(sum_d) / n, mean_dx = sum(sum_dx) * scale / n;
    for (int64_t i = 0; i < n; i += WIDTH) {
        const int64_t count = n - i;
        const floats q = load(given + i), normed = load(centred + i) * scale, gamma = load(weight + i, count);
        const floats value = load(v + i, count), key = load(k + i, count), read = load(r + i, count);
        const floats rho = load(r_k + i, count);
        store(dg + i, load(dout + i, count) * (normed * gamma + load(bias + i, count) + along * value), count);
        store(dy + i, scale * (q * gamma - mean_d - normed * mean_dx), count);
        store(dv + i, along * q, count);
        store(dr + i, dalong * key * rho, count);
        store(dk + i, dalong * read * rho, count);
        if (dweight) {
            add(dweight + i, q * normed, count);
            add(dbias + i, q, count);
            add(dr_k + i, dalong * read * key, count);
        }
    }
}

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

// As above; v is what the forward gave, null in layer 0 as are v_first, v_raw and their gradients. dk_k and dk_a, of k_k's
// type, are null where nobody asks.
struct PrepareBackward {
    const void *k0, *v_first, *a_raw, *v_raw, *v, *k_k, *k_a, *dk, *dv, *da, *db;
    void *dk0, *dv0, *dv_first, *da_raw, *dv_raw, *dk_k, *dk_a;
    int64_t rows, heads, size, x_is_bf16, p_is_bf16, threads;
};

extern "C" void rwkv_prepare7_backward(const PrepareBackward* f) {
    with_type(f->x_is_bf16, f->dk0, [&](auto* dk0) {
        with_type(f->p_is_bf16, f->k_k, [&](auto* k_k) {
            using X = std::remove_pointer_t<decltype(dk0)>;
            using P = std::remove_const_t<std::remove_pointer_t<decltype(k_k)>>;
            const auto in = [&](const void* p, int64_t i) { return p ? static_cast<const X*>(p) + i : nullptr; };
            const auto out = [&](void* p, int64_t i) { return p ? static_cast<X*>(p) + i : nullptr; };
            const auto* const k_a = static_cast<const P*>(f->k_a);
            P* const totals[] = {static_cast<P*>(f->dk_k), static_cast<P*>(f->dk_a)};
            const int64_t n = f->size, size = f->heads * n, width = round_up(size);
            const auto one = [&](int64_t row, float* scratch, float* sums) {
                for (int64_t p = 0, i = row * size; p < size; p += n, i += n)
                    prepare_backward(n, in(f->k0, i), in(f->v_first, i), in(f->a_raw, i), in(f->v_raw, i), in(f->v, i), k_k + p,
                                     k_a + p, in(f->dk, i), in(f->dv, i), in(f->da, i), in(f->db, i), scratch, dk0 + i,
                                     out(f->dv0, i), out(f->dv_first, i), out(f->da_raw, i), out(f->dv_raw, i),
                                     sums ? sums + p : nullptr, sums ? sums + width + p : nullptr);
            };
            for_each_row(f->rows, size, 2 * round_up(n), f->threads, f->dk_k ? 2 : 0, totals, one);
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

// As above; dweight, dbias and dr_k, of weight's type, are null where nobody asks.
struct ReadoutBackward {
    const void *y, *r, *k, *v, *g, *weight, *bias, *r_k, *dout;
    void *dy, *dr, *dk, *dv, *dg, *dweight, *dbias, *dr_k;
    double epsilon;
    int64_t rows, heads, size, x_is_bf16, p_is_bf16, threads;
};

extern "C" void rwkv_readout7_backward(const ReadoutBackward* f) {
    with_type(f->x_is_bf16, f->dy, [&](auto* dy) {
        with_type(f->p_is_bf16, f->weight, [&](auto* weight) {
            using X = std::remove_pointer_t<decltype(dy)>;
            using P = std::remove_const_t<std::remove_pointer_t<decltype(weight)>>;
            const auto in = [&](const void* p, int64_t i) { return static_cast<const X*>(p) + i; };
            const auto out = [&](void* p, int64_t i) { return static_cast<X*>(p) + i; };
            const auto *const bias = static_cast<const P*>(f->bias), *const r_k = static_cast<const P*>(f->r_k);
            P* const totals[] = {static_cast<P*>(f->dweight), static_cast<P*>(f->dbias), static_cast<P*>(f->dr_k)};
            const int64_t n = f->size, size = f->heads * n, width = round_up(size);
            const auto one = [&](int64_t row, float* scratch, float* sums) {
                for (int64_t p = 0, i = row * size; p < size; p += n, i += n)
                    readout_backward(n, in(f->y, i), in(f->r, i), in(f->k, i), in(f->v, i), in(f->g, i), weight + p, bias + p,
                                     r_k + p, float(f->epsilon), in(f->dout, i), scratch, dy + i, out(f->dr, i), out(f->dk, i),
                                     out(f->dv, i), out(f->dg, i), sums ? sums + p : nullptr, sums ? sums + width + p : nullptr,
                                     sums ? sums + 2 * width + p : nullptr);
            };
            for_each_row(f->rows, size, 2 * round_up(n), f->threads, f->dweight ? 3 : 0, totals, one);
        });
    });
}
