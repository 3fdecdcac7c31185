// What the recurrences whose state is a matrix for each head share: rows of their inputs, and products of sixteen rows with a
// state. A state stands as S[key][value], rows padded with zeros to whole vectors: zeros stay zeros all the way, so any N works.
#pragma once

#include <algorithm>
#include <type_traits>
#include <vector>

#include "simd.h"

// Where to find rows: a head of a batch, and a step.
struct Place {
    int64_t head, step;
};

// Heads of which one thread does some steps after the other's same steps: rows of one step lie side by side in memory, so those
// of the next head are in a page that the processor has just looked up, and often in the cache.
struct Heads {
    int64_t begin, end;
    int64_t count() const { return end - begin; }
    int64_t index(int64_t head) const { return head - begin; }
    // What comes after a head's steps up to `end_step`, where `interval` steps are done before the next head's turn: a negative
    // one, backwards.
    Place next(int64_t head, int64_t end_step, int64_t interval) const {
        const int64_t length = interval < 0 ? -interval : interval;
        if (interval > 0 && end_step % length) return {head, end_step};
        const int64_t start = (end_step - 1) / length * length;
        return head + 1 < end ? Place{head + 1, start} : Place{begin, start + interval};
    }
};

struct Shape {
    int64_t batch, steps, heads, size;
    int64_t all() const { return batch * heads; }
    int64_t padded() const { return round_up(size); }
    // Where the row of a step begins in (B, T, H, N).
    int64_t row(int64_t head_of_batch, int64_t step) const {
        return ((head_of_batch / heads * steps + step) * heads + head_of_batch % heads) * size;
    }
    // How many groups the heads make: two or more for each thread, while there are as many.
    int64_t groups(int64_t threads) const {
        const int64_t each = std::max<int64_t>(1, std::min<int64_t>(8, all() / (2 * threads)));
        return (all() + each - 1) / each;
    }
    Heads group(int64_t i, int64_t groups) const { return {i * all() / groups, (i + 1) * all() / groups}; }
    // How many values of a head a thread takes, forwards: all, unless there are fewer heads than threads.
    int64_t lanes(int64_t threads) const {
        int64_t lanes = padded();
        while (lanes > WIDTH && all() * ((size + lanes - 1) / lanes) < threads) lanes = round_up(lanes / 2);
        return lanes;
    }
    int64_t intervals(int64_t length) const { return (steps + length - 1) / length; }
};

// A tensor (B, T, H, N), float32 or bfloat16.
template <typename Void>
struct Rows {
    Void* data;
    bool is_bf16;
};

// The inputs of a recurrence, contiguous, each float32 or bfloat16: `is_bf16` has a bit for each, from the lowest.
template <int COUNT>
struct InputsOf {
    const void* const* data;
    int64_t is_bf16;
    Rows<const void> rows(int which) const { return {data[which], bool(is_bf16 >> which & 1)}; }
};

// Fetches rows of other steps into the cache, a few lines at each call: the processor's own prefetch does not see through pieces so
// short and so far apart, and all at once would be more lines than can be under way. So the products below call it as they go.
class Ahead {
    static constexpr int MOST = 120;
    const char* rows[MOST];
    int64_t bytes[MOST], count = 0, row = 0, at = 0;

  public:
    template <typename Void>
    INLINE void add(Rows<Void> x, const Shape& s, int64_t head, int64_t start, int64_t end) {
        const int64_t each = x.is_bf16 ? 2 : 4;
        for (int64_t t = std::max<int64_t>(0, start); t < std::min(end, s.steps) && count < MOST; t++, count++) {
            rows[count] = static_cast<const char*>(x.data) + s.row(head, t) * each;
            bytes[count] = s.size * each;
        }
    }

    // The `part`th of `parts` of the state that is kept before the interval at that place, if there is one.
    INLINE void add(const float* kept, const Shape& s, Place place, int64_t interval, int64_t part, int64_t parts) {
        if (!kept || place.step < 0 || place.step >= s.steps || count == MOST) return;
        const int64_t each = s.size * s.size / parts;
        rows[count] = reinterpret_cast<const char*>(kept + ((place.head * s.intervals(interval) + place.step / interval) * parts + part) * each);
        bytes[count++] = each * sizeof(float);
    }

    APART void some() {
        int64_t r = row, i = at;
        for (int left = 10; left && r < count; left--) {
            __builtin_prefetch(rows[r] + i, 0, 2);  // not into the first level, which a state and a chunk fill
            i += 64;
            if (i >= bytes[r]) r++, i = 0;
        }
        row = r, at = i;
    }
};

// `count` values from `first` on of steps `start` to `end` of a head, as rows of floats; up to `rows` they are zeros.
APART inline void fetch(Rows<const void> x, const Shape& s, int64_t head, int64_t start, int64_t end, int64_t first, int64_t count,
                        int64_t rows, float* to, int64_t stride) {
    with_type(x.is_bf16, x.data, [&](auto* p) ALWAYS {
        const auto* from = p + s.row(head, start) + first;
        const int64_t next = s.heads * s.size, most = std::min(rows, end - start);
        for (int64_t t = 0; t < most; t++, from += next, to += stride) {
            int64_t i = 0;
            for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
            if (i < count) store(to + i, load(from + i, count - i));
        }
        for (int64_t i = 0; i < (rows - most) * stride; i += WIDTH) store(to + i, floats{});
    });
}

APART inline void put(Rows<void> x, const Shape& s, int64_t head, int64_t start, int64_t end, int64_t first, int64_t count,
                      const float* from, int64_t stride) {
    with_type(x.is_bf16, x.data, [&](auto* p) ALWAYS {
        auto* to = p + s.row(head, start) + first;
        for (int64_t t = start; t < end; t++, to += s.heads * s.size, from += stride) {
            int64_t i = 0;
            for (; i + WIDTH <= count; i += WIDTH) store(to + i, load(from + i));
            if (i < count) store(to + i, load(from + i), count - i);
        }
    });
}

// Values `first` to `first + count` of a state (N, N), value by key, as S[key][value], and back.
APART inline void enter(const float* state, const Shape& s, int64_t first, int64_t count, float* S, int64_t stride) {
    const int64_t n = s.size, whole = n / WIDTH * WIDTH, blocks = count / WIDTH * WIDTH;
    std::fill(S, S + s.padded() * stride, 0.0f);
    for (int64_t i = 0; i < blocks; i += WIDTH)
        for (int64_t j = 0; j < whole; j += WIDTH) turn(state + (first + i) * n + j, n, S + j * stride + i, stride);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = i < blocks ? whole : 0; j < n; j++) S[j * stride + i] = state[(first + i) * n + j];
}

APART inline void leave(const float* S, const Shape& s, int64_t first, int64_t count, float* state, int64_t stride) {
    const int64_t n = s.size, whole = n / WIDTH * WIDTH, blocks = count / WIDTH * WIDTH;
    for (int64_t i = 0; i < blocks; i += WIDTH)
        for (int64_t j = 0; j < whole; j += WIDTH) turn(S + j * stride + i, stride, state + (first + i) * n + j, n);
    for (int64_t i = 0; i < count; i++)
        for (int64_t j = i < blocks ? whole : 0; j < n; j++) state[(first + i) * n + j] = S[j * stride + i];
}

// S[key][value] to what is kept of it, (N, N) key by value, and back.
inline void keep(const float* S, const Shape& s, int64_t first, int64_t count, float* kept, int64_t stride) {
    for (int64_t j = 0; j < s.size; j++) std::memcpy(kept + j * s.size + first, S + j * stride, count * sizeof(float));
}

inline void take_up(const float* kept, const Shape& s, float* S, int64_t stride) {
    std::fill(S, S + s.padded() * stride, 0.0f);
    for (int64_t j = 0; j < s.size; j++) std::memcpy(S + j * stride, kept + j * s.size, s.size * sizeof(float));
}

// sums[r][q] += a[r * row + i * next] b[i * stride + q], summed over i, q in registers.
template <int R, int Q>
INLINE void accumulate(part (&sums)[R][Q], const float* a, int64_t row, int64_t next, const float* b, int64_t stride, int64_t depth) {
    for (int64_t i = 0; i < depth; i++, a += next, b += stride) {
        part x[Q];
#pragma GCC unroll 16
        for (int q = 0; q < Q; q++) x[q] = load_part(b + q * LANES);
#pragma GCC unroll 16
        for (int r = 0; r < R; r++)
#pragma GCC unroll 16
            for (int q = 0; q < Q; q++) sums[r][q] += a[r * row] * x[q];
    }
}

// A tile of sums is as large as the registers allow: Q of them side by side, and the rows that keep the adders busy.
constexpr int SIDE = LANES == 16 ? 4 : 2;

template <int Q>
constexpr int64_t TILE = LANES == 16 ? 16 / Q : 4;

// Calls f with an integral constant for each tile's breadth in registers, and where it begins.
template <typename F>
INLINE void for_tiles(int64_t lanes, F f) {
    int64_t at = 0;
    for (; at + SIDE * LANES <= lanes; at += SIDE * LANES) f(std::integral_constant<int, SIDE>(), at);
    if constexpr (SIDE > 2)
        if (at + 2 * LANES <= lanes) f(std::integral_constant<int, 2>(), at), at += 2 * LANES;
    if constexpr (SIDE == 4)
        if (at < lanes) f(std::integral_constant<int, 1>(), at);
}

// y (rows, lanes) = x (rows, keys) S (keys, lanes), 8 or 16 rows.
APART inline void read_by(int64_t rows, const float* x, const float* S, int64_t keys, int64_t lanes, float* y, Ahead& ahead) {
    for_tiles(lanes, [&](auto q, int64_t at) ALWAYS {
        constexpr int Q = q, R = TILE<Q> < 8 ? TILE<Q> : 8;
        for (int64_t r = 0; r < rows; r += R) {
            ahead.some();
            part sums[R][Q] = {};
            accumulate<R, Q>(sums, x + r * keys, keys, 1, S + at, lanes, keys);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 16
                for (int j = 0; j < Q; j++) store_part(y + (r + i) * lanes + at + j * LANES, sums[i][j]);
        }
    });
}

// to (keys, lanes) = decay (keys) from (keys, lanes) + x' y, x (16, keys), y (16, lanes). `to` may be `from`.
APART inline void write_by(const float* decay, const float* from, const float* x, const float* y, int64_t keys, int64_t lanes, float* to,
                            Ahead& ahead) {
    for_tiles(lanes, [&](auto q, int64_t at) ALWAYS {
        constexpr int Q = q, R = TILE<Q>;
        for (int64_t r = 0; r < keys; r += R) {
            ahead.some();
            part sums[R][Q];
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 16
                for (int j = 0; j < Q; j++) sums[i][j] = load_part(from + (r + i) * lanes + at + j * LANES) * decay[r + i];
            accumulate<R, Q>(sums, x + r, 1, keys, y + at, lanes, WIDTH);
#pragma GCC unroll 16
            for (int i = 0; i < R; i++)
#pragma GCC unroll 16
                for (int j = 0; j < Q; j++) store_part(to + (r + i) * lanes + at + j * LANES, sums[i][j]);
        }
    });
}

// x (16, lanes) to its transpose (lanes, 16).
inline void turn_rows(const float* x, int64_t lanes, float* to) {
    for (int64_t i = 0; i < lanes; i += WIDTH) turn(x + i, lanes, to + i * WIDTH, WIDTH);
}

// y (16, keys) = x (16, lanes) S' (lanes, keys), of which the transpose of x is given.
APART inline void read_by_turned(const float* turned, const float* S, int64_t keys, int64_t lanes, float* y, Ahead& ahead) {
    constexpr int Q = LANES == 16 ? 1 : 2, R = TILE<Q>;
    for (int64_t key = 0; key < keys; key += WIDTH) {
        ahead.some();
        alignas(64) float block[WIDTH * WIDTH];
        for (int64_t at = 0; at < WIDTH; at += Q * LANES)
            for (int64_t r = 0; r < WIDTH; r += R) {
                part sums[R][Q] = {};
                accumulate<R, Q>(sums, S + (key + r) * lanes, lanes, 1, turned + at, WIDTH, lanes);
#pragma GCC unroll 16
                for (int i = 0; i < R; i++)
#pragma GCC unroll 16
                    for (int j = 0; j < Q; j++) store_part(block + (r + i) * WIDTH + at + j * LANES, sums[i][j]);
            }
        turn(block, WIDTH, y + key, keys);
    }
}

// y[key] = the sum over the values of S times G.
inline void meet(const float* S, const float* G, int64_t keys, int64_t lanes, float* y) {
    for (int64_t key = 0; key < keys; key += WIDTH) {
        part all[WIDTH];
        for (int r = 0; r < WIDTH; r++) {
            part total{};
            for (int64_t i = (key + r) * lanes; i < (key + r + 1) * lanes; i += LANES) total += load_part(S + i) * load_part(G + i);
            all[r] = total;
        }
        part found[PARTS];
        sums(all, found);
        for (int i = 0; i < PARTS; i++) store_part(y + key + i * LANES, found[i]);
    }
}

// What Python gives. y: (B, T, H, N) in the dtype of the first input. state, final: (B, H, N, N) float32, value by key.
// before: (B, H, intervals, N, N) float32, key by value, the states before each interval; null if nobody will ask.
template <int COUNT>
struct Forward {
    const void* inputs[COUNT];
    const float* state;
    void* y;
    float *final, *before;
    Shape shape;
    int64_t is_bf16, threads;
};

// dy: like y. dfinal, dstate: like state. The gradients of the inputs: each like its own.
template <int COUNT>
struct Backward {
    const void* inputs[COUNT];
    const float* before;
    const void* dy;
    const float* dfinal;
    void* grads[COUNT];
    float* dstate;
    Shape shape;
    int64_t is_bf16, threads;
};

// Calls `one(in, shape, head, state, y, final)` for each head if there is but one step, else `all(in, shape, heads, first, count,
// state, y, final, before)` for each group of heads, and for each slice of their values if there are few heads.
template <int COUNT, typename One, typename All>
void run_forward(const Forward<COUNT>& f, One one, All all) {
    const InputsOf<COUNT> in{f.inputs, f.is_bf16};
    const Shape s = f.shape;
    const Rows<void> y{f.y, bool(f.is_bf16 & 1)};
    if (s.steps == 1 && !f.before && s.size % WIDTH == 0) {
#pragma omp parallel for num_threads(f.threads) schedule(static)
        for (int64_t head = 0; head < s.all(); head++) one(in, s, head, f.state, y, f.final);
        return;
    }
    const int64_t lanes = s.lanes(f.threads), slices = (s.size + lanes - 1) / lanes, groups = s.groups(f.threads);
#pragma omp parallel num_threads(f.threads)
    {
        const Flush flush;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < groups * slices; i++) {
            const int64_t first = i % slices * lanes;
            all(in, s, s.group(i / slices, groups), first, std::min(lanes, s.size - first), f.state, y, f.final, f.before);
        }
    }
}

// Calls `all(in, shape, heads, before, dy, dfinal, grads, dstate)` for each group of heads.
template <int COUNT, typename All>
void run_backward(const Backward<COUNT>& f, All all) {
    const InputsOf<COUNT> in{f.inputs, f.is_bf16};
    const Rows<const void> dy{f.dy, bool(f.is_bf16 & 1)};
    Rows<void> grads[COUNT];
    for (int i = 0; i < COUNT; i++) grads[i] = {f.grads[i], in.rows(i).is_bf16};
    const int64_t groups = f.shape.groups(f.threads);
#pragma omp parallel num_threads(f.threads)
    {
        const Flush flush;
#pragma omp for schedule(dynamic, 1)
        for (int64_t i = 0; i < groups; i++)
            all(in, f.shape, f.shape.group(i, groups), f.before, dy, f.dfinal, grads, f.dstate);
    }
}
