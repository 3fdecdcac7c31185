// WKV-7 step by step: forward, and backward from the states kept every CHUNK steps. The equations are in kernels/wkv7.py.
//
// A head's state stands as S[key][value]: the values are the lanes of a vector and never meet, so a step has no
// horizontal sum, and any slice of lanes can be worked on alone. One sweep over S makes a step, its output, and what the
// next step will remove. On AVX-512 the arithmetic, five operations for each element of S, is the limit, not memory.
//
// Rows of scratch are padded with zeros to whole vectors. Zeros stay zeros all the way, so any N works.

#include <algorithm>

#include "rows7.h"

namespace {

constexpr int64_t CHUNK = 16;
constexpr int64_t LANES = 64;               // values that are swept together: four vectors and their sums fit the registers

enum Input { R, W, K, V, A, B, INPUTS };

struct Shape {
    int64_t batch, steps, heads, size;
    // A row in scratch: whole vectors, and whole slices of LANES.
    int64_t padded() const { return size < LANES ? round_up(size) : (size + LANES - 1) / LANES * LANES; }
    // Where the row of a step begins in (B, T, H, N).
    int64_t row(int64_t head_of_batch, int64_t step) const {
        return ((head_of_batch / heads * steps + step) * heads + head_of_batch % heads) * size;
    }
    int64_t chunks() const { return (steps + CHUNK - 1) / CHUNK; }
};

struct Inputs {
    const void* data[INPUTS];
    int64_t is_bf16;  // a bit for each
};

// One row of an input, `count` values from `first`, as floats in a padded row.
INLINE void fetch(const Inputs& in, Input which, int64_t first, int64_t count, float* to) {
    with_type(in.is_bf16 >> which & 1, in.data[which], [&](auto* p) {
        for (int64_t i = 0; i < count; i += WIDTH) store(to + i, load(p + first + i, count - i));
    });
}

INLINE void prefetch(const Inputs& in, Input which, int64_t first, int64_t count) {
    with_type(in.is_bf16 >> which & 1, in.data[which], [&](auto* p) {
        for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof *p)) __builtin_prefetch(p + first + i);
    });
}

INLINE void put(void* to, bool is_bf16, int64_t first, int64_t count, const float* from) {
    with_type(is_bf16, to, [&](auto* p) {
        for (int64_t i = 0; i < count; i += WIDTH) store(p + first + i, load(from + i), count - i);
    });
}

// `count` values from `first` on of (N, N), value by key, to S[key][lane] and back.
void enter(const float* state, const Shape& s, int64_t first, int64_t count, float* S, int64_t lanes) {
    std::fill(S, S + s.padded() * lanes, 0.0f);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < s.size; j++) S[j * lanes + i] = state[(first + i) * s.size + j];
}

void leave(const float* S, const Shape& s, int64_t first, int64_t count, float* state, int64_t lanes) {
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = 0; j < s.size; j++) state[(first + i) * s.size + j] = S[j * lanes + i];
}

// What a step reads: rows over the keys.
struct Keys {
    const float *r, *decay, *k, *b;
    const float* next_a;
};

// S a, of which each later step takes what the step before has left in `removed`.
template <int Q>
INLINE void look_up(const float* S, int64_t keys, const float* a, float* removed) {
    floats u[Q] = {};
    for (int64_t j = 0; j < keys; j++)
        for (int q = 0; q < Q; q++) u[q] += load(S + (j * Q + q) * WIDTH) * a[j];
    for (int q = 0; q < Q; q++) store(removed + q * WIDTH, u[q]);
}

template <int Q>
INLINE void advance(const float* from, float* to, int64_t keys, const Keys& x, const float* v, float* removed, float* y) {
    floats u[Q], next[Q] = {}, out[Q] = {}, value[Q];
    for (int q = 0; q < Q; q++) u[q] = load(removed + q * WIDTH), value[q] = load(v + q * WIDTH);
    for (int64_t j = 0; j < keys; j++) {
        const float decay = x.decay[j], k = x.k[j], b = x.b[j], r = x.r[j], a = x.next_a[j];
        for (int q = 0; q < Q; q++) {
            floats s = load(from + (j * Q + q) * WIDTH) * decay;
            s += u[q] * b;
            s += value[q] * k;
            store(to + (j * Q + q) * WIDTH, s);
            out[q] += s * r;
            next[q] += s * a;
        }
    }
    for (int q = 0; q < Q; q++) store(removed + q * WIDTH, next[q]), store(y + q * WIDTH, out[q]);
}

// All steps of `count` values of one head.
template <int Q>
void forward(const Inputs& in, const Shape& s, int64_t head, int64_t first, int64_t count, const float* state, void* y,
             float* final, float* before) {
    constexpr int64_t lanes = Q * WIDTH;
    const int64_t keys = s.padded(), square = s.size * s.size;
    const Buffer scratch = buffer(keys * (lanes + 6));
    float *const S = scratch.get(), *const rows = S + keys * lanes;
    float *const r = rows, *const decay = rows + keys, *const k = rows + 2 * keys, *const b = rows + 3 * keys;
    float *a = rows + 4 * keys, *next_a = rows + 5 * keys;
    alignas(64) float v[lanes] = {}, out[lanes], removed[lanes];
    std::fill(rows, rows + 6 * keys, 0.0f);
    enter(state + head * square, s, first, count, S, lanes);
    fetch(in, A, s.row(head, 0), s.size, a);
    look_up<Q>(S, keys, a, removed);
    for (int64_t t = 0; t < s.steps; t++) {
        if (before && t % CHUNK == 0) {
            float* const kept = before + (head * s.chunks() + t / CHUNK) * square;
            for (int64_t j = 0; j < s.size; j++)
                std::memcpy(kept + j * s.size + first, S + j * lanes, count * sizeof(float));
        }
        const int64_t row = s.row(head, t), ahead = s.row(head, std::min(t + 3, s.steps - 1));
        for (Input which : {R, W, K, V, A, B}) prefetch(in, which, ahead, s.size);
        fetch(in, R, row, s.size, r);
        fetch(in, W, row, s.size, decay);
        squash(decay, keys);
        fetch(in, K, row, s.size, k);
        fetch(in, B, row, s.size, b);
        fetch(in, V, row + first, count, v);
        fetch(in, A, s.row(head, std::min(t + 1, s.steps - 1)), s.size, next_a);
        advance<Q>(S, S, keys, {r, decay, k, b, next_a}, v, removed, out);
        put(y, in.is_bf16 >> R & 1, row + first, count, out);
    }
    leave(S, s, first, count, final + head * square, lanes);
}

// One step of one head whose N is a multiple of 16.
void forward_1(const Inputs& in, const Shape& s, int64_t head, const float* state, void* y, float* final) {
    const int64_t n = s.size, row = s.row(head, 0), square = n * n;
    const Buffer scratch = buffer((INPUTS + 1) * n);
    float* const x = scratch.get();
    for (int i = 0; i < INPUTS; i++) fetch(in, Input(i), row, n, x + i * n);
    squash(x + W * n, n);
    float* const out = x + INPUTS * n;
    step(n, x + R * n, x + W * n, x + K * n, x + V * n, x + A * n, x + B * n, state + head * square, final + head * square, out);
    put(y, in.is_bf16 >> R & 1, row, n, out);
}

// Gradients with respect to what a step reads: rows over the keys, to which each slice of values adds.
struct Gradient {
    float *r, *k, *b, *a;
};

// One sweep over a state S_t and its gradient G, downwards in t. It completes the step above, of which S_t was the state
// before (ABOVE), then takes the step t itself, of which S_t is the state after (AT): S is read once for both.
template <int Q, bool ABOVE, bool AT>
INLINE void sweep(const float* S, float* G, int64_t keys, const float* above_decay, const float* above_a,
                  const float* above_dremoved, float* above_da, const Keys& x, const float* dy, const float* v,
                  const float* removed, float* dv, float* dremoved, const Gradient& d, float* anchor) {
    floats du_above[Q], dout[Q], value[Q], u[Q], dvalue[Q] = {}, du[Q] = {};
    for (int q = 0; q < Q; q++) {
        if (ABOVE) du_above[q] = load(above_dremoved + q * WIDTH);
        if (AT) dout[q] = load(dy + q * WIDTH), value[q] = load(v + q * WIDTH), u[q] = load(removed + q * WIDTH);
    }
    for (int64_t first = 0; first < keys; first += WIDTH) {
        floats da[WIDTH], dr[WIDTH], dk[WIDTH], db[WIDTH], along[WIDTH];
        for (int l = 0; l < WIDTH; l++) {
            const int64_t j = first + l;
            da[l] = dr[l] = dk[l] = db[l] = along[l] = floats{};
            for (int q = 0; q < Q; q++) {
                const floats s = load(S + (j * Q + q) * WIDTH);
                floats g = load(G + (j * Q + q) * WIDTH);
                if (ABOVE) {
                    da[l] += s * du_above[q];
                    g *= above_decay[j];
                    g += du_above[q] * above_a[j];
                }
                if (AT) {
                    g += dout[q] * x.r[j];
                    dr[l] += s * dout[q];
                    dk[l] += g * value[q];
                    db[l] += g * u[q];
                    dvalue[q] += g * x.k[j];
                    du[q] += g * x.b[j];
                    if (!ABOVE) along[l] += g * s;
                }
                store(G + (j * Q + q) * WIDTH, g);
            }
        }
        const auto add = [&](float* to, const floats* parts) { store(to + first, load(to + first) + sums(parts)); };
        if (ABOVE) add(above_da, da);
        if (AT) {
            add(d.r, dr), add(d.k, dk), add(d.b, db);
            if (!ABOVE) add(anchor, along);
        }
    }
    if (AT)
        for (int q = 0; q < Q; q++) store(dv + q * WIDTH, dvalue[q]), store(dremoved + q * WIDTH, du[q]);
}

// A chunk's rows, all of one head: [step][padded keys].
struct Rows {
    float *r, *decay, *k, *v, *a, *b, *dy, *dr, *dk, *dv, *da, *db;
};

// The gradients of one chunk for `Q * 16` values; G, the gradient of the state after it, becomes that of the state before.
template <int Q>
void backward_chunk(const Rows& x, int64_t steps, int64_t keys, int64_t first, float* states, float* removed, float* G,
                    float* anchor) {
    constexpr int64_t lanes = Q * WIDTH;
    const int64_t whole = keys * lanes;
    const auto step = [&](int64_t t) {
        const int64_t at = t * keys;
        return Keys{x.r + at, x.decay + at, x.k + at, x.b + at, x.a + (t + 1 < steps ? at + keys : at)};
    };
    alignas(64) float y[lanes], u[lanes], dremoved[2][lanes];
    look_up<Q>(states, keys, x.a, u);
    for (int64_t t = 0; t < steps; t++) {
        std::memcpy(removed + t * lanes, u, sizeof u);
        advance<Q>(states + t * whole, states + (t + 1) * whole, keys, step(t), x.v + t * keys + first, u, y);
    }
    for (int64_t t = steps - 1; t >= -1; t--) {
        const int64_t at = t * keys, above = at + keys;
        const float *S = states + (t + 1) * whole, *decay = x.decay + above, *a = x.a + above, *above_du = dremoved[(t + 1) & 1];
        const float *dy = x.dy + at + first, *v = x.v + at + first, *u_t = removed + t * lanes;
        float *da = x.da + above, *dv = x.dv + at + first, *du = dremoved[t & 1];
        const Gradient d{x.dr + at, x.dk + at, x.db + at, x.da + at};
        if (t == steps - 1)
            sweep<Q, false, true>(S, G, keys, decay, a, above_du, da, step(t), dy, v, u_t, dv, du, d, anchor);
        else if (t >= 0)
            sweep<Q, true, true>(S, G, keys, decay, a, above_du, da, step(t), dy, v, u_t, dv, du, d, anchor);
        else
            sweep<Q, true, false>(S, G, keys, decay, a, above_du, da, {}, nullptr, nullptr, nullptr, nullptr, nullptr, d, anchor);
    }
}

// The decay's gradient needs no sweep of its own. With S_t = the state after step t and G_t its gradient, let phi_t be the
// sum of G_t * S_t over the values, known at the chunk's end. Then d log(decay_t) = phi_t - b db - k dk, and phi_{t-1} is that
// plus a da + r_{t-1} dr_{t-1}. In place of the chunk's decays: the gradients of the raw ones.
void decay_gradient(const Inputs& in, const Shape& s, const Rows& x, int64_t head, int64_t start, int64_t steps, float* phi) {
    const int64_t keys = s.padded();
    for (int64_t t = steps - 1; t >= 0; t--) {
        const int64_t at = t * keys;
        float* const raw = x.decay + at;
        fetch(in, W, s.row(head, start + t), s.size, raw);
        for (int64_t j = 0; j < keys; j += WIDTH) {
            const auto product = [&](float* p, float* q, int64_t row) { return load(p + row + j) * load(q + row + j); };
            floats dlog = load(phi + j) - product(x.b, x.db, at);
            dlog -= product(x.k, x.dk, at);
            floats next = dlog + product(x.a, x.da, at);
            if (t > 0) next += product(x.r, x.dr, at - keys);
            store(phi + j, next);
            const floats w = load(raw + j);  // sigmoid(-w), for 1 - sigmoid(w) has no correct digit left at w = 17
            store(raw + j, dlog * LOG_DECAY_MIN * sigmoid(w) * sigmoid(-w));
        }
    }
}

void backward(const Inputs& in, const Shape& s, int64_t head, const float* before, const void* dy, const float* dfinal,
              void* const* grads, float* dstate) {
    const int64_t keys = s.padded(), slices = (s.size + LANES - 1) / LANES, square = s.size * s.size;
    const int64_t lanes = std::min(keys, LANES);
    const Buffer rows = buffer(12 * CHUNK * keys), states = buffer((CHUNK + 1) * keys * lanes), removed = buffer(CHUNK * lanes);
    const Buffer G = buffer(slices * keys * lanes), anchor = buffer(keys);
    float* row[12];
    for (int i = 0; i < 12; i++) row[i] = rows.get() + i * CHUNK * keys;
    const Rows x{row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9], row[10], row[11]};
    float* const inputs[INPUTS] = {x.r, x.decay, x.k, x.v, x.a, x.b};
    float* const gradients[INPUTS] = {x.dr, x.decay, x.dk, x.dv, x.da, x.db};
    const Inputs cotangent{{dy}, in.is_bf16 & 1};
    std::fill(rows.get(), rows.get() + 12 * CHUNK * keys, 0.0f);
    const auto count = [&](int64_t slice) { return std::min(lanes, s.size - slice * lanes); };
    for (int64_t i = 0; i < slices; i++)
        enter(dfinal + head * square, s, i * lanes, count(i), G.get() + i * keys * lanes, lanes);
    for (int64_t chunk = s.chunks() - 1; chunk >= 0; chunk--) {
        const int64_t start = chunk * CHUNK, steps = std::min(CHUNK, s.steps - start);
        for (int64_t t = 0; t < steps; t++) {
            const int64_t from = s.row(head, start + t);
            for (int i = 0; i < INPUTS; i++) fetch(in, Input(i), from, s.size, inputs[i] + t * keys);
            fetch(cotangent, R, from, s.size, x.dy + t * keys);
            squash(x.decay + t * keys, keys);
        }
        std::fill(x.dr, x.dr + 5 * CHUNK * keys, 0.0f);
        std::fill(anchor.get(), anchor.get() + keys, 0.0f);
        for (int64_t i = 0; i < slices; i++) {
            const float* const kept = before + (head * s.chunks() + chunk) * square + i * lanes;
            std::fill(states.get(), states.get() + keys * lanes, 0.0f);
            for (int64_t j = 0; j < s.size; j++)
                std::memcpy(states.get() + j * lanes, kept + j * s.size, count(i) * sizeof(float));
            float* const g = G.get() + i * keys * lanes;
            const auto run = [&](auto f) { f(x, steps, keys, i * lanes, states.get(), removed.get(), g, anchor.get()); };
            switch (lanes / WIDTH) {
                case 1: run(backward_chunk<1>); break;
                case 2: run(backward_chunk<2>); break;
                case 3: run(backward_chunk<3>); break;
                default: run(backward_chunk<4>);
            }
        }
        decay_gradient(in, s, x, head, start, steps, anchor.get());
        for (int64_t t = 0; t < steps; t++)
            for (int i = 0; i < INPUTS; i++)
                put(grads[i], in.is_bf16 >> i & 1, s.row(head, start + t), s.size, gradients[i] + t * keys);
    }
    for (int64_t i = 0; i < slices; i++)
        leave(G.get() + i * keys * lanes, s, i * lanes, count(i), dstate + head * square, lanes);
}

}  // namespace

// r, w_raw, k, v, a, b: (B, T, H, N) contiguous, each float32 or bfloat16: `is_bf16` has a bit for each, from the lowest.
// y: the same, in the dtype of r. state, final: (B, H, N, N) float32, value by key.
// before: (B, H, chunks, N, N) float32, key by value, the states before steps 0, 16, ...; null if nobody will ask.
struct Wkv7Forward {
    const void* inputs[INPUTS];
    const float* state;
    void* y;
    float *final, *before;
    Shape shape;
    int64_t is_bf16, threads;
};

extern "C" void rwkv_wkv7_forward(const Wkv7Forward* f) {
    Inputs in{{}, f->is_bf16};
    std::copy(f->inputs, f->inputs + INPUTS, in.data);
    const Shape s = f->shape;
    const int64_t all = s.batch * s.heads;
    if (s.steps == 1 && !f->before && s.size % WIDTH == 0) {
#pragma omp parallel for num_threads(f->threads) schedule(static)
        for (int64_t head = 0; head < all; head++) forward_1(in, s, head, f->state, f->y, f->final);
        return;
    }
    int64_t lanes = std::min(s.padded(), LANES);
    while (lanes > WIDTH && all * ((s.size + lanes - 1) / lanes) < f->threads) lanes = round_up(lanes / 2);
    const int64_t slices = (s.size + lanes - 1) / lanes;
#pragma omp parallel for num_threads(f->threads) schedule(dynamic, 1)
    for (int64_t i = 0; i < all * slices; i++) {
        const int64_t head = i / slices, first = i % slices * lanes, count = std::min(lanes, s.size - first);
        const auto run = [&](auto g) { g(in, s, head, first, count, f->state, f->y, f->final, f->before); };
        switch (lanes / WIDTH) {
            case 1: run(forward<1>); break;
            case 2: run(forward<2>); break;
            case 3: run(forward<3>); break;
            default: run(forward<4>);
        }
    }
}

// dy: like y. dfinal, dstate: like state. The gradients of r to b: each like its input.
struct Wkv7Backward {
    const void* inputs[INPUTS];
    const float* before;
    const void* dy;
    const float* dfinal;
    void* grads[INPUTS];
    float* dstate;
    Shape shape;
    int64_t is_bf16, threads;
};

extern "C" void rwkv_wkv7_backward(const Wkv7Backward* f) {
    Inputs in{{}, f->is_bf16};
    std::copy(f->inputs, f->inputs + INPUTS, in.data);
#pragma omp parallel for num_threads(f->threads) schedule(dynamic, 1)
    for (int64_t head = 0; head < f->shape.batch * f->shape.heads; head++)
        backward(in, f->shape, head, f->before, f->dy, f->dfinal, f->grads, f->dstate);
}
