// WKV-4 step by step: forward, and backward from the states kept every CHUNK steps. The equations are in kernels/wkv4.py.
//
// Channels never meet: they are the lanes of vectors, and BLOCK of them go through time together, so that the exponentials of one
// vector hide the latency of another's. The sums are held as e^p a and e^p b, and every exponent below is 0 or less: its
// argument is a difference to the larger of two.

#include <algorithm>

#include "simd.h"

namespace {

constexpr int64_t CHUNK = 32;
constexpr int Q = 4;
constexpr int64_t BLOCK = Q * WIDTH;

// e^x of an x of 0 or less; 0 where a float has no such number, so that an empty sum, whose p is -1e38, weighs nothing.
INLINE floats decayed(floats x) {
    return by_parts(x, [](part a) { return a < -87.0f ? part{} : exp_part(a); });
}

struct Shape {
    int64_t batch, steps, channels;
    int64_t chunks() const { return (steps + CHUNK - 1) / CHUNK; }
    int64_t blocks() const { return (channels + BLOCK - 1) / BLOCK; }
};

// A vector of a row of (B, T, C): `n` channels of it are there.
struct Place {
    int64_t at, n;
};

template <typename T>
INLINE floats get(const T* p, Place x) {
    return x.n > 0 ? load(p + x.at, x.n) : floats{};
}

template <typename T>
INLINE void put(T* p, floats value, Place x) {
    if (x.n > 0) store(p + x.at, value, x.n);
}

struct State {
    floats a, b, p;
};

INLINE State get_state(const float* p, int64_t channels, Place x) {
    return {get(p, x), get(p + channels, x), get(p + 2 * channels, x)};
}

INLINE void put_state(float* p, int64_t channels, State s, Place x) {
    put(p, s.a, x), put(p + channels, s.b, x), put(p + 2 * channels, s.p, x);
}

INLINE State advance(State s, floats log_decay, floats k, floats v) {
    const floats p = max(log_decay + s.p, k);
    const floats keep = decayed(log_decay + (s.p - p)), add = decayed(k - p);  // in this order it undoes the rounding of p
    return {keep * s.a + add * v, keep * s.b + add, p};
}

// The average at a step: what it is, its weights' common exponent, and the weight of the step's own value and of all.
struct Average {
    floats y, p, own, all;
};

INLINE Average average(State s, floats u, floats k, floats v) {
    const floats now = u + k, p = max(s.p, now), before = decayed(s.p - p), own = decayed(now - p);
    const floats all = before * s.b + own;
    return {(before * s.a + own * v) / all, p, own, all};
}

// A block of channels of one row of the batch.
struct Block {
    int64_t row, first, left;
    Block(const Shape& s, int64_t i) : row(i / s.blocks()), first(i % s.blocks() * BLOCK), left(s.channels - first) {}
    Place of(int q, int64_t offset) const { return {offset + first + q * WIDTH, left - q * WIDTH}; }
};

template <typename K, typename V>
void forward(const Shape& s, int64_t i, const K* k, const V* v, const float* w, const float* u, const float* state, K* y,
             float* final, float* kept) {
    const Block block(s, i);
    State now[Q];
    floats log_decay[Q], bonus[Q];
    for (int q = 0; q < Q; q++) {
        now[q] = get_state(state + block.row * 3 * s.channels, s.channels, block.of(q, 0));
        log_decay[q] = -exp(get(w, block.of(q, 0)));
        bonus[q] = get(u, block.of(q, 0));
    }
    for (int64_t t = 0; t < s.steps; t++) {
        const int64_t row = (block.row * s.steps + t) * s.channels;
        float* const keep = kept && t % CHUNK == 0 ? kept + (block.row * s.chunks() + t / CHUNK) * 3 * s.channels : nullptr;
        for (int q = 0; q < Q; q++) {
            const Place place = block.of(q, row);
            if (keep) put_state(keep, s.channels, now[q], block.of(q, 0));
            const floats key = get(k, place), value = get(v, place);
            put(y, average(now[q], bonus[q], key, value).y, place);
            now[q] = advance(now[q], log_decay[q], key, value);
        }
    }
    for (int q = 0; q < Q; q++)
        put_state(final + block.row * 3 * s.channels, s.channels, now[q], block.of(q, 0));
}

// The gradients of the sums, as e^p a and e^p b: p is the common exponent of what they are made of.
template <typename K, typename V>
void backward(const Shape& s, int64_t i, const K* k, const V* v, const float* w, const float* u, const float* kept, const K* dy,
              const float* dfinal, K* dk, V* dv, float* dw, float* du, float* dstate) {
    const Block block(s, i);
    const Buffer scratch = buffer(CHUNK * Q * 3 * WIDTH);
    State grad[Q];
    floats log_decay[Q], bonus[Q], of_decay[Q] = {}, of_bonus[Q] = {};
    for (int q = 0; q < Q; q++) {
        log_decay[q] = -exp(get(w, block.of(q, 0)));
        bonus[q] = get(u, block.of(q, 0));
        grad[q] = get_state(dfinal + block.row * 3 * s.channels, s.channels, block.of(q, 0));
    }
    for (int64_t chunk = s.chunks() - 1; chunk >= 0; chunk--) {
        const int64_t start = chunk * CHUNK, steps = std::min(CHUNK, s.steps - start);
        const float* const keep = kept + (block.row * s.chunks() + chunk) * 3 * s.channels;
        const auto row = [&](int64_t t) { return (block.row * s.steps + start + t) * s.channels; };
        const auto at = [&](int64_t t, int q) { return scratch.get() + (t * Q + q) * 3 * WIDTH; };
        State now[Q];
        for (int q = 0; q < Q; q++) now[q] = get_state(keep, s.channels, block.of(q, 0));
        for (int64_t t = 0; t < steps; t++)
            for (int q = 0; q < Q; q++) {
                const Place place = block.of(q, row(t));
                put_state(at(t, q), WIDTH, now[q], {0, WIDTH});
                now[q] = advance(now[q], log_decay[q], get(k, place), get(v, place));
            }
        if (chunk == s.chunks() - 1)
            for (int q = 0; q < Q; q++) grad[q].p = -now[q].p;
        floats chunk_decay[Q] = {}, chunk_bonus[Q] = {};  // a sum of sums is more exact than one of all steps
        for (int64_t t = steps - 1; t >= 0; t--)
            for (int q = 0; q < Q; q++) {
                const Place place = block.of(q, row(t));
                const State before = get_state(at(t, q), WIDTH, {0, WIDTH});
                const floats key = get(k, place), value = get(v, place);
                const Average mean = average(before, bonus[q], key, value);
                const floats through_state = decayed(key + grad[q].p);
                const floats g = get(dy, place) / mean.all, through_y = g * mean.own;
                const floats of_now = through_y * (value - mean.y);
                put(dk, through_state * (grad[q].a * value + grad[q].b) + of_now, place);
                put(dv, through_state * grad[q].a + through_y, place);
                chunk_bonus[q] += of_now;
                chunk_decay[q] +=
                    decayed(log_decay[q] + (before.p + grad[q].p)) * (grad[q].a * before.a + grad[q].b * before.b);
                const floats p = max(log_decay[q] + grad[q].p, -mean.p);
                const floats past = decayed(log_decay[q] + (grad[q].p - p)), here = decayed(-mean.p - p) * g;
                grad[q] = {past * grad[q].a + here, past * grad[q].b - here * mean.y, p};
            }
        for (int q = 0; q < Q; q++) of_decay[q] += chunk_decay[q], of_bonus[q] += chunk_bonus[q];
    }
    for (int q = 0; q < Q; q++) {
        const Place place = block.of(q, 0), sums = block.of(q, block.row * s.channels);
        const floats unit = decayed(grad[q].p + get(kept + (block.row * s.chunks() * 3 + 2) * s.channels, place));
        put_state(dstate + block.row * 3 * s.channels, s.channels, {unit * grad[q].a, unit * grad[q].b, floats{}}, place);
        put(dw, of_decay[q] * log_decay[q], sums);
        put(du, of_bonus[q], sums);
    }
}

}  // namespace

// k, v, y: (B, T, C) contiguous, k and y of one dtype, float32 or bfloat16. w, u: (C,) float32. state, final: (B, 3, C) float32.
// kept: (B, chunks, 3, C) float32, the states before steps 0, 32, ...; null if nobody will ask.
struct Wkv4Forward {
    const void *k, *v;
    const float *w, *u, *state;
    void* y;
    float *final, *kept;
    Shape shape;
    int64_t k_is_bf16, v_is_bf16, threads;
};

extern "C" void rwkv_wkv4_forward(const Wkv4Forward* f) {
    const Shape s = f->shape;
#pragma omp parallel for num_threads(f->threads) schedule(static)
    for (int64_t i = 0; i < s.batch * s.blocks(); i++)
        with_type(f->k_is_bf16, f->k, [&](auto* k) {
            with_type(f->v_is_bf16, f->v, [&](auto* v) {
                using K = std::remove_const_t<std::remove_pointer_t<decltype(k)>>;
                forward(s, i, k, v, f->w, f->u, f->state, static_cast<K*>(f->y), f->final, f->kept);
            });
        });
}

// dy, dk: like k; dv: like v. dw, du: (B, C) float32, a row's share. dfinal, dstate: like state.
struct Wkv4Backward {
    const void *k, *v;
    const float *w, *u, *kept;
    const void* dy;
    const float* dfinal;
    void *dk, *dv;
    float *dw, *du, *dstate;
    Shape shape;
    int64_t k_is_bf16, v_is_bf16, threads;
};

extern "C" void rwkv_wkv4_backward(const Wkv4Backward* f) {
    const Shape s = f->shape;
#pragma omp parallel for num_threads(f->threads) schedule(static)
    for (int64_t i = 0; i < s.batch * s.blocks(); i++)
        with_type(f->k_is_bf16, f->k, [&](auto* k) {
            with_type(f->v_is_bf16, f->v, [&](auto* v) {
                using K = std::remove_const_t<std::remove_pointer_t<decltype(k)>>;
                using V = std::remove_const_t<std::remove_pointer_t<decltype(v)>>;
                backward(s, i, k, v, f->w, f->u, f->kept, static_cast<const K*>(f->dy), f->dfinal,
                         static_cast<K*>(f->dk), static_cast<V*>(f->dv), f->dw, f->du, f->dstate);
            });
        });
}
