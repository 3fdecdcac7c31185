// WKV-6 and its gradients.   y_t = S_{t-1} r_t + (r_t . (u k_t)) v_t    S_t = S_{t-1} diag(d_t) + v_t k_t'    d = exp(-exp(w))
//
// Three kernels do it, each of matrix products between tiles of 16 x 16 on tensor cores:
//   walk       goes through the steps in tiles of 16, the state in registers, and puts out y, the last state and that before each
//              chunk of 64. The gradient of v and of the first state is the same recurrence backwards in time, with k as
//              receptance, r as key and dy as value: S becomes the gradient D of the state. So the backward is a walk as well,
//              which leaves D after each chunk.
//   scan       where there are fewer heads than the GPU has room for, time is cut into segments: a walk from nothing gives what
//              each adds, a scan over them S' = S diag(product of its decays) + that the state before each, and then all
//              segments walk at once. One segment is the fused schedule.
//   gradients  dr, dk, dw and du of a chunk need only S before it and D after it: all chunks at once, a block for 64 keys
//              of one, which meet all values there, so that no sum goes over blocks (but du's over chunks, in a fixed order).
//
// A decay may be 0: no quotient of products of decays stands for the product in between, nor a difference of sums of their logs.
// A tile, and in `gradients` the chunk, is halved again and again. A pair s < t is parted once: s is then in a block and t
// in the next, and the decays between are those after s to its block's end times those from the start of t's block until t.
// Both are plain products, and all pairs parted at once are one matrix product of r * start and k * end. In the gradient of
// a log decay every term (a pair, or the state at either side, that passes it) has that decay as a factor: no digits cancel.
//
// Products are tf32. Of float32 inputs each operand is two tf32 numbers, the second what the first leaves (three products,
// 2^-22); bfloat16 is a tf32 number as it is, and what is computed from it is rounded to one (2^-11, a quarter of what bfloat16
// outputs lose), but not on the way of the state and its gradient, which are float32 in any case. Tensor cores cut off the ends
// of their sums, so what is to be exact is summed from nothing and added as usual.
//
// On paper, B 8, T 4096, H 64, N 64, bfloat16, on an H200 (4.3 TB/s, 300 TFLOP/s of tf32 by mma.sync), a unit the 268 MB of a
// (B, T, H, N) tensor:
//   forward    reads 4, writes 1 + 2 of states: 1.9 GB, 0.44 ms; 70 GFLOP in products, 0.23 ms; 256 tiles at about 2 us with four
//              blocks on each multiprocessor, 0.5 ms. Expected 0.6 ms.
//   backward   a walk, 0.6 ms; gradients read 5 + 4, write 3: 3.2 GB, 0.75 ms; 93 GFLOP, 0.3 ms; Expected 1.6 ms.
// B 1, T 1024, H 32 (a short batch): segments of one chunk: 12 tiles, not 64, one after another: 0.03 ms and 0.08 ms.
// Float32 moves twice as much and takes three times the products: 1.4 and 3.5 ms.
#include "device.h"

namespace {

constexpr int WARP = 32, TILE = 16, CHUNK = 64, TILES = CHUNK / TILE;

constexpr float ENDLESS = -1000;  // a w whose decay is 1, for the steps that fill up a tile

struct Shape {
    int64_t batch, steps, heads, size;
    __host__ __device__ int64_t chunks() const { return (steps + CHUNK - 1) / CHUNK; }
};

template <class T>
constexpr int PARTS = sizeof(T) == 2 ? 1 : 2;

// ------------------------------------------------------------------------------------------------------------------- memory

// Two or four neighbours, as they lie in memory.
template <class T, int COUNT>
struct alignas(COUNT * sizeof(T)) [[gnu::may_alias]] Few {
    uint32_t words[COUNT * sizeof(T) / 4];
};

template <int COUNT>
DEVICE float number(const Few<float, COUNT>& few, int i) {
    return __uint_as_float(few.words[i]);
}

template <int COUNT>
DEVICE float number(const Few<bf16, COUNT>& few, int i) {
    return __uint_as_float(i % 2 ? few.words[i / 2] & 0xffff0000u : few.words[i / 2] << 16);
}

template <int COUNT, class T>
DEVICE Few<T, COUNT> load(const T* from, bool there = true) {
    Few<T, COUNT> few = {};
    if (there) few = *reinterpret_cast<const Few<T, COUNT>*>(from);
    return few;
}

template <int COUNT, class T>
DEVICE void read(float (&x)[COUNT], const T* from, bool there = true) {
    const Few<T, COUNT> few = load<COUNT>(from, there);
#pragma unroll
    for (int i = 0; i < COUNT; i++) x[i] = number(few, i);
}

template <class T, int COUNT>
DEVICE void store(T* to, const float (&x)[COUNT], bool there = true) {
    Few<T, COUNT> few;
#pragma unroll
    for (int i = 0; i < COUNT; i++)
        if constexpr (sizeof(T) == 4)
            few.words[i] = __float_as_uint(x[i]);
        else if (i % 2)
            few.words[i / 2] = to_bf16(x[i - 1]).bits | uint32_t(to_bf16(x[i]).bits) << 16;
    if (there) *reinterpret_cast<Few<T, COUNT>*>(to) = few;
}

// -------------------------------------------------------------------------------------------------------------------- tiles

// A 16 x 16 matrix in a warp's registers. With g = lane / 4, q = lane % 4, a lane has rows 2g and 2g+1, columns 4q to 4q+3.
struct Tile {
    float x[2][4];
};

// A tile as tensor cores take it: they cut off the 13 low bits of a float.
template <int PARTS>
struct Operand {
    uint32_t bits[PARTS][2][4];
};

// What is cut off is 0.72 2^-11 of a number on average. With that added before it is nothing on average; numbers that have
// no more than 10 bits of mantissa stay as they are, and so does NaN. To round (to_tf32) takes three instructions, not one.
DEVICE uint32_t nearly(float x) { return __float_as_uint(fmaf(x, 0.72f / 2048, x)); }

template <int PARTS>
DEVICE Operand<PARTS> operand(const Tile& tile) {
    Operand<PARTS> o;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const float x = tile.x[i][j];
            if constexpr (PARTS == 1) {
                o.bits[0][i][j] = nearly(x);
            } else {
                o.bits[0][i][j] = nearly(x) & ~0x1fffu;
                o.bits[1][i][j] = nearly(x - __uint_as_float(o.bits[0][i][j]));
            }
        }
    return o;
}

// The same of numbers that are of the inputs' type: a bfloat16 loses nothing.
template <class T>
DEVICE Operand<PARTS<T>> given(const Tile& tile) {
    if constexpr (PARTS<T> == 2) {
        return operand<2>(tile);
    } else {
        Operand<1> o;
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) o.bits[0][i][j] = __float_as_uint(tile.x[i][j]);
        return o;
    }
}

// c = a b', or c += a b' by the tensor cores. The instruction's rows, columns and sum run over even indices first, then odd ones:
// this is what makes each operand and the result the same tile, wherever it stands.
template <bool ADD, int A, int B>
DEVICE void product(Tile& c, const Operand<A>& a, const Operand<B>& b) {
#pragma unroll
    for (int n = 0; n < 2; n++) {
        float d[4] = {};
        if constexpr (ADD) d[0] = c.x[0][n], d[1] = c.x[0][n + 2], d[2] = c.x[1][n], d[3] = c.x[1][n + 2];
#pragma unroll
        for (int parts = A + B - 2; parts >= 0; parts--)  // small terms first
#pragma unroll
            for (int part = 0; part < A; part++) {
                const int other = parts - part;
                if (other < 0 || other >= B || parts == 2) continue;  // the product of the two rests is nothing
#pragma unroll
                for (int m = 0; m < 2; m++) {
                    const auto& x = a.bits[part];
                    const auto& y = b.bits[other];
                    mma_tf32(d, {x[0][m], x[1][m], x[0][m + 2], x[1][m + 2]}, {y[n][m], y[n][m + 2]});
                }
            }
        c.x[0][n] = d[0], c.x[0][n + 2] = d[1], c.x[1][n] = d[2], c.x[1][n + 2] = d[3];
    }
}

template <int A, int B>
DEVICE Tile multiply(const Operand<A>& a, const Operand<B>& b) {
    Tile c;
    product<false>(c, a, b);
    return c;
}

// c += a b', by ordinary additions if it is to be exact.
template <int A, int B>
DEVICE void add_product(Tile& c, const Operand<A>& a, const Operand<B>& b) {
    if constexpr (A + B == 2) {
        product<true>(c, a, b);
    } else {
        const Tile d = multiply(a, b);
#pragma unroll
        for (int i = 0; i < 2; i++)
#pragma unroll
            for (int j = 0; j < 4; j++) c.x[i][j] += d.x[i][j];
    }
}

// A tile of a matrix in memory whose rows are `line` apart.
template <class T>
DEVICE Tile rows(const T* from, int line, int g, int q) {
    Tile tile;
#pragma unroll
    for (int i = 0; i < 2; i++) read(tile.x[i], from + (2 * g + i) * line + 4 * q);
    return tile;
}

// The same, transposed.
template <class T>
DEVICE Tile columns(const T* from, int line, int g, int q) {
    Tile tile;
#pragma unroll
    for (int j = 0; j < 4; j++) {
        const Few<T, 2> few = load<2>(from + (4 * q + j) * line + 2 * g);
#pragma unroll
        for (int i = 0; i < 2; i++) tile.x[i][j] = number(few, i);
    }
    return tile;
}

DEVICE void put(float* to, int line, const Tile& tile, int g, int q) {
#pragma unroll
    for (int i = 0; i < 2; i++) store(to + (2 * g + i) * line + 4 * q, tile.x[i]);
}

constexpr int LINE = TILE + 4;  // of a tile in shared memory

template <int N>
struct Level {
    static constexpr int value = N;
};

DEVICE float sum_columns(float x) {  // over the lanes that have a row's columns
    x += __shfl_xor_sync(~0u, x, 1);
    return x + __shfl_xor_sync(~0u, x, 2);
}

// --------------------------------------------------------------------------------------------------------------------- walk

template <class T>
struct Walk {
    const T *r, *k, *v, *w;
    const float *u, *state;
    T* y;
    float* final;
    float* before;  // (B H, chunks, N, N), in the walk's order; null if nobody will ask and there is one segment
    float* decays;  // (B H, segments - 1, N) products over each segment but the last
    Shape shape;
    int64_t per;  // chunks in a segment
    bool reverse;
};

template <int VALUES>
constexpr int SUMS = VALUES + (VALUES == 64 ? 8 : 4);

template <class T, int VALUES, bool OUTPUT>
size_t walk_shared(int64_t warps) {
    return 4 * warps * TILE * LINE + (OUTPUT ? 4 * 2 * warps * TILE * SUMS<VALUES> : 0) + 2 * TILE * (VALUES * sizeof(T) + 16);
}

// A block walks one segment of a head, with VALUES of the values, and a warp for each 16 keys, of which it alone has the state.
// The warps' parts of y meet in shared memory. Without OUTPUT: from nothing, and only what the segment adds to the state.
template <class T, int VALUES, bool OUTPUT>
__global__ void __launch_bounds__(VALUES == 64 ? 128 : 512, VALUES == 64 ? (sizeof(T) == 2 ? 4 : 3) : 1) walk(const Walk<T> p) {
    constexpr int M = VALUES / TILE, V_LINE = VALUES + 16 / sizeof(T), Y_LINE = SUMS<VALUES>;
    DYNAMIC_SHARED(float, shared);
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    float* const turned = shared + warp * TILE * LINE;
    float* const sums = shared + warps * TILE * LINE;                                              // 2, warps, TILE, Y_LINE
    T* const values = reinterpret_cast<T*>(sums + (OUTPUT ? 2 * warps * TILE * Y_LINE : 0));  // 2, TILE, V_LINE

    const int head = blockIdx.x, heads = int(p.shape.heads), size = int(p.shape.size), steps = int(p.shape.steps);
    const int chunks = int(p.shape.chunks()), per = int(p.per), segment = blockIdx.z, segments = (chunks + per - 1) / per;
    const int64_t stride = int64_t(heads) * size, base = (int64_t(head / heads) * steps * heads + head % heads) * size;
    const int key = TILE * warp + 4 * q, value = blockIdx.y * VALUES;
    const bool mine = key < size;

    // Tiles of the segment, but for those behind the last step.
    const int full = (steps + TILE - 1) / TILE, padded = chunks * TILES;
    int tile = segment * per * TILES, end_tile = min(tile + per * TILES, padded);
    if (p.reverse)
        tile = max(tile, padded - full);
    else
        end_tile = min(end_tile, full);
    const int origin = p.reverse ? padded * TILE - 1 : 0, forth = p.reverse ? -1 : 1;
    const auto step = [=](int of, int i) { return origin + forth * (of * TILE + i); };

    Tile s[M] = {};
    const auto each_row = [&](auto act) {  // (the state's row in a tile, its place in a state)
#pragma unroll
        for (int m = 0; m < M; m++)
#pragma unroll
            for (int i = 0; i < 2; i++) {
                const int row = value + m * TILE + 2 * g + i;
                if (row < size) act(s[m].x[i], row * size + key);
            }
    };
    const auto save = [&](float* to) {
        each_row([&](float (&x)[4], int at) { store(to + at, x, mine); });
    };
    const auto before = [&](int chunk) { return p.before + (int64_t(head) * chunks + chunk) * size * size; };
    float passed[4] = {1, 1, 1, 1};
    if constexpr (OUTPUT) {
        const float* const from = segments == 1 ? p.state + int64_t(head) * size * size : before(segment * per);
        each_row([&](float (&x)[4], int at) { read(x, from + at, mine); });
    }

    Few<T, 4> next_r[2], next_k[2], next_w[2];
    const auto fetch = [&](int of) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const int t = step(of, 2 * g + i);
            const int64_t at = base + t * stride + key;
            const bool there = mine && t < steps;
            if constexpr (OUTPUT) next_r[i] = load<4>(p.r + at, there);
            next_k[i] = load<4>(p.k + at, there);
            next_w[i] = load<4>(p.w + at, there);
        }
    };
    const auto copy_values = [&](int of) {
#pragma unroll 1
        for (int n = threadIdx.x; n < TILE * VALUES / 4; n += blockDim.x) {
            const int i = n / (VALUES / 4), column = n % (VALUES / 4) * 4;
            const int t = step(of, i);
            cp_async<4 * sizeof(T)>(values + (of % 2 * TILE + i) * V_LINE + column, p.v + base + t * stride + value + column,
                                    t < steps && value + column < size);
        }
        cp_async_commit();
    };
    const auto put_out = [&](int of) {  // the sum of the warps' parts
        const float* const part = sums + of % 2 * warps * TILE * Y_LINE;
#pragma unroll 1
        for (int n = threadIdx.x; n < TILE * VALUES / 4; n += blockDim.x) {
            const int i = n / (VALUES / 4), column = n % (VALUES / 4) * 4;
            float sum[4] = {};
#pragma unroll 4
            for (int of_warp = 0; of_warp < warps; of_warp++) {
                float add[4];
                read(add, part + (of_warp * TILE + i) * Y_LINE + column);
#pragma unroll
                for (int j = 0; j < 4; j++) sum[j] += add[j];
            }
            const int t = step(of, i);
            store(p.y + base + t * stride + value + column, sum, t < steps && value + column < size);
        }
    };

    const int first = tile;
    if (tile < end_tile) fetch(tile), copy_values(tile);
    for (; tile < end_tile; tile++) {
        if constexpr (OUTPUT)
            if (p.before && (tile % TILES == 0 || tile == first) && !(tile == first && segments > 1)) save(before(tile / TILES));

        Tile r, k, decay;  // rows are steps, columns keys
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const bool there = step(tile, 2 * g + i) < steps;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                if constexpr (OUTPUT) r.x[i][j] = number(next_r[i], j);
                k.x[i][j] = number(next_k[i], j);
                decay.x[i][j] = expf(-expf(there ? number(next_w[i], j) : ENDLESS));
            }
        }

        // Blocks of 2: of the pairs, a step and itself, and 2g+1 with 2g. Then r and k become r * start and k * end.
        Tile scores;
        float whole[4], own[2] = {}, neighbours = 0, u[4];
        if constexpr (OUTPUT) read(u, p.u + head % heads * size + key, mine);
#pragma unroll
        for (int j = 0; j < 4; j++) {
            if constexpr (OUTPUT) {
                own[0] += r.x[0][j] * u[j] * k.x[0][j], own[1] += r.x[1][j] * u[j] * k.x[1][j];
                neighbours += r.x[1][j] * k.x[0][j];
                r.x[1][j] *= decay.x[0][j];
            }
            k.x[0][j] *= decay.x[1][j];
            whole[j] = decay.x[0][j] * decay.x[1][j];
        }
        if constexpr (OUTPUT) {
            own[0] = sum_columns(own[0]), own[1] = sum_columns(own[1]), neighbours = sum_columns(neighbours);
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const int t = 2 * g + i, at = 4 * q + j;
                    scores.x[i][j] = at == t ? own[i] : i && at == t - 1 ? neighbours : 0;
                }
        }
#pragma unroll
        for (int level = 1; level < 4; level++) {
            if constexpr (OUTPUT) {
                const Tile pairs = multiply(operand<PARTS<T>>(r), operand<PARTS<T>>(k));
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) {
                        const int row = g >> (level - 1), column = level == 1 ? 2 * q + j / 2 : q >> (level - 2);
                        if (row % 2 && column == row - 1) scores.x[i][j] = pairs.x[i][j];
                    }
            }
            const bool second = g >> (level - 1) & 1;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const float other = __shfl_xor_sync(~0u, whole[j], 2 << level);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    if constexpr (OUTPUT) r.x[i][j] *= second ? other : 1;
                    k.x[i][j] *= second ? 1 : other;
                }
                whole[j] *= other;
            }
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            passed[j] *= whole[j];
#pragma unroll
            for (int i = 0; i < 2; i++) turned[(4 * q + j) * LINE + 2 * g + i] = k.x[i][j];
        }

        // One barrier a tile: behind it lie this tile's values and the warps' parts of the last tile's y, and the buffers of
        // the next values and of this y are free.
        cp_async_wait();
        __syncthreads();
        if (tile + 1 < end_tile) fetch(tile + 1), copy_values(tile + 1);
        if constexpr (OUTPUT)
            if (tile > first) put_out(tile - 1);

        const Operand<2> write = operand<2>(rows(turned, LINE, g, q));
        Operand<PARTS<T>> read, pairs;
        if constexpr (OUTPUT) read = operand<PARTS<T>>(r), pairs = operand<PARTS<T>>(scores);
#pragma unroll
        for (int m = 0; m < M; m++) {
            const Operand<PARTS<T>> v = given<T>(columns(values + tile % 2 * TILE * V_LINE + m * TILE, V_LINE, g, q));
            if constexpr (OUTPUT) {
                Tile y = multiply(pairs, v);
                add_product(y, read, operand<PARTS<T>>(s[m]));
                put(sums + (tile % 2 * warps + warp) * TILE * Y_LINE + m * TILE, Y_LINE, y, g, q);
            }
            const Tile added = multiply(v, write);
#pragma unroll
            for (int i = 0; i < 2; i++)
#pragma unroll
                for (int j = 0; j < 4; j++) s[m].x[i][j] = s[m].x[i][j] * whole[j] + added.x[i][j];
        }
        __syncwarp();  // `turned` is read
    }
    if constexpr (OUTPUT) {
        __syncthreads();
        put_out(end_tile - 1);
        if (segment == segments - 1) save(p.final + int64_t(head) * size * size);
    } else {
        save(before((segment + 1) * per));
        store(p.decays + (int64_t(head) * (segments - 1) + segment) * size + key, passed, mine && g == 0 && blockIdx.y == 0);
    }
}

// From what each segment adds, in its successor's place in `before`, to the state before each. A thread for each number of it.
__global__ void __launch_bounds__(256) scan(const float* state, const float* decays, float* before, Shape shape, int64_t per) {
    constexpr int AHEAD = 8;  // loads that wait for memory together
    const int64_t square = shape.size * shape.size, i = int64_t(blockIdx.x) * 256 + threadIdx.x, head = i / square;
    if (head >= shape.batch * shape.heads) return;
    const int64_t chunks = shape.chunks(), segments = (chunks + per - 1) / per;
    const float* const decay = decays + head * (segments - 1) * shape.size + i % shape.size;
    float* const at = before + head * chunks * square + i % square;
    float s = state[i];
    at[0] = s;
    for (int64_t n = 1; n < segments; n += AHEAD) {
        float added[AHEAD], by[AHEAD];
#pragma unroll
        for (int m = 0; m < AHEAD; m++)
            if (n + m < segments) added[m] = at[(n + m) * per * square], by[m] = decay[(n + m - 1) * shape.size];
#pragma unroll
        for (int m = 0; m < AHEAD; m++)
            if (n + m < segments) at[(n + m) * per * square] = s = s * by[m] + added[m];
    }
}

template <class T, int VALUES, bool OUTPUT>
int launch_walk(const Walk<T>& p, int64_t segments, int64_t stream) {
    const int64_t warps = (p.shape.size + TILE - 1) / TILE, splits = (p.shape.size + VALUES - 1) / VALUES;
    const dim3 grid(unsigned(p.shape.batch * p.shape.heads), unsigned(splits), unsigned(segments));
    return LAUNCH(walk<T, VALUES, OUTPUT>, grid, dim3(unsigned(warps * WARP)), walk_shared<T, VALUES, OUTPUT>(warps), stream, p);
}

template <class T, int VALUES>
int run_walk(const Walk<T>& p, int64_t stream) {
    const int64_t segments = (p.shape.chunks() + p.per - 1) / p.per;
    if (segments > 1) {
        if (const int error = launch_walk<T, VALUES, false>(p, segments - 1, stream)) return error;
        const int64_t numbers = p.shape.batch * p.shape.heads * p.shape.size * p.shape.size;
        const dim3 grid(unsigned((numbers + 255) / 256));
        if (const int error = LAUNCH(scan, grid, dim3(256), 0, stream, p.state, p.decays, p.before, p.shape, p.per)) return error;
    }
    return launch_walk<T, VALUES, true>(p, segments, stream);
}

// How many values a block takes follows from what fits: a warp for each 16 keys, and its part of the state in its registers.
template <class T>
int run_walk(const Walk<T>& p, int64_t stream) {
    if (p.shape.size <= 16) return run_walk<T, 16>(p, stream);
    if (p.shape.size > 32 && p.shape.size <= 64) return run_walk<T, 64>(p, stream);
    return run_walk<T, 32>(p, stream);
}

// ---------------------------------------------------------------------------------------------------------------- gradients

template <class T>
struct Gradients {
    const T *r, *k, *v, *w, *dy;
    const float *u;
    const float *before, *after;  // (B H, chunks, N, N): S before each chunk; D after each, the last chunk's first
    T *dr, *dk, *dw;
    float* du;  // (chunks, B, H, N)
    Shape shape;
};

constexpr int GROUP = 64;                             // of keys, which a block takes; and of values, which it goes through
constexpr int PAIRS = TILES * (TILES + 1) / 2;        // tiles of pairs (t, s) in a chunk that have s <= t
DEVICE constexpr int pair(int t, int s) { return t * (t + 1) / 2 + s; }

template <class T>
size_t gradients_shared(int64_t warps) {
    return 4 * (PAIRS * TILE * LINE + warps * TILES * 2 * TILE * TILE) + 2 * CHUNK * (GROUP * sizeof(T) + 16);
}

// Products of decays in a tile whose rows are keys, columns steps: from the start of a block until before a step, and after it
// until the block's end. Of blocks of 4, which are a lane's own columns; and what makes these the ones of blocks of 8 and 16.
struct Spans {
    Tile start, end;
    float start8[2], end8[2], start16[2], end16[2], whole[2];
};

DEVICE Spans spans_of(const Tile& decay, int q) {
    Spans s;
#pragma unroll
    for (int i = 0; i < 2; i++) {
        const float(&d)[4] = decay.x[i];
        const float first = d[0] * d[1], second = d[2] * d[3], whole = first * second;
        s.start.x[i][0] = 1, s.start.x[i][1] = d[0], s.start.x[i][2] = first, s.start.x[i][3] = first * d[2];
        s.end.x[i][0] = d[1] * second, s.end.x[i][1] = second, s.end.x[i][2] = d[3], s.end.x[i][3] = 1;
        const float next = __shfl_xor_sync(~0u, whole, 1);
        s.start8[i] = q & 1 ? next : 1, s.end8[i] = q & 1 ? 1 : next;
        const float far = __shfl_xor_sync(~0u, whole * next, 2);
        s.start16[i] = q & 2 ? s.start8[i] * far : s.start8[i], s.end16[i] = q & 2 ? s.end8[i] : s.end8[i] * far;
        s.whole[i] = whole * next * far;
    }
    return s;
}

DEVICE Tile scale(const Tile& x, const Tile& by, const float (&and_by)[2]) {
    Tile y;
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) y.x[i][j] = x.x[i][j] * (by.x[i][j] * and_by[i]);
    return y;
}

DEVICE void add_scaled(Tile& sum, const Tile& x, const Tile& by, const float (&and_by)[2]) {
#pragma unroll
    for (int i = 0; i < 2; i++)
#pragma unroll
        for (int j = 0; j < 4; j++) sum.x[i][j] += x.x[i][j] * (by.x[i][j] * and_by[i]);
}

DEVICE float dot(const float (&a)[4], const float (&b)[4]) {
    return (a[0] * b[0] + a[1] * b[1]) + (a[2] * b[2] + a[3] * b[3]);
}

// A block takes a chunk of a head and 64 of its keys, a warp 16 of these. Tiles have keys as rows, and steps or values as columns.
template <class T>
__global__ void __launch_bounds__(128, sizeof(T) == 2 ? 3 : 2) gradients(const Gradients<T> p) {
    constexpr int V_LINE = GROUP + 16 / sizeof(T);
    constexpr int P = PARTS<T>;
    DYNAMIC_SHARED(float, shared);
    const int warps = blockDim.x / WARP, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, g = lane / 4, q = lane % 4;
    float* const pairs = shared;                                                                    // PAIRS, TILE, LINE
    float* const scaled = pairs + PAIRS * TILE * LINE + warp * TILES * 2 * TILE * TILE + lane * 4;  // TILES, 2, 2, WARP, 4
    T* const values = reinterpret_cast<T*>(pairs + PAIRS * TILE * LINE + warps * TILES * 2 * TILE * TILE);  // CHUNK, V_LINE
    T* const dys = values + CHUNK * V_LINE;

    const int head = blockIdx.x, heads = int(p.shape.heads), size = int(p.shape.size), steps = int(p.shape.steps);
    const int chunk = blockIdx.z, chunks = gridDim.z;
    const int64_t stride = int64_t(heads) * size, base = (int64_t(head / heads) * steps * heads + head % heads) * size;
    const int key = blockIdx.y * GROUP + warp * TILE + 2 * g;
    const bool mine = key < size;

    const auto copy_group = [&](int from) {
        for (int n = threadIdx.x; n < CHUNK * GROUP / 4; n += blockDim.x) {
            const int i = n / (GROUP / 4), column = n % (GROUP / 4) * 4;
            const int t = chunk * CHUNK + i;
            const int64_t at = base + t * stride + from + column;
            const bool there = t < steps && from + column < size;
            cp_async<4 * sizeof(T)>(values + i * V_LINE + column, p.v + at, there);
            cp_async<4 * sizeof(T)>(dys + i * V_LINE + column, p.dy + at, there);
        }
        cp_async_commit();
    };
    const int first = chunk * CHUNK + 4 * q;  // this lane's columns are the steps first + 16 n + j
    const int64_t origin = base + first * stride + key;
    const auto fetch = [&](const T* from, int n) {
        Tile tile;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const Few<T, 2> few = load<2>(from + origin + (n * TILE + j) * stride, mine && first + n * TILE + j < steps);
            tile.x[0][j] = number(few, 0), tile.x[1][j] = number(few, 1);
        }
        return tile;
    };
    const auto decay_of = [&](Tile& rate, int n) {  // of `rate` = exp(w)
        Tile decay;
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const bool there = first + n * TILE + j < steps;
#pragma unroll
            for (int i = 0; i < 2; i++) {
                rate.x[i][j] = expf(there ? rate.x[i][j] : ENDLESS);
                decay.x[i][j] = expf(-rate.x[i][j]);
            }
        }
        return decay;
    };
    // A lane's own: r * start and k * end over whole tiles; in the end, their gradients.
    const auto keep = [&](int n, int which, const Tile& tile) {
#pragma unroll
        for (int i = 0; i < 2; i++) store(scaled + ((n * 2 + which) * 2 + i) * WARP * 4, tile.x[i]);
    };
    const auto kept = [&](int n, int which) {
        Tile tile;
#pragma unroll
        for (int i = 0; i < 2; i++) read(tile.x[i], scaled + ((n * 2 + which) * 2 + i) * WARP * 4);
        return tile;
    };
    constexpr int READ = 0, WRITE = 1;

    copy_group(0);
    float whole[TILES][2];
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const Tile r = fetch(p.r, n), k = fetch(p.k, n);
        Tile rate = fetch(p.w, n);
        const Spans spans = spans_of(decay_of(rate, n), q);
        whole[n][0] = spans.whole[0], whole[n][1] = spans.whole[1];
        keep(n, READ, scale(r, spans.start, spans.start16)), keep(n, WRITE, scale(k, spans.end, spans.end16));
    }

    // dread and dwrite are the gradients of what `scaled` has; first by the states on either side, and dy v' of all pairs.
    Tile dread[TILES] = {}, dwrite[TILES] = {};
    float across[2] = {};  // S . D
    const float* const before = p.before + (int64_t(head) * chunks + chunk) * size * size;
    const float* const after = p.after + (int64_t(head) * chunks + chunks - 1 - chunk) * size * size;
    for (int from = 0; from < size; from += GROUP) {
        if (from) {
            __syncthreads();
            copy_group(from);
        }
        cp_async_wait();
        __syncthreads();
#pragma unroll 1
        for (int m = 0; m < GROUP && from + m < size; m += TILE) {
            Tile s, d;
#pragma unroll
            for (int j = 0; j < 4; j++) {
                const int value = from + m + 4 * q + j;
                const bool there = mine && value < size;
                const Few<float, 2> few_s = load<2>(before + value * size + key, there);
                const Few<float, 2> few_d = load<2>(after + value * size + key, there);
#pragma unroll
                for (int i = 0; i < 2; i++) {
                    s.x[i][j] = number(few_s, i), d.x[i][j] = number(few_d, i);
                    across[i] += s.x[i][j] * d.x[i][j];
                }
            }
            const Operand<P> of_s = operand<P>(s), of_d = operand<P>(d);
#pragma unroll
            for (int n = 0; n < TILES; n++) {
                add_product(dread[n], of_s, given<T>(rows(dys + n * TILE * V_LINE + m, V_LINE, g, q)));
                add_product(dwrite[n], of_d, given<T>(rows(values + n * TILE * V_LINE + m, V_LINE, g, q)));
            }
        }
        for (int n = warp; n < PAIRS; n += warps) {
            const int t = n >= 6 ? 3 : n >= 3 ? 2 : n >= 1 ? 1 : 0, at = n - pair(t, 0);
            Tile of_pairs = {};
            for (int m = 0; m < GROUP && from + m < size; m += TILE)
                add_product(of_pairs, given<T>(rows(dys + t * TILE * V_LINE + m, V_LINE, g, q)),
                            given<T>(rows(values + at * TILE * V_LINE + m, V_LINE, g, q)));
            if (from) {
                const Tile sofar = rows(pairs + n * TILE * LINE, LINE, g, q);
#pragma unroll
                for (int i = 0; i < 2; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) of_pairs.x[i][j] += sofar.x[i][j];
            }
            put(pairs + n * TILE * LINE, LINE, of_pairs, g, q);
        }
    }
    __syncthreads();

    // What passes whole tiles.
    float passing[TILES][2] = {};
#pragma unroll
    for (int n = 0; n < TILES; n++) {
        const Tile read = kept(n, READ), write = kept(n, WRITE);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float earlier = 1, later = 1, reads = 0, writes = 0;
#pragma unroll
            for (int m = 0; m < n; m++) earlier *= whole[m][i];
#pragma unroll
            for (int m = n + 1; m < TILES; m++) later *= whole[m][i];
#pragma unroll
            for (int j = 0; j < 4; j++) {
                reads += (dread[n].x[i][j] *= earlier) * read.x[i][j];
                writes += (dwrite[n].x[i][j] *= later) * write.x[i][j];
            }
            passing[n][i] += earlier * whole[n][i] * later * across[i];
#pragma unroll
            for (int m = 0; m < n; m++) passing[m][i] += reads;
#pragma unroll
            for (int m = n + 1; m < TILES; m++) passing[m][i] += writes;
        }
    }
    // Pairs whose steps are in different tiles.
#pragma unroll
    for (int t = 1; t < TILES; t++) {
        const Tile read = kept(t, READ);
        const Operand<P> of_read = operand<P>(read);
#pragma unroll
        for (int at = 0; at < t; at++) {
            const float* const of_pairs = pairs + pair(t, at) * TILE * LINE;
            const Tile dreads = multiply(operand<P>(kept(at, WRITE)), operand<P>(rows(of_pairs, LINE, g, q)));
            const Tile dwrites = multiply(of_read, operand<P>(columns(of_pairs, LINE, g, q)));
#pragma unroll
            for (int i = 0; i < 2; i++) {
                float between = 1, reads = 0;
#pragma unroll
                for (int m = at + 1; m < t; m++) between *= whole[m][i];
#pragma unroll
                for (int j = 0; j < 4; j++) {
                    const float x = between * dreads.x[i][j];
                    dread[t].x[i][j] += x, reads += x * read.x[i][j];
                    dwrite[at].x[i][j] += between * dwrites.x[i][j];
                }
#pragma unroll
                for (int m = at + 1; m < t; m++) passing[m][i] += reads;
            }
        }
    }

#pragma unroll
    for (int n = 0; n < TILES; n++) keep(n, READ, dread[n]), keep(n, WRITE, dwrite[n]);

    // Within each tile, where everything comes together: first what passes most decays. With blocks halved, the log decay of a
    // step in the first half of one has, in its gradient, all that reads in the second half and passes its start; that of a
    // step in the second half, all that is written in the first and passes its end.
    float u[2], du[2] = {};
    read(u, p.u + head % heads * size + key, mine);
#pragma unroll 1
    for (int n = 0; n < TILES; n++) {
        const float* const of_pairs = pairs + pair(n, n) * TILE * LINE;
        const Tile r = fetch(p.r, n), k = fetch(p.k, n);
        Tile rate = fetch(p.w, n);
        const Tile decay = decay_of(rate, n);
        const Spans spans = spans_of(decay, q);
        const auto part = [&](auto level, Tile& dr, Tile& dk, const float(&start)[2], const float(&end)[2]) {
            Tile forth = rows(of_pairs, LINE, g, q), back = columns(of_pairs, LINE, g, q);
            const int row = g >> (decltype(level)::value - 1), column = q >> (decltype(level)::value - 2);  // blocks of 2^level
            if (!(row % 2 && column == row - 1)) forth = {};
            if (!(column % 2 && row == column - 1)) back = {};
            add_scaled(dr, multiply(operand<P>(scale(k, spans.end, end)), operand<P>(forth)), spans.start, start);
            add_scaled(dk, multiply(operand<P>(scale(r, spans.start, start)), operand<P>(back)), spans.end, end);
        };
        const float none[2] = {1, 1};
        float of_lanes[2];  // what all of a lane's columns have
        Tile dr = scale(kept(n, READ), spans.start, spans.start16), dk = scale(kept(n, WRITE), spans.end, spans.end16);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            float far = q & 2 ? dot(r.x[i], dr.x[i]) : dot(k.x[i], dk.x[i]);
            far += __shfl_xor_sync(~0u, far, 1);
            far = __shfl_xor_sync(~0u, far, 2);
            float of_tile = passing[0][i];
#pragma unroll
            for (int m = 1; m < TILES; m++) of_tile = n == m ? passing[m][i] : of_tile;
            of_lanes[i] = far + sum_columns(of_tile);
        }
        part(Level<3>{}, dr, dk, spans.start8, spans.end8);
#pragma unroll
        for (int i = 0; i < 2; i++)
            of_lanes[i] += __shfl_xor_sync(~0u, q & 1 ? dot(r.x[i], dr.x[i]) : dot(k.x[i], dk.x[i]), 1);
        part(Level<2>{}, dr, dk, none, none);

        float own[4][4];  // of the pairs, those of this lane's columns
#pragma unroll
        for (int j = 0; j < 4; j++)
#pragma unroll
            for (int m = 0; m <= j; m++) own[j][m] = of_pairs[(4 * q + j) * LINE + 4 * q + m];
        Tile dw;
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const float(&R)[4] = r.x[i], (&K)[4] = k.x[i], (&D)[4] = decay.x[i];
            float(&dR)[4] = dr.x[i], (&dK)[4] = dk.x[i];
            const float first = of_lanes[i] + (R[2] * dR[2] + R[3] * dR[3]), second = of_lanes[i] + (K[0] * dK[0] + K[1] * dK[1]);
            const float write[2] = {K[0] * D[1], K[1]}, read[2] = {R[2], R[3] * D[2]};
            dR[2] += write[0] * own[2][0] + write[1] * own[2][1], dR[3] += D[2] * (write[0] * own[3][0] + write[1] * own[3][1]);
            dK[0] += D[1] * (read[0] * own[2][0] + read[1] * own[3][0]), dK[1] += read[0] * own[2][1] + read[1] * own[3][1];
            dw.x[i][0] = -rate.x[i][0] * (first + R[1] * dR[1]), dw.x[i][1] = -rate.x[i][1] * (first + K[0] * dK[0]);
            dw.x[i][2] = -rate.x[i][2] * (second + R[3] * dR[3]), dw.x[i][3] = -rate.x[i][3] * (second + K[2] * dK[2]);
            dR[1] += K[0] * own[1][0], dK[0] += R[1] * own[1][0];
            dR[3] += K[2] * own[3][2], dK[2] += R[3] * own[3][2];
#pragma unroll
            for (int j = 0; j < 4; j++) dR[j] += u[i] * K[j] * own[j][j], dK[j] += u[i] * R[j] * own[j][j], du[i] += R[j] * K[j] * own[j][j];
        }
#pragma unroll
        for (int j = 0; j < 4; j++) {
            const int64_t at = origin + (n * TILE + j) * stride;
            const bool there = mine && first + n * TILE + j < steps;
            store<T, 2>(p.dr + at, {dr.x[0][j], dr.x[1][j]}, there);
            store<T, 2>(p.dk + at, {dk.x[0][j], dk.x[1][j]}, there);
            store<T, 2>(p.dw + at, {dw.x[0][j], dw.x[1][j]}, there);
        }
    }
    du[0] = sum_columns(du[0]), du[1] = sum_columns(du[1]);
    store(p.du + (int64_t(chunk) * gridDim.x + head) * size + key, du, mine && q == 0);
}

// sums[c] = the sum of rows[0][c], rows[1][c], ..., always in the same order.
__global__ void __launch_bounds__(256) add_rows(const float* rows, float* sums, int64_t count, int64_t columns) {
    SHARED(float, parts, 256);
    const int64_t column = int64_t(blockIdx.x) * 32 + threadIdx.x % 32;
    float sum = 0;
    if (column < columns)
#pragma unroll 4
        for (int64_t n = threadIdx.x / 32; n < count; n += 8) sum += rows[n * columns + column];
    parts[threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.x >= 32 || column >= columns) return;
    for (int n = 1; n < 8; n++) sum += parts[n * 32 + threadIdx.x];
    sums[column] = sum;
}

template <class T>
int run_gradients(const Gradients<T>& p, float* du, int64_t stream) {
    const Shape& s = p.shape;
    const int64_t warps = min(int64_t(GROUP), s.size + TILE - 1) / TILE, groups = (s.size + GROUP - 1) / GROUP;
    const dim3 grid(unsigned(s.batch * s.heads), unsigned(groups), unsigned(s.chunks()));
    const dim3 block(unsigned(warps * WARP));
    if (const int error = LAUNCH(gradients<T>, grid, block, gradients_shared<T>(warps), stream, p)) return error;
    const int64_t columns = s.heads * s.size, count = s.chunks() * s.batch;
    return LAUNCH(add_rows, dim3(unsigned((columns + 31) / 32)), dim3(256), 0, stream, p.du, du, count, columns);
}

}  // namespace

// r, k, v, w, y: (B, T, H, N) contiguous, aligned to 16 bytes, all bfloat16 if `is_bf16`, else float32. u: (H, N) float32.
// state, final: (B, H, N, N) float32, value by key. before: (B H, chunks of 64, N, N), the states before each, or null, if
// there is one segment. decays: (B H, segments - 1, N), if there are more. per: chunks in a segment.
struct Wkv6Forward {
    const void *r, *k, *v, *w;
    const float *u, *state;
    void* y;
    float *final, *before, *decays;
    Shape shape;
    int64_t per, is_bf16, stream;
};

template <class T>
static int forward(const Wkv6Forward& f) {
    const auto in = [](const void* x) { return static_cast<const T*>(x); };
    return run_walk<T>({in(f.r), in(f.k), in(f.v), in(f.w), f.u, f.state, static_cast<T*>(f.y), f.final, f.before, f.decays,
                        f.shape, f.per, false}, f.stream);
}

extern "C" int rwkv_wkv6_forward(const Wkv6Forward* f) { return f->is_bf16 ? forward<bf16>(*f) : forward<float>(*f); }

// As above. dy and the gradients are like their inputs, du float32. after: like `before`, decays as there, dus: (chunks, B, H, N)
// float32: scratch.
struct Wkv6Backward {
    const void *r, *k, *v, *w;
    const float *u, *before;
    const void* dy;
    const float* dfinal;
    void *dr, *dk, *dv, *dw;
    float *du, *dstate, *after, *decays, *dus;
    Shape shape;
    int64_t per, is_bf16, stream;
};

template <class T>
static int backward(const Wkv6Backward& f) {
    const auto in = [](const void* x) { return static_cast<const T*>(x); };
    const auto out = [](void* x) { return static_cast<T*>(x); };
    if (const int error = run_walk<T>({in(f.k), in(f.r), in(f.dy), in(f.w), f.u, f.dfinal, out(f.dv), f.dstate, f.after, f.decays,
                                       f.shape, f.per, true}, f.stream))
        return error;
    return run_gradients<T>({in(f.r), in(f.k), in(f.v), in(f.w), in(f.dy), f.u, f.before, f.after, out(f.dr), out(f.dk),
                             out(f.dw), f.dus, f.shape}, f.du, f.stream);
}

extern "C" int rwkv_wkv6_backward(const Wkv6Backward* f) { return f->is_bf16 ? backward<bf16>(*f) : backward<float>(*f); }
