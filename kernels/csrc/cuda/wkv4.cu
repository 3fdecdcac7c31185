// WKV-4 and its gradients: a thread for each channel of a row of the batch, and of a segment of time.
//
// The two sums before a step, e^p a and e^p b, are what the state holds; a step decays both by l = -exp(w) and adds
// e^k (v, 1). Their gradients go back through time likewise: they are held as e^q g, a step adds e^-m (dy / b', -y dy / b'),
// m being the largest exponent in y_t and b' what it is divided by, without e^m.
//
// One thread for all steps waits for each before the next. So where there are few channels time is cut into segments: what
// each adds to the sums, from nothing; a scan over the segments, which gives the sums before each; and all segments at once.
// The same for the gradients. With one segment the first two fall away, and each number is read once.
//
// On paper, B 8, T 4096, C 4096, bfloat16, on an H200 (4.3 TB/s), a unit the 268 MB of a (B, T, C) tensor: one segment, 248
// threads on each multiprocessor.
//   forward    reads 2, writes 1, and 3 float32 for each 32 steps, 0.2 units: 0.86 GB, 0.20 ms; 75 instructions a step (two
//              exponentials and a division), 0.34 ms. Expected 0.5 ms.
//   backward   reads 2, then 3, mostly from the cache, and writes 2: 1.5 GB, 0.35 ms; 200 instructions a step, 0.9 ms. Expected
//              1.2 ms.
// B 1, T 1024, C 2560: 32 segments of one chunk: 64 steps and 32 of the scan, one after another: 0.015 ms and 0.03 ms, most of
// it the starts of three and four kernels.
#include "device.h"

namespace {

constexpr int CHUNK = 32, AHEAD = 8;  // loads that wait for memory together
constexpr int THREADS = 64;           // in the backward, the sums before each of their chunk's steps take 24 KB of shared memory
constexpr float NOTHING = -1e38f;     // the exponent of an empty sum

struct Shape {
    int64_t batch, steps, channels;
    __host__ __device__ int64_t chunks() const { return (steps + CHUNK - 1) / CHUNK; }
};

struct Sums {  // e^p a, e^p b
    float a, b, p;
};

DEVICE float to_float(float x) { return x; }

template <class T>
DEVICE T from_float(float x) {
    if constexpr (sizeof(T) == 2)
        return to_bf16(x);
    else
        return x;
}

// Decay by `by`, and add e^p (a, b). Of the two exponentials one is 1, but for what rounding the new exponent has lost: without
// that the error of a hundred steps would be a hundred roundings.
DEVICE void advance(Sums& s, float by, float p, float a, float b) {
    const float decayed = by + s.p;
    const bool larger = decayed >= p;
    const float largest = larger ? decayed : p, rest = by + (s.p - largest), less = expf(larger ? p - largest : rest);
    const float keep = larger ? 1 + rest : less, add = larger ? less : 1;
    s = {keep * s.a + add * a, keep * s.b + add * b, largest};
}

struct Average {
    float y, largest, here, inverse;  // the largest exponent; without it, the current value's weight, and 1 / that of all
};

DEVICE Average average(const Sums& s, float k, float v, float u) {
    const float now = u + k;
    const bool old = s.p >= now;
    const float less = expf(old ? now - s.p : s.p - now), before = old ? 1 : less, here = old ? less : 1;
    const float inverse = 1 / (before * s.b + here);
    return {(before * s.a + here * v) * inverse, old ? s.p : now, here, inverse};
}

// act(t, x_t, y_t, z_t) for the steps from, ..., to - 1 of one channel, or BACK from to - 1. z may be null. While AHEAD steps
// are done, the next are on their way from memory.
template <bool BACK = false, class T, class F>
DEVICE void each_step(const T* x, const T* y, const T* z, int64_t stride, int from, int to, F act) {
    struct { T x[AHEAD], y[AHEAD], z[AHEAD]; } next = {}, now;
    const auto step = [=](int n) { return BACK ? from + to - 1 - n : n; };
    const auto fetch = [&](int n) {
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (n + i < to) {
                const int64_t at = step(n + i) * stride;
                next.x[i] = x[at], next.y[i] = y[at];
                if (z) next.z[i] = z[at];
            }
    };
    fetch(from);
    for (int n = from; n < to; n += AHEAD) {
        now = next;
        fetch(n + AHEAD);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (n + i < to) act(step(n + i), to_float(now.x[i]), to_float(now.y[i]), to_float(now.z[i]));
    }
}

// What a thread works on: a channel of a row of the batch, in a segment of `per` chunks.
struct Place {
    int64_t channel, row, channels, batch;
    int segment, from, to, steps;
    __device__ int64_t first() const { return row * steps * channels + channel; }                          // in (B, T, C)
    __device__ int64_t state(int64_t n) const { return (n * batch + row) * 3 * channels + channel; }  // in (n, B, 3, C)
};

DEVICE Place place(const Shape& s, int64_t per, int segment) {
    const int64_t from = segment * per * CHUNK, to = from + per * CHUNK;
    return {int64_t(blockIdx.x) * blockDim.x + threadIdx.x, blockIdx.z, s.channels, s.batch, segment, int(from),
            int(to < s.steps ? to : s.steps), int(s.steps)};
}

DEVICE Sums load(const float* from, int64_t channels) { return {from[0], from[channels], from[2 * channels]}; }

DEVICE void store(float* to, int64_t channels, const Sums& s) { to[0] = s.a, to[channels] = s.b, to[2 * channels] = s.p; }

template <class T>
struct Forward {
    const T *k, *v;
    const float *w, *u, *state;
    T* y;
    float *final, *before;  // before: (chunks + 1, B, 3, C), the states before each and the last, or null
    Shape shape;
    int64_t per;
};

// What a segment adds to the sums, left where the next one finds those before it.
template <class T>
__global__ void __launch_bounds__(THREADS) contribute(const Forward<T> p) {
    const Place here = place(p.shape, p.per, blockIdx.y);
    if (here.channel >= here.channels) return;
    const float decay = -expf(p.w[here.channel]);
    Sums s = {0, 0, NOTHING};
    each_step(p.k + here.first(), p.v + here.first(), static_cast<const T*>(nullptr), here.channels, here.from, here.to,
              [&](int, float k, float v, float) { advance(s, decay, k, v, 1); });
    store(p.before + here.state((here.segment + 1) * p.per), here.channels, s);
}

// From what each segment adds to the sums before each, or backwards in time, where `last` has the unit of what comes first.
// The place of segment n is at[n * step].
__global__ void __launch_bounds__(THREADS) scan(const float* w, const float* first, const float* last, float* at, Shape shape,
                                                int64_t per, int64_t step) {
    const Place here = place(shape, per, 0);
    if (here.channel >= here.channels) return;
    const float decay = -expf(w[here.channel]);
    const int64_t segments = (shape.chunks() + per - 1) / per, whole = per * CHUNK;
    const auto slot = [&](int64_t n) { return at + here.state((last ? segments - 1 - n : n) * step); };
    Sums s = load(first + here.state(0), here.channels);
    if (last) s.p = -last[here.state(0) + 2 * here.channels];
    store(slot(0), here.channels, s);
    for (int64_t n = 1; n < segments; n += AHEAD) {
        Sums added[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (n + i < segments) added[i] = load(slot(n + i), here.channels);
#pragma unroll
        for (int i = 0; i < AHEAD; i++)
            if (n + i < segments) {
                const int64_t steps = last && n + i == 1 ? shape.steps - (segments - 1) * whole : whole;
                advance(s, float(steps) * decay, added[i].p, added[i].a, added[i].b);
                store(slot(n + i), here.channels, s);
            }
    }
}

template <class T>
__global__ void __launch_bounds__(THREADS) walk(const Forward<T> p) {
    const Place here = place(p.shape, p.per, blockIdx.y);
    if (here.channel >= here.channels) return;
    const float decay = -expf(p.w[here.channel]), u = p.u[here.channel];
    const bool all = gridDim.y == 1;
    Sums s = load(all ? p.state + here.state(0) : p.before + here.state(here.segment * p.per), here.channels);
    T* const y = p.y + here.first();
    each_step(p.k + here.first(), p.v + here.first(), static_cast<const T*>(nullptr), here.channels, here.from, here.to,
              [&](int t, float k, float v, float) {
                  if (t % CHUNK == 0 && p.before && (all || t > here.from))
                      store(p.before + here.state(t / CHUNK), here.channels, s);
                  y[t * here.channels] = from_float<T>(average(s, k, v, u).y);
                  advance(s, decay, k, v, 1);
              });
    if (here.to < here.steps) return;
    store(p.final + here.state(0), here.channels, s);
    if (p.before) store(p.before + here.state(p.shape.chunks()), here.channels, s);
}

dim3 grid(const Shape& s, int64_t segments) {
    return dim3(unsigned((s.channels + THREADS - 1) / THREADS), unsigned(segments), unsigned(s.batch));
}

template <class T>
int run_forward(const Forward<T>& p, int64_t stream) {
    const Shape& s = p.shape;
    const int64_t segments = (s.chunks() + p.per - 1) / p.per;
    const float* const forwards = nullptr;
    int error = 0;
    if (segments > 1) {
        error = LAUNCH(contribute<T>, grid(s, segments - 1), dim3(THREADS), 0, stream, p);
        if (!error)
            error = LAUNCH(scan, grid(s, 1), dim3(THREADS), 0, stream, p.w, p.state, forwards, p.before, s, p.per, p.per);
    }
    return error ? error : LAUNCH(walk<T>, grid(s, segments), dim3(THREADS), 0, stream, p);
}

template <class T>
struct Backward {
    const T *k, *v;
    const float *w, *u, *before;
    const T* dy;
    const float* dfinal;
    T *dk, *dv;
    float *dw, *du, *dstate;
    float* after;  // (segments, B, 3, C): the gradients of the sums after each; unused if there is one
    float* parts;  // (segments, B, 2, C): of dw and du
    Shape shape;
    int64_t per;
};

// What a segment adds to the gradients of the sums before it, left where the one before finds those after it.
template <class T>
__global__ void __launch_bounds__(THREADS) contribute_back(const Backward<T> p) {
    const Place here = place(p.shape, p.per, blockIdx.y + 1);
    if (here.channel >= here.channels) return;
    const float decay = -expf(p.w[here.channel]), u = p.u[here.channel];
    Sums s = load(p.before + here.state(here.segment * p.per), here.channels), g = {0, 0, NOTHING};
    each_step(p.k + here.first(), p.v + here.first(), p.dy + here.first(), here.channels, here.from, here.to,
              [&](int t, float k, float v, float dy) {
                  const Average of = average(s, k, v, u);
                  const float x = dy * of.inverse;
                  advance(g, 0, float(t - here.from) * decay - of.largest, x, -x * of.y);
                  advance(s, decay, k, v, 1);
              });
    store(p.after + here.state(here.segment - 1), here.channels, g);
}

// Chunk by chunk, from the last: the sums before each of its steps are made again, then it goes back through them.
template <class T>
__global__ void __launch_bounds__(THREADS) walk_back(const Backward<T> p) {
    SHARED(Sums, kept, CHUNK * THREADS);
    const Place here = place(p.shape, p.per, blockIdx.y);
    if (here.channel >= here.channels) return;
    const int64_t channels = here.channels;
    const float decay = -expf(p.w[here.channel]), u = p.u[here.channel];
    const T* const k = p.k + here.first();
    const T* const v = p.v + here.first();
    T* const dk = p.dk + here.first();
    T* const dv = p.dv + here.first();
    Sums g;
    if (gridDim.y == 1) {
        const float* const final = p.dfinal + here.state(0);
        g = {final[0], final[channels], -p.before[here.state(p.shape.chunks()) + 2 * channels]};
    } else {
        g = load(p.after + here.state(here.segment), channels);
    }
    float dw = 0, du = 0;
    int from = here.from + (here.to - here.from - 1) / CHUNK * CHUNK;
    for (int to = here.to; from >= here.from; to = from, from -= CHUNK) {
        Sums s = load(p.before + here.state(from / CHUNK), channels);
        each_step(k, v, static_cast<const T*>(nullptr), channels, from, to, [&](int t, float k, float v, float) {
            kept[(t - from) * THREADS + threadIdx.x] = s;
            advance(s, decay, k, v, 1);
        });
        float dw_part = 0, du_part = 0;
        each_step<true>(k, v, p.dy + here.first(), channels, from, to, [&](int t, float k, float v, float dy) {
            s = kept[(t - from) * THREADS + threadIdx.x];
            const Average of = average(s, k, v, u);
            const float x = dy * of.inverse, of_value = x * of.here, of_key = of_value * (v - of.y), later = expf(k + g.p);
            dk[t * channels] = from_float<T>(later * (g.a * v + g.b) + of_key);
            dv[t * channels] = from_float<T>(later * g.a + of_value);
            dw_part += expf(decay + (s.p + g.p)) * (g.a * s.a + g.b * s.b);
            du_part += of_key;
            advance(g, decay, -of.largest, x, -x * of.y);
        });
        dw += dw_part, du += du_part;
    }
    float* const part = p.parts + ((here.segment * here.batch) + here.row) * 2 * channels + here.channel;
    part[0] = dw * decay, part[channels] = du;
    if (here.segment) return;
    const float unit = expf(g.p + p.before[here.state(0) + 2 * channels]);
    store(p.dstate + here.state(0), channels, {unit * g.a, unit * g.b, 0});
}

// The sums of `parts` over its rows of 2 C, always in the same order.
__global__ void __launch_bounds__(256) add_parts(const float* parts, float* dw, float* du, int64_t rows, int64_t channels) {
    SHARED(float, of_rows, 256);
    const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
    float sum = 0;
    if (column < 2 * channels)
#pragma unroll 4
        for (int64_t n = threadIdx.x / 32; n < rows; n += 8) sum += parts[n * 2 * channels + column];
    of_rows[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || column >= 2 * channels) return;
    for (int n = 1; n < 8; n++) sum += of_rows[n * 32 + threadIdx.x];
    (column < channels ? dw[column] : du[column - channels]) = sum;
}

template <class T>
int run_backward(const Backward<T>& p, int64_t stream) {
    const Shape& s = p.shape;
    const int64_t segments = (s.chunks() + p.per - 1) / p.per, step = 1;
    int error = 0;
    if (segments > 1) {
        const float* const last = p.before + s.chunks() * s.batch * 3 * s.channels;
        error = LAUNCH(contribute_back<T>, grid(s, segments - 1), dim3(THREADS), 0, stream, p);
        if (!error)
            error = LAUNCH(scan, grid(s, 1), dim3(THREADS), 0, stream, p.w, p.dfinal, last, p.after, s, p.per, step);
    }
    if (!error) error = LAUNCH(walk_back<T>, grid(s, segments), dim3(THREADS), 0, stream, p);
    const dim3 columns(unsigned((2 * s.channels + 31) / 32));
    if (!error) error = LAUNCH(add_parts, columns, dim3(256), 0, stream, p.parts, p.dw, p.du, segments * s.batch, s.channels);
    return error;
}

}  // namespace

// k, v, y: (B, T, C) contiguous, all bfloat16 if `is_bf16`, else float32. w, u: (C) float32. state, final: (B, 3, C) float32.
// before: (chunks of 32 + 1, B, 3, C), the states before each and the last; or null, if there is one segment. per: chunks in one.
struct Wkv4Forward {
    const void *k, *v;
    const float *w, *u, *state;
    void* y;
    float *final, *before;
    Shape shape;
    int64_t per, is_bf16, stream;
};

template <class T>
static int forward(const Wkv4Forward& f) {
    const auto in = [](const void* x) { return static_cast<const T*>(x); };
    return run_forward<T>({in(f.k), in(f.v), f.w, f.u, f.state, static_cast<T*>(f.y), f.final, f.before, f.shape, f.per}, f.stream);
}

extern "C" int rwkv_wkv4_forward(const Wkv4Forward* f) { return f->is_bf16 ? forward<bf16>(*f) : forward<float>(*f); }

// As above. The gradients are like their inputs; dw and du float32. after: (segments, B, 3, C), parts: (segments, B, 2, C): scratch.
struct Wkv4Backward {
    const void *k, *v;
    const float *w, *u, *before;
    const void* dy;
    const float* dfinal;
    void *dk, *dv;
    float *dw, *du, *dstate, *after, *parts;
    Shape shape;
    int64_t per, is_bf16, stream;
};

template <class T>
static int backward(const Wkv4Backward& f) {
    const auto in = [](const void* x) { return static_cast<const T*>(x); };
    const auto out = [](void* x) { return static_cast<T*>(x); };
    return run_backward<T>({in(f.k), in(f.v), f.w, f.u, f.before, in(f.dy), f.dfinal, out(f.dk), out(f.dv), f.dw, f.du, f.dstate,
                            f.after, f.parts, f.shape, f.per}, f.stream);
}

extern "C" int rwkv_wkv4_backward(const Wkv4Backward* f) { return f->is_bf16 ? backward<bf16>(*f) : backward<float>(*f); }
