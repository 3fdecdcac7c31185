// WKV-7 on tensor cores: chunks of 16 steps as products of small matrices. The equations are in kernels/wkv7.py.
//
// The caller's heads have N channels, a multiple of 8; here they have KEYS, the rest zeros. Rows of a state S (values by keys) never
// meet in the recurrence, so a warp has 16 of them, in registers, and a block up to KEYS. In a chunk, with c_t the sum of the log
// decays up to and with step t, and c before step t in a's exponent,
//
//   q = r e^c   a = a e^c   k = k e^-c   b = b e^-c        e^-c <= e^(16 exp(-1/2)) = 16392, so that nothing leaves the range
//   M = (I - tril_-1(a b'))^-1
//   u = M (tril_-1(a k') v + a S')   y = tril(q k') v + tril(q b') u + q S'   S <- (S + v' k + u' b) e^c_last
//
// and backwards, D the gradient of S at the chunk's end, with D <- D e^c_last first,
//
//   du = tril(q b')' dy + b D'   dz = M' du   dv = tril(q k')' dy + k D' + tril_-1(a k')' dz   D <- D + dy' q + dz' a
//
// and the gradients of the keys' side at `key_gradients`. A warp works on transposes of u, y, du, dz, dv, as rows of values by steps:
// then each product's result is the next one's operand as it stands in registers, and S is one without ever leaving them.
//
// Two schedules. Fused: a block walks over all chunks of a head. Parallel, for fewer heads than the GPU has room for: a segment of 64
// steps makes  S diag(e) + S P + Q  of a state S. All P and Q at once are what the same kernel makes of the identity and of 0; a scan
// gives the states between segments; and from these all segments are done at once. Backwards D obeys the transposed map, which the
// value side above makes of the identity, and of 0. Either way the states before segments are what the forward keeps.
//
// Estimates for an H200 at B8 T4096 H64 N64 bfloat16 (2.1 M token-heads, 512 blocks, 993 chunks to an SM of 132):
//   forward   47 KB and 128 registers: 4 blocks to an SM, all blocks at once. A chunk is 0.7 M products on tensor cores (0.7 k
//             cycles at 1024 tf32 operations a cycle), 1.0 k cycles of shared memory, and @FWD@ k instructions of each of 4 warps: 0.7 ms
//             if these overlap badly; memory 1.88 GB and 0.13 GB of kept states, 0.47 ms.
//   backward  78 KB and 255 registers: 2 blocks to an SM, in 2 turns. A chunk, its forward again included, is 2.2 M products, 3.9 k
//             cycles of shared memory, @BWD@ k instructions of each warp: 2.3 to 2.8 ms; memory 3.5 GB, 0.8 ms.
// Shared memory is the limit, then instructions; tf32 is not. In parallel, forward is 2.2 times and backward 1.5 times the work: B1
// T1024 H40, 640 blocks in 2 (forward) or 3 turns of 4 chunks, 0.05 + 0.09 ms, where fused is 0.1 + 0.3; B1 T4096 H12 about the same.
#include <algorithm>
#include <type_traits>

#include "tile.h"

namespace {

constexpr int CHUNK = 16, SEGMENT = 64, PER = SEGMENT / CHUNK;

// Warps of a block: as many as KEYS have rows for, or fewer where shared memory is short.
constexpr int MANY = KEYS == 128 ? 8 : 4, FEW = KEYS == 64 ? 4 : KEYS == 128 ? 2 : 1;

enum { FORWARD, ADJOINT, BACKWARD };

// Blocks that an SM should hold: it bounds the registers.
constexpr int blocks(bool exact, int kind) { return KEYS > 64 ? 1 : kind == BACKWARD || exact ? 2 : 4; }

// Whether the backward's state and E stay out of shared memory, which they would fill.
constexpr bool LEAN = KEYS > 128;

// The tiles that a kernel needs beside those of a and b.
enum { Q = 1, K = 2, E = 4 };

// The 16 x 16 matrices of a chunk: tril_-1(a b'), ..., and M. Then, backwards, the gradients of the first four, and these transposed.
enum { AB, AK, QK, QB, INVERSE, SCORES, TURNED = 4, SQUARES = 8 };

constexpr float RATE = 0.6065306597126334f, LOG2_E = 1.4426950408889634f;  // the log decay is -RATE sigmoid(w)

template <class T>
constexpr bool EXACT = sizeof(T) == 4;

// ------------------------------------------------------------------------------------------------------ records, as ctypes packs them

struct Shape {
    int64_t batch, steps, heads, size, is_bf16;
    int64_t parallel, warps;  // as rwkv_wkv7_plan has said
};

struct Inputs { const void *r, *w, *k, *v, *a, *b; };

struct Forward {
    Shape s;
    Inputs in;
    const float* state;
    void* y;
    float *final, *kept;  // kept: (B, H, segments, N, N), or null
    float* maps;          // scratch, if parallel
    int64_t stream;
};

struct Backward {
    Shape s;
    Inputs in;
    const float* kept;
    const void* dy;
    const float* dfinal;
    void *dr, *dw, *dk, *dv, *da, *db;
    float* dstate;
    float *states, *parts, *maps, *ends;  // scratch; `ends`: the gradients of the states at the ends of segments
    int64_t stream;
};

// ------------------------------------------------------------------------------------------------------------- a block and its memory

// Where things lie in shared memory, in bytes.
template <class T, int WARPS, int KIND>
struct Layout {
    static constexpr int ROWS = 16 * WARPS, WIDE = (ROWS + 31) / 32 * 32, TILE = CHUNK * KEYS * 4;
    static constexpr int VALUES = (Rows<T, ROWS>::BYTES), BACK = KIND == BACKWARD;
    static constexpr int a = 0, b = a + TILE, q = b + TILE, k = q + TILE, e = k + (KIND != ADJOINT) * TILE;
    static constexpr int u = e + (BACK && !LEAN) * TILE, dz = u + BACK * CHUNK * WIDE * 4, S = dz + BACK * CHUNK * WIDE * 4;
    static constexpr int D = S + (BACK && !LEAN) * ROWS * KEYS * 4, squares = D + BACK * ROWS * KEYS * 4;
    static constexpr int out = squares + SCORES * SQUARE * 4;  // where squares are that come when it is done with
    static constexpr int decay = out + BACK * std::max(VALUES, (SQUARES - SCORES) * SQUARE * 4), all_decay = decay + KEYS * 4;
    static constexpr int v = all_decay + KEYS * 4, dy = v + (KIND != ADJOINT) * 2 * VALUES, END = dy + (KIND != FORWARD) * 2 * VALUES;
};

// Two neighbours of a row.
template <class T> struct Pair;
template <> struct Pair<float> { using Type = float2; };
template <> struct Pair<bf16> { using Type = uint32_t; };

// What a thread has read ahead of r, w, k, a, b: columns 2 (thread / 4) and the next of rows 4h to 4h+3, where h = thread % 4.
template <class T>
struct Ahead { typename Pair<T>::Type r[4], w[4], k[4], a[4], b[4]; };

template <class T, int WARPS, int KIND>
struct Block {
    using Place = Layout<T, WARPS, KIND>;
    static constexpr int ROWS = 16 * WARPS, THREADS = 32 * WARPS;
    using Values = Rows<T, ROWS>;
    using Keys = Tile<KEYS>;
    unsigned char* memory;
    int steps, size, stride;  // a step's row to the next
    int batch_head, first_row;
    int64_t head;  // where step 0 of this head begins in (B, T, H, N)
    bool values;   // whether these rows have values, and are not of the identity

    DEVICE Block(const Shape& s, int parts) {
        DYNAMIC_SHARED(unsigned char, shared);
        memory = shared;
        steps = int(s.steps), size = int(s.size), stride = int(s.heads * s.size);
        batch_head = int(blockIdx.x) / parts;
        int heads = int(s.heads), batch = batch_head / heads;
        head = int64_t(batch) * steps * stride + (batch_head - batch * heads) * size;
        first_row = int(blockIdx.y) * ROWS, values = true;
    }

    DEVICE float* floats(int place) const { return reinterpret_cast<float*>(memory + place); }
    DEVICE Keys q() const { return {floats(Place::q)}; }
    DEVICE Keys a() const { return {floats(Place::a)}; }
    DEVICE Keys k() const { return {floats(Place::k)}; }
    DEVICE Keys b() const { return {floats(Place::b)}; }
    DEVICE Square square(int which) const { return {floats(Place::squares) + which * SQUARE}; }
    DEVICE float* decay() const { return floats(Place::decay); }
    // Of v and dy one of two buffers, in turn.
    DEVICE Values v(int turn) const { return {reinterpret_cast<T*>(memory + Place::v + turn % 2 * Place::VALUES)}; }
    DEVICE Values dy(int turn) const { return {reinterpret_cast<T*>(memory + Place::dy + turn % 2 * Place::VALUES)}; }

    DEVICE int warp() const { return int(threadIdx.x / 32); }
    DEVICE int own() const { return warp() * 16; }  // the first of this warp's rows within the block
    DEVICE int count(int chunk) const { return min(CHUNK, steps - chunk * CHUNK); }
    DEVICE int64_t start(int chunk) const { return head + int64_t(chunk) * CHUNK * stride; }
};

// At a distance in bytes from what all threads have in common.
template <class P>
DEVICE P load_at(const void* base, unsigned bytes) {
    return *reinterpret_cast<const P*>(static_cast<const char*>(base) + bytes);
}

// Read what `scale` will take of a chunk.
template <int WITH, class B, class T>
DEVICE void fetch(const B& s, const Inputs& in, int chunk, unsigned item, Ahead<T>& x) {
    using P = typename Pair<T>::Type;
    int j = int(item / 4 * 2), h = int(item % 4), count = (j < s.size ? s.count(chunk) : 0) - 4 * h;
    int64_t start = s.start(chunk);
    unsigned first = unsigned(4 * h * s.stride + j) * sizeof(T), pitch = unsigned(s.stride) * sizeof(T);
    auto all = [&](const void* input, P (&to)[4]) {
        const T* from = static_cast<const T*>(input) + start;
        UNROLL for (int i = 0; i < 4; i++) to[i] = i < count ? load_at<P>(from, first + i * pitch) : P{};
    };
    all(in.w, x.w), all(in.a, x.a), all(in.b, x.b);
    if (WITH & Q) all(in.r, x.r);
    if (WITH & K) all(in.k, x.k);
}

template <bool EXACT>
DEVICE float exponential(float x) {
    return EXACT ? expf(x) : fast_exp(x);
}
template <bool EXACT>
DEVICE float exponential2(float x) {
    return EXACT ? exp2f(x) : fast_exp2(x);
}
template <bool EXACT>
DEVICE float quotient(float x, float y) {
    return EXACT ? x / y : x * fast_reciprocal(y);
}

// Fill the tiles, E = e^c, and the decay of the whole chunk. Steps beyond the last are 0, and decay nothing. `ahead` is what this thread's
// first item needs.
template <int WITH, class T, class B, class TileE>
DEVICE void scale(const B& s, const Inputs& in, int chunk, const Ahead<T>& ahead, const TileE& e) {
    constexpr bool exact = EXACT<T>;
    int h = int(threadIdx.x % 4), count = s.count(chunk) - 4 * h;
    UNROLL for (int first = 0; first < 2 * KEYS; first += B::THREADS) {
        unsigned item = first + threadIdx.x;
        int j = int(item / 4 * 2 & ~7u), rest = int(item / 4 * 2 & 7);
        Ahead<T> x;
        if (first == 0)
            x = ahead;
        else
            fetch<WITH>(s, in, chunk, item, x);
        float c[4][2], up[5][2], down[4][2];  // up: from before the first row on
        UNROLL for (int i = 0; i < 4; i++) {
            float2 w = unpack(x.w[i]);
            float step[2] = {w.x, w.y};
            UNROLL for (int n = 0; n < 2; n++) {
                c[i][n] = i < count ? -quotient<exact>(RATE * LOG2_E, 1 + exponential<exact>(-step[n])) : 0;  // binary logarithms
                if (i) c[i][n] += c[i - 1][n];
            }
        }
        UNROLL for (int n = 0; n < 2; n++) {
            float sum = c[3][n];
            UNROLL for (int by = 1; by < 4; by *= 2) {
                float other = __shfl_up_sync(~0u, sum, by);
                sum += h >= by ? other : 0;
            }
            float before = __shfl_up_sync(~0u, sum, 1);
            if (h == 0) before = 0;
            up[0][n] = exponential2<exact>(before);
            UNROLL for (int i = 0; i < 4; i++) {
                up[i + 1][n] = exponential2<exact>(before + c[i][n]);
                down[i][n] = ready<exact>(exponential2<exact>(-(before + c[i][n])));
            }
        }
        if (h == 3) put_two(s.decay() + j + rest, up[4][0], up[4][1]);
        UNROLL for (int i = 0; i < 4; i++) {
            auto put = [&](const auto& tile, float2 y, float one, float two) {
                put_two(tile.at(h / 2 * 8, h % 2 * 4 + i, j, rest), y.x * one, y.y * two);
            };
            if (WITH & E) put(e, make_float2(1, 1), up[i + 1][0], up[i + 1][1]);
            if (i == 0) up[0][0] = ready<exact>(up[0][0]), up[0][1] = ready<exact>(up[0][1]);
            up[i + 1][0] = ready<exact>(up[i + 1][0]), up[i + 1][1] = ready<exact>(up[i + 1][1]);
            put(s.a(), unpack(x.a[i]), up[i][0], up[i][1]);
            put(s.b(), unpack(x.b[i]), down[i][0], down[i][1]);
            if (WITH & Q) put(s.q(), unpack(x.r[i]), up[i + 1][0], up[i + 1][1]);
            if (WITH & K) put(s.k(), unpack(x.k[i]), down[i][0], down[i][1]);
        }
    }
}

// Start to copy this warp's columns of a chunk's rows of values; zeros beyond the steps and the rows.
template <class T, class B>
DEVICE void copy_rows(const B& s, const void* input, int chunk, const typename B::Values& to) {
    constexpr int PIECE = 16 / int(sizeof(T)), PIECES = 16 / PIECE;
    int lane = lane_of(), i = s.own() + lane % PIECES * PIECE;
    int count = s.values && s.first_row + i < s.size ? s.count(chunk) : 0;
    const T* from = static_cast<const T*>(input) + s.start(chunk) + s.first_row + i;
    UNROLL for (int t = lane / PIECES; t < CHUNK; t += 32 / PIECES)
        cp_async(to.at(0, t, 0, i), t < count ? from + t * s.stride : static_cast<const T*>(input), t < count);
}

// A result of this warp's rows by 16 steps to memory, by way of its columns of `stage`.
template <class T, class B>
DEVICE void store_rows(const B& s, const float (&x)[2][4], const typename B::Values& stage, void* output, int chunk) {
    constexpr int PIECE = 16 / int(sizeof(T)), PIECES = 16 / PIECE;
    __syncwarp();
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int i = 0; i < 4; i++)
            put_one(stage.at(8 * n, 2 * lane_q() + i % 2, i / 2 * 8, s.own() + lane_g()), x[n][i]);
    __syncwarp();
    int lane = lane_of(), i = s.own() + lane % PIECES * PIECE;
    int count = s.first_row + i < s.size ? s.count(chunk) : 0;
    T* to = static_cast<T*>(output) + s.start(chunk) + s.first_row + i;
    UNROLL for (int t = lane / PIECES; t < CHUNK; t += 32 / PIECES)
        if (t < count) *reinterpret_cast<uint4*>(to + t * s.stride) = *reinterpret_cast<const uint4*>(stage.at(0, t, 0, i));
}

// Two left and four right operands of 16 terms of x and y, in the same order: far for two tiles.
template <int P>
DEVICE void operands(const Tile<P>& x, const Tile<P>& y, int j, Left (&rows)[2], Right (&columns)[2][2]) {
    UNROLL for (int m = 0; m < 2; m++) rows[m] = left_far(x, 0, j + 8 * m), rights_turned_far(y, 0, j + 8 * m, columns[m]);
}
template <int P, class T, int R>
DEVICE void operands(const Tile<P>& x, const Rows<T, R>& y, int j, Left (&rows)[2], Right (&columns)[2][2]) {
    UNROLL for (int m = 0; m < 2; m++) {
        rows[m] = left_far(x, 0, j + 8 * m);
        UNROLL for (int n = 0; n < 2; n++) columns[m][n] = right_turned(y, 8 * n, j + 8 * m);
    }
}
template <int P, class T, int R>
DEVICE void operands(const Rows<T, R>& x, const Tile<P>& y, int j, Left (&rows)[2], Right (&columns)[2][2]) {
    lefts(x, j, rows);
    UNROLL for (int m = 0; m < 2; m++) rights_turned_far(y, 0, j + 8 * m, columns[m]);
}
template <class T, int R>
DEVICE void operands(const Rows<T, R>& x, const Rows<T, R>& y, int j, Left (&rows)[2], Right (&columns)[2][2]) {
    lefts(x, j, rows);
    UNROLL for (int m = 0; m < 2; m++)
        UNROLL for (int n = 0; n < 2; n++) columns[m][n] = right_turned(y, 8 * n, j + 8 * m);
}

// tril(x y'), strictly or not, x and y 16 x WIDTH, times a factor; `turned` gets its transpose, if there is one.
template <bool EXACT, int WIDTH, class X, class Y>
DEVICE void score(const X& x, const Y& y, bool strict, float factor, const Square& to, const Square& turned) {
    float d[2][4] = {};
#pragma unroll 4
    for (int j = 0; j < WIDTH; j += 16) {
        Left rows[2];
        Right columns[2][2];
        operands(x, y, j, rows, columns);
        UNROLL for (int m = 0; m < 2; m++)
            UNROLL for (int n = 0; n < 2; n++) multiply<EXACT>(d[n], rows[m], columns[m][n]);
    }
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int half = 0; half < 2; half++) {
            int t = lane_g() + 8 * half, s = 8 * n + 2 * lane_q(), end = strict ? t : t + 1;
            float first = s < end ? d[n][2 * half] * factor : 0, second = s + 1 < end ? d[n][2 * half + 1] * factor : 0;
            put_two(to.at(8 * half, lane_g(), 8 * n, 2 * lane_q()), first, second);
            if (turned.data) {
                *turned.at(8 * n, 2 * lane_q(), 8 * half, lane_g()) = first;
                *turned.at(8 * n, 2 * lane_q() + 1, 8 * half, lane_g()) = second;
            }
        }
}

// (I - x)^-1 of a strictly lower triangular x by substitution, a column to a lane. Powers of x, which tensor cores would take,
// grow by up to C(15, 7) where keys are alike, and cancel.
template <bool EXACT>
DEVICE void invert(const Square& x, const Square& to) {
    __syncwarp();
    int column = int(threadIdx.x) % 16;
    float m[16];
    UNROLL for (int t = 0; t < 16; t++) {
        m[t] = t == column ? 1.0f : 0.0f;
        UNROLL for (int s = 0; s < t; s += 4) {
            float4 row = *reinterpret_cast<const float4*>(x.at(0, t, s, 0));
            float parts[4] = {row.x, row.y, row.z, row.w};
            UNROLL for (int i = 0; i < 4; i++)
                if (s + i < t) m[t] += parts[i] * m[s + i];
        }
        *to.at(0, t, 0, column) = ready<EXACT>(m[t]);
    }
}

// The scores of a chunk, shared out over the warps; the first inverts.
template <int WITH, class T, class B>
DEVICE void scores(const B& s) {
    constexpr bool exact = EXACT<T>;
#pragma unroll 1
    for (int task = s.warp(); task <= QB; task += B::THREADS / 32) {
        bool with_q = task >= QK, with_k = task == AK || task == QK;
        if ((with_q && !(WITH & Q)) || (with_k && !(WITH & K))) continue;
        using Place = typename B::Place;
        typename B::Keys x{s.floats(with_q ? Place::q : Place::a)}, y{s.floats(with_k ? Place::k : Place::b)};
        score<exact, KEYS>(x, y, !with_q, task == AB ? 1 : ready<exact>(1), s.square(task), Square{nullptr});
        if (task == AB) invert<exact>(s.square(AB), s.square(INVERSE));
    }
}

// A warp's rows of a state: N x N in memory, here 16 x KEYS with zeros beyond.
using State = float[KEYS / 8][4];

// f(where in memory, two numbers) for what is there.
template <class B, class F>
DEVICE void each_pair(const B& s, State& S, F&& f) {
    UNROLL for (int half = 0; half < 2; half++) {
        int row = s.first_row + s.own() + lane_g() + 8 * half, at = row * s.size + 2 * lane_q();
        if (row >= s.size) continue;
        if (s.size == KEYS) {
            UNROLL for (int n = 0; n < KEYS / 8; n++) f(at + 8 * n, S[n][2 * half], S[n][2 * half + 1]);
        } else {
            UNROLL for (int n = 0; n < KEYS / 8; n++)
                if (8 * n < s.size) f(at + 8 * n, S[n][2 * half], S[n][2 * half + 1]);
        }
    }
}

template <class B>
DEVICE void load_state(const B& s, const float* from, State& S) {
    UNROLL for (int n = 0; n < KEYS / 8; n++)
        UNROLL for (int i = 0; i < 4; i++) S[n][i] = 0;
    each_pair(s, S, [&](int at, float& x, float& y) {
        float2 pair = two(from + at);
        x = pair.x, y = pair.y;
    });
}

template <class B>
DEVICE void store_state(const B& s, State& S, float* to) {
    each_pair(s, S, [&](int at, float x, float y) { put_two(to + at, x, y); });
}

// To and from a Tile, or a Plain in scratch, of which this warp's rows begin at `row`; times a factor.
template <class X>
DEVICE void put_state(const State& S, const X& x, int row, float factor) {
    UNROLL for (int n = 0; n < KEYS / 8; n++)
        UNROLL for (int half = 0; half < 2; half++)
            put_two(x.at(row + 8 * half, lane_g(), 8 * n, 2 * lane_q()), S[n][2 * half] * factor, S[n][2 * half + 1] * factor);
}

template <class X>
DEVICE void get_state(State& S, const X& x, int row) {
    UNROLL for (int n = 0; n < KEYS / 8; n++)
        UNROLL for (int half = 0; half < 2; half++) {
            float2 pair = two(x.at(row + 8 * half, lane_g(), 8 * n, 2 * lane_q()));
            S[n][2 * half] = pair.x, S[n][2 * half + 1] = pair.y;
        }
}

template <class B>
DEVICE void decay_state(const B& s, State& S) {
    UNROLL for (int n = 0; n < KEYS / 8; n++) {
        float2 decay = two(s.decay() + 8 * n + 2 * lane_q());
        S[n][0] *= decay.x, S[n][1] *= decay.y, S[n][2] *= decay.x, S[n][3] *= decay.y;
    }
}

// d (rows of values by 16 steps) += x y', of columns 8n to 8n+7 of y.
template <class T>
DEVICE void times_turned(const Left& x, const Tile<KEYS>& y, int n, float (&d)[2][4]) {
    UNROLL for (int half = 0; half < 2; half++) multiply<EXACT<T>>(d[half], x, right_turned(y, 8 * half, 8 * n));
}

// d += x y' and d += x y, y lower triangular: a quarter of it is 0, and left out.
template <bool EXACT>
DEVICE void times_lower_turned(const Left (&x)[2], const Square& y, float (&d)[2][4]) {
    multiply<EXACT>(d[0], x[0], right_turned(y, 0, 0));
    UNROLL for (int n = 0; n < 2; n++) multiply<EXACT>(d[1], x[n], right_turned(y, 8, 8 * n));
}
template <bool EXACT>
DEVICE void times_lower(const Left (&x)[2], const Square& y, float (&d)[2][4]) {
    UNROLL for (int n = 0; n < 2; n++) multiply<EXACT>(d[0], x[n], right(y, 8 * n, 0));
    multiply<EXACT>(d[1], x[1], right(y, 8, 8));
}

// S += x y.
template <class T>
DEVICE void add_product(State& S, const Left (&x)[2], const Tile<KEYS>& y) {
    UNROLL for (int n = 0; n < KEYS / 8; n++)
        UNROLL for (int half = 0; half < 2; half++) multiply<EXACT<T>>(S[n], x[half], right(y, 8 * half, 8 * n));
}

template <bool EXACT>
DEVICE void as_lefts(const float (&d)[2][4], Left (&to)[2]) {
    UNROLL for (int n = 0; n < 2; n++) to[n] = as_left<EXACT>(d[n]);
}

// ------------------------------------------------------------------------------------------------------------------------- forward

// One chunk of a state, and of y if WITH has Q. The tiles are filled, v is on its way, and one more group of copies behind it.
template <int WITH, class T, class B>
DEVICE void advance(const B& s, State& S, int turn, int chunk, void* y_out) {
    constexpr bool exact = EXACT<T>;
    scores<WITH, T>(s);
    float z[2][4] = {}, y[2][4] = {}, result[2][4] = {};
    UNROLL for (int n = 0; n < KEYS / 8; n++) {
        Left x = as_left<exact>(S[n]);
        times_turned<T>(x, s.a(), n, z);
        if (WITH & Q) times_turned<T>(x, s.q(), n, y);
    }
    cp_async_wait<1>();
    __syncthreads();
    Left v[2], u[2];
    lefts_turned(s.v(turn), s.own(), v);
    times_lower_turned<exact>(v, s.square(AK), z);
    as_lefts<exact>(z, u);
    times_lower_turned<exact>(u, s.square(INVERSE), result);
    as_lefts<exact>(result, u);
    if (WITH & Q) {
        times_lower_turned<exact>(v, s.square(QK), y);
        times_lower_turned<exact>(u, s.square(QB), y);
        store_rows<T>(s, y, s.v(turn), y_out, chunk);  // only this warp reads these columns of v, and it has
    }
    add_product<T>(S, v, s.k());
    add_product<T>(S, u, s.b());
    decay_state(s, S);
}

// What a segment makes of a state, S e + S P + Q, in scratch: P without e on its diagonal, as e is not to be rounded.
struct Map {
    static constexpr int64_t FLOATS = (2 * KEYS + 1) * KEYS;
    float* data;
    DEVICE Plain<KEYS> q(int row) const { return {data + row * KEYS}; }
    DEVICE Plain<KEYS> p(int row) const { return {data + KEYS * KEYS + row * KEYS}; }
    DEVICE float* e() const { return data + 2 * KEYS * KEYS; }
};

// The rows of Q begin as 0, those of P as the identity, without values.
template <class B>
DEVICE void begin_map(B& s, State& S) {
    s.values = s.first_row < KEYS;
    s.first_row %= KEYS;
    UNROLL for (int n = 0; n < KEYS / 8; n++)
        UNROLL for (int i = 0; i < 4; i++) {
            int row = s.first_row + s.own() + lane_g() + i / 2 * 8, column = 8 * n + 2 * lane_q() + i % 2;
            S[n][i] = !s.values && row == column ? 1 : 0;
        }
}

template <class T, class B>
DEVICE void end_map(const B& s, State& S, float* maps) {
    Map map{maps + int64_t(blockIdx.x) * Map::FLOATS};
    const float* decay = s.floats(B::Place::all_decay);
    __syncthreads();
    if (s.values) {
        put_state(S, map.q(s.first_row), s.own(), 1);
        if (s.first_row == 0)
            for (int j = int(threadIdx.x); j < KEYS; j += B::THREADS) map.e()[j] = decay[j];
        return;
    }
    UNROLL for (int n = 0; n < KEYS / 8; n++)
        UNROLL for (int i = 0; i < 4; i++) {
            int row = s.first_row + s.own() + lane_g() + i / 2 * 8, column = 8 * n + 2 * lane_q() + i % 2;
            if (row == column) S[n][i] -= decay[column];
        }
    put_state(S, map.p(s.first_row), s.own(), ready<EXACT<T>>(1));
}

// The decay of all chunks so far, for the map.
template <class B>
DEVICE void gather_decay(const B& s, bool first) {
    float* all = s.floats(B::Place::all_decay);
    for (int j = int(threadIdx.x); j < KEYS; j += B::THREADS) all[j] = first ? s.decay()[j] : all[j] * s.decay()[j];
}

__host__ DEVICE int divide_up(int64_t x, int64_t by) { return int((x + by - 1) / by); }

// Of all chunks; or (parallel) of one segment, from the state that is kept of it; or, without Q, the map of a segment.
template <int WITH, class T, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, blocks(EXACT<T>, FORWARD)) forward(Forward c) {
    constexpr bool mapping = !(WITH & Q);
    int segments = divide_up(c.s.steps, SEGMENT), chunks = divide_up(c.s.steps, CHUNK);
    bool one = mapping || c.s.parallel;
    Block<T, WARPS, FORWARD> s(c.s, one ? segments : 1);
    int chunk = one ? int(blockIdx.x) % segments * PER : 0, end = one ? min(chunk + PER, chunks) : chunks;
    int64_t state_size = int64_t(s.size) * s.size;
    float* kept = c.kept ? c.kept + int64_t(s.batch_head) * segments * state_size : nullptr;
    State S;
    if (mapping)
        begin_map(s, S);
    else
        load_state(s, one ? kept + chunk / PER * state_size : c.state + s.batch_head * state_size, S);
    Ahead<T> ahead;
    fetch<WITH>(s, c.in, chunk, threadIdx.x, ahead);
    copy_rows<T>(s, c.in.v, chunk, s.v(0));
    cp_async_commit();
    for (int i = 0; chunk < end; i++, chunk++) {
        if (!one && kept && chunk % PER == 0) store_state(s, S, kept + chunk / PER * state_size);
        __syncthreads();
        scale<WITH>(s, c.in, chunk, ahead, s.a());
        __syncthreads();
        if (mapping) gather_decay(s, i == 0);
        if (chunk + 1 < end) {
            fetch<WITH>(s, c.in, chunk + 1, threadIdx.x, ahead);
            copy_rows<T>(s, c.in.v, chunk + 1, s.v(i + 1));
        }
        cp_async_commit();
        advance<WITH, T>(s, S, i, chunk, c.y);
    }
    if (mapping)
        end_map<T>(s, S, c.maps);
    else if (!one)
        store_state(s, S, c.final + s.batch_head * state_size);
}

struct Scan {
    int64_t segments, size, reverse;
    const float *first, *maps;
    float *before, *after;  // (B, H, segments, N, N): the state that each map is applied to; and the last
};

constexpr int STAGES = 4, ENTRY = 17 * KEYS, ENTRIES = 1 + KEYS / 16;  // entries of a map: Q and e, then P, 16 rows at a time

// The maps of a head's segments one after another, on 16 rows of its state: a block of one warp, whose copies run ahead of it.
template <bool EXACT>
__global__ void __launch_bounds__(32) scan(Scan c) {
    DYNAMIC_SHARED(float, memory);
    Tile<KEYS> copy{memory + STAGES * ENTRY};
    struct Own {
        int first_row, size;
        DEVICE int own() const { return 0; }
    } s = {int(blockIdx.y) * 16, int(c.size)};
    int head = int(blockIdx.x), lane = lane_of(), segments = int(c.segments);
    auto start = [&](int entry) {
        if (entry < segments * ENTRIES) {
            int n = entry / ENTRIES, segment = c.reverse ? segments - 1 - n : n, slab = entry % ENTRIES - 1;
            Map map{const_cast<float*>(c.maps) + (int64_t(head) * segments + segment) * Map::FLOATS};
            Tile<KEYS> to{memory + entry % STAGES * ENTRY};
            Plain<KEYS> from = slab < 0 ? map.q(s.first_row) : map.p(16 * slab);
            for (int m = lane; m < 16 * KEYS / 4; m += 32) {
                int i = m / (KEYS / 4), j = m % (KEYS / 4) * 4;
                cp_async(to.at(i & ~7, i & 7, j & ~7, j & 7), from.at(0, i, 0, j));
            }
            if (slab < 0)
                for (int m = lane; m < KEYS / 4; m += 32) cp_async(to.data + 16 * KEYS + 4 * m, map.e() + 4 * m);
        }
        cp_async_commit();
    };
    for (int entry = 0; entry < STAGES - 1; entry++) start(entry);
    State S;
    int64_t state_size = c.size * c.size;
    load_state(s, c.first + head * state_size, S);
    for (int n = 0; n < segments; n++) {
        store_state(s, S, c.before + (int64_t(head) * segments + (c.reverse ? segments - 1 - n : n)) * state_size);
        __syncwarp();
        put_state(S, copy, 0, ready<EXACT>(1));
        for (int slab = 0; slab < ENTRIES; slab++) {
            int entry = n * ENTRIES + slab;
            cp_async_wait<STAGES - 2>();
            __syncwarp();
            Tile<KEYS> x{memory + entry % STAGES * ENTRY};
            if (slab == 0) {
                UNROLL for (int m = 0; m < KEYS / 8; m++)
                    UNROLL for (int half = 0; half < 2; half++) {
                        float2 q = two(x.at(8 * half, lane_g(), 8 * m, 2 * lane_q())), e = two(x.data + 16 * KEYS + 8 * m + 2 * lane_q());
                        S[m][2 * half] = S[m][2 * half] * e.x + q.x, S[m][2 * half + 1] = S[m][2 * half + 1] * e.y + q.y;
                    }
            } else {
                UNROLL for (int half = 0; half < 2; half++) {
                    Left rows = left_far(copy, 0, 16 * (slab - 1) + 8 * half);
                    UNROLL for (int m = 0; m < KEYS / 8; m++) multiply<EXACT>(S[m], rows, right_far(x, 8 * half, 8 * m));
                }
            }
            __syncwarp();
            start(entry + STAGES - 1);
        }
    }
    store_state(s, S, c.after + head * state_size);
}

// ------------------------------------------------------------------------------------------------------------------------ backward

// dz, and the chunk's part of D, of a finished du.
template <class T, class B>
DEVICE void retreat(const B& s, State& D, const Left (&dy)[2], const float (&du)[2][4], float (&dz)[2][4], Left (&rows)[2]) {
    constexpr bool exact = EXACT<T>;
    as_lefts<exact>(du, rows);
    times_lower<exact>(rows, s.square(INVERSE), dz);
    as_lefts<exact>(dz, rows);
    add_product<T>(D, dy, s.q());
    add_product<T>(D, rows, s.a());
}

// The map of a segment backwards.
template <class T, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, blocks(EXACT<T>, ADJOINT)) adjoint(Backward c) {
    constexpr bool exact = EXACT<T>;
    int segments = divide_up(c.s.steps, SEGMENT), chunks = divide_up(c.s.steps, CHUNK);
    Block<T, WARPS, ADJOINT> s(c.s, segments);
    int first = int(blockIdx.x) % segments * PER, chunk = min(first + PER, chunks) - 1;
    State D;
    begin_map(s, D);
    Ahead<T> ahead;
    fetch<Q>(s, c.in, chunk, threadIdx.x, ahead);
    copy_rows<T>(s, c.dy, chunk, s.dy(0));
    cp_async_commit();
    for (int i = 0; chunk >= first; i++, chunk--) {
        __syncthreads();
        scale<Q>(s, c.in, chunk, ahead, s.a());
        __syncthreads();
        gather_decay(s, i == 0);
        if (chunk > first) {
            fetch<Q>(s, c.in, chunk - 1, threadIdx.x, ahead);
            copy_rows<T>(s, c.dy, chunk - 1, s.dy(i + 1));
        }
        cp_async_commit();
        scores<Q, T>(s);
        decay_state(s, D);
        float du[2][4] = {}, dz[2][4] = {};
        UNROLL for (int n = 0; n < KEYS / 8; n++) times_turned<T>(as_left<exact>(D[n]), s.b(), n, du);
        cp_async_wait<1>();
        __syncthreads();
        Left dy[2], rows[2];
        lefts_turned(s.dy(i), s.own(), dy);
        times_lower<exact>(dy, s.square(QB), du);
        retreat<T>(s, D, dy, du, dz, rows);
    }
    end_map<T>(s, D, c.maps);
}

// The transpose of a result to columns of a tile of steps by values, which are shuffled within 8.
template <bool EXACT, class X>
DEVICE void put_turned(const float (&x)[2][4], const X& to, int row) {
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int i = 0; i < 4; i++) *to.at(8 * n, 2 * lane_q() + i % 2, row + i / 2 * 8, shuffled(lane_g())) = ready<EXACT>(x[n][i]);
}

// Gradients of the keys' side of one chunk at 16 columns from `j` on; the gradients of the squares stand in their places.
//   dr = E (dQK k + dQB b + dy S)   da = E_before (dAK k + dAB b + dz S)
//   dk = (dQK' q + dAK' a + v D) / E   db = (dQB' q + dAB' a + u D) / E
// and of the log decay of step t, with x = r dr - k dk - b db and f = a da, by channel:
//   sum_i D S + sum_s (k (v D) + b (u D))_s + sum_{s >= t} x_s + sum_{s > t} f_s
// The numbers of tiles that are not for tensor cores are HALF_STEP too large.
template <class T, class G, class B, class Turned, class TileS, class TileE>
DEVICE void key_gradients(const B& s, const void* w_in, int turn, const Turned& u, const Turned& dz, const TileS& S,
                          const Tile<KEYS>& D, const TileE& e, int chunk, int j, G* const (&to)[5]) {
    constexpr bool exact = EXACT<T>;
    constexpr float whole = exact ? 1 : 1 / HALF_STEP;
    // Results have rows g, g+8 and columns 2q, 2q+1, of two halves of 8 columns each.
    int count = j < s.size ? s.count(chunk) : 0;
    int64_t start = s.start(chunk);
    unsigned place = unsigned(lane_g() * s.stride + j + 2 * lane_q()), below = unsigned(8 * s.stride);
    float2 w[2][2];
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int half = 0; half < 2; half++) {
            bool there = lane_g() + 8 * half < count && j + 8 * n < s.size;
            w[n][half] = there ? unpack(load_at<typename Pair<T>::Type>(static_cast<const T*>(w_in) + start, (place + half * below + 8 * n) * sizeof(T))) : make_float2(0, 0);
        }
    float dr[2][4] = {}, da[2][4] = {}, dk[2][4] = {}, db[2][4] = {}, sum[2] = {};
#pragma unroll 2
    for (int i = 0; i < B::ROWS; i += 16) {
        Left rows_dy[2], rows_dz[2], rows_v[2], rows_u[2];
        lefts(s.dy(turn), i, rows_dy), lefts(s.v(turn), i, rows_v);
        UNROLL for (int m = 0; m < 2; m++) rows_dz[m] = left_far(dz, 0, i + 8 * m), rows_u[m] = left_far(u, 0, i + 8 * m);
        UNROLL for (int m = 0; m < 2; m++)
            UNROLL for (int n = 0; n < 2; n++) {
                Right state = right(S, i + 8 * m, j + 8 * n), grad = right(D, i + 8 * m, j + 8 * n);
                multiply<exact>(dr[n], rows_dy[m], state), multiply<exact>(da[n], rows_dz[m], state);
                multiply<exact>(dk[n], rows_v[m], grad), multiply<exact>(db[n], rows_u[m], grad);
                sum[n] += state.x[0] * grad.x[0] + state.x[1] * grad.x[1];  // at column g
            }
    }
    float anchor[2][2];
    UNROLL for (int n = 0; n < 2; n++) {
        UNROLL for (int by = 1; by < 4; by *= 2) sum[n] += __shfl_xor_sync(~0u, sum[n], by);
        UNROLL for (int i = 0; i < 2; i++) anchor[n][i] = __shfl_sync(~0u, sum[n], 4 * (2 * lane_q() + i)) * whole;
    }
    auto at = [&](const auto& x, int n, int half) { return two(x.at(8 * half, lane_g(), j + 8 * n, 2 * lane_q())); };
    UNROLL for (int n = 0; n < 2; n++) {
        float made[2] = {};
        UNROLL for (int half = 0; half < 2; half++) {
            float2 k = at(s.k(), n, half), b = at(s.b(), n, half);
            made[0] += k.x * dk[n][2 * half] + b.x * db[n][2 * half];
            made[1] += k.y * dk[n][2 * half + 1] + b.y * db[n][2 * half + 1];
        }
        UNROLL for (int i = 0; i < 2; i++) {
            UNROLL for (int by = 4; by < 32; by *= 2) made[i] += __shfl_xor_sync(~0u, made[i], by);
            anchor[n][i] += made[i];
        }
    }
    {
        auto half = [&](int which, int m) { return left_far(s.square(which), 0, 8 * m); };
        UNROLL for (int m = 0; m < 2; m++) {
            Left qk = half(QK, m), qb = half(QB, m), ak = half(AK, m), ab = half(AB, m);
            UNROLL for (int n = 0; n < 2; n++) {
                Right k = right_far(s.k(), 8 * m, j + 8 * n), b = right_far(s.b(), 8 * m, j + 8 * n);
                multiply<exact>(dr[n], qk, k), multiply<exact>(dr[n], qb, b);
                multiply<exact>(da[n], ak, k), multiply<exact>(da[n], ab, b);
            }
            qk = half(TURNED + QK, m), qb = half(TURNED + QB, m), ak = half(TURNED + AK, m), ab = half(TURNED + AB, m);
            UNROLL for (int n = 0; n < 2; n++) {
                Right q = right_far(s.q(), 8 * m, j + 8 * n), a = right_far(s.a(), 8 * m, j + 8 * n);
                multiply<exact>(dk[n], qk, q), multiply<exact>(dk[n], ak, a);
                multiply<exact>(db[n], qb, q), multiply<exact>(db[n], ab, a);
            }
        }
    }
    UNROLL for (int n = 0; n < 2; n++) {
        float dw[4], both[4];  // x, and x + f
        UNROLL for (int half = 0; half < 2; half++) {
            float2 q = at(s.q(), n, half), a = at(s.a(), n, half), k = at(s.k(), n, half), b = at(s.b(), n, half);
            float of_q[2] = {q.x, q.y}, of_a[2] = {a.x, a.y}, of_k[2] = {k.x, k.y}, of_b[2] = {b.x, b.y};
            UNROLL for (int i = 0; i < 2; i++) {
                int m = 2 * half + i;
                dw[m] = of_q[i] * dr[n][m] - of_k[i] * dk[n][m] - of_b[i] * db[n][m];
                both[m] = dw[m] + of_a[i] * da[n][m];
            }
        }
        UNROLL for (int i = 0; i < 2; i++) {
            float later[2], total = 0;
            UNROLL for (int half = 0; half < 2; half++) {
                float x = both[2 * half + i];  // of step g + 8 half; then also of those after it within the half
                UNROLL for (int by = 1; by < 8; by *= 2) {
                    float other = __shfl_down_sync(~0u, x, 4 * by);
                    x += lane_g() + by < 8 ? other : 0;
                }
                later[half] = x - both[2 * half + i];
                if (half) total = __shfl_sync(~0u, x, lane_q());
            }
            dw[i] += anchor[n][i] + later[0] + total, dw[2 + i] += anchor[n][i] + later[1];
        }
        UNROLL for (int half = 0; half < 2; half++) {
            int t = lane_g() + 8 * half, m = 2 * half;
            if (t >= count || j + 8 * n >= s.size) continue;
            float2 up = at(e, n, half), late = t ? two(e.at((t - 1) & 8, (t - 1) & 7, j + 8 * n, 2 * lane_q())) : make_float2(1, 1);
            float down[2] = {quotient<exact>(1, up.x), quotient<exact>(1, up.y)};
            auto put = [&](int which, float x, float y) {
                put_two(reinterpret_cast<G*>(reinterpret_cast<char*>(to[which] + start) + (place + half * below + 8 * n) * sizeof(G)), x, y);
            };
            auto slope = [&](float x) {  // of the log decay: sigmoid(x) sigmoid(-x), exact on both sides
                float y = exponential<exact>(-fabsf(x));
                return quotient<exact>(-RATE * whole * y, (1 + y) * (1 + y));
            };
            put(0, up.x * dr[n][m], up.y * dr[n][m + 1]);
            put(1, slope(w[n][half].x) * dw[m], slope(w[n][half].y) * dw[m + 1]);
            put(2, down[0] * dk[n][m], down[1] * dk[n][m + 1]);
            put(3, late.x * da[n][m], late.y * da[n][m + 1]);
            put(4, down[0] * db[n][m], down[1] * db[n][m + 1]);
        }
    }
}

// As left_far, of what is not in shared memory.
DEVICE Left left_plain(const Plain<KEYS>& x, int row, int column) {
    int g = lane_g(), q = lane_q();
    return {*x.at(row, g, column, q), *x.at(row + 8, g, column, q), *x.at(row, g, column, q + 4), *x.at(row + 8, g, column, q + 4)};
}

// Scratch of a block of the backward: the states before the chunks of a segment, and E if LEAN.
__host__ __device__ constexpr int scratch(int rows) { return PER * rows * KEYS + LEAN * CHUNK * KEYS; }

// Of all segments, the last first; or (parallel) of one, from the gradient of the state at its end. A segment's chunks are gone
// through forwards for the states before them, and then backwards.
template <class T, int WARPS>
__global__ void __launch_bounds__(32 * WARPS, blocks(EXACT<T>, BACKWARD)) backward(Backward c) {
    using B = Block<T, WARPS, BACKWARD>;
    using G = std::conditional_t<B::ROWS == KEYS, T, float>;
    constexpr bool exact = EXACT<T>;
    int segments = divide_up(c.s.steps, SEGMENT), chunks = divide_up(c.s.steps, CHUNK);
    bool one = c.s.parallel;
    B s(c.s, one ? segments : 1);
    Tile<B::Place::WIDE> u_tile{s.floats(B::Place::u)}, dz_tile{s.floats(B::Place::dz)};
    Tile<KEYS> S_tile{s.floats(B::Place::S)}, D_tile{s.floats(B::Place::D)}, e_tile{s.floats(B::Place::e)};
    int64_t state_size = int64_t(s.size) * s.size;
    float* states = c.states + (int64_t(blockIdx.x) * gridDim.y + blockIdx.y) * scratch(B::ROWS);
    auto state_at = [&](int i) { return Plain<KEYS>{states + i * B::ROWS * KEYS}; };
    Plain<KEYS> e_far{states + PER * B::ROWS * KEYS};
    G* to[5] = {static_cast<G*>(c.dr), static_cast<G*>(c.dw), static_cast<G*>(c.dk), static_cast<G*>(c.da), static_cast<G*>(c.db)};
    if constexpr (B::ROWS < KEYS) {
        int64_t all = c.s.batch * c.s.steps * c.s.heads * c.s.size;
        UNROLL for (int n = 0; n < 5; n++) to[n] = reinterpret_cast<G*>(c.parts + (n * gridDim.y + blockIdx.y) * all);
    }
    const int last = one ? int(blockIdx.x) % segments : segments - 1, first = one ? last : 0;

    State D;
    load_state(s, one ? c.ends + int64_t(blockIdx.x) * state_size : c.dfinal + s.batch_head * state_size, D);
    Ahead<T> ahead;
    int turn = 0;
    auto prepare = [&](int chunk, bool all, int into) {  // for a chunk backwards, or forwards, for which less is needed
        if (chunk >= 0) {
            if (all)
                fetch<Q | K>(s, c.in, chunk, threadIdx.x, ahead);
            else
                fetch<K>(s, c.in, chunk, threadIdx.x, ahead);
            copy_rows<T>(s, c.in.v, chunk, s.v(into));
            if (all) copy_rows<T>(s, c.dy, chunk, s.dy(into));
        }
        cp_async_commit();
    };
    auto count_of = [&](int segment) { return min(PER, chunks - segment * PER); };
    prepare(last * PER, count_of(last) == 1, 0);
    for (int segment = last; segment >= first; segment--) {
        int n = count_of(segment), base = segment * PER;
        {
            State S;
            load_state(s, c.kept + (int64_t(s.batch_head) * segments + segment) * state_size, S);
            __syncthreads();
            put_state(D, D_tile, s.own(), 1);
#pragma unroll 1
            for (int i = 0; i < n; i++) {
                put_state(S, state_at(i), s.own(), ready<exact>(1));
                if (i == n - 1) break;
                __syncthreads();
                scale<K>(s, c.in, base + i, ahead, e_tile);
                __syncthreads();
                prepare(base + i + 1, i + 1 == n - 1, turn + 1);
                advance<K, T>(s, S, turn, base + i, nullptr);
                turn++;
            }
            get_state(D, D_tile, s.own());
        }
#pragma unroll 1
        for (int i = n - 1; i >= 0; i--, turn++) {
            int chunk = base + i;
            __syncthreads();
            if constexpr (!LEAN)
                for (int m = int(threadIdx.x); m < B::ROWS * KEYS / 4; m += B::THREADS) {
                    int row = m / (KEYS / 4), column = m % (KEYS / 4) * 4;
                    cp_async(S_tile.at(row & ~7, row & 7, column & ~7, column & 7), state_at(i).at(0, row, 0, column));
                }
            cp_async_commit();
            if constexpr (LEAN)
                scale<Q | K | E>(s, c.in, chunk, ahead, e_far);
            else
                scale<Q | K | E>(s, c.in, chunk, ahead, e_tile);
            __syncthreads();
            if (i > 0)
                prepare(chunk - 1, true, turn + 1);
            else
                prepare(segment > first ? (segment - 1) * PER : -1, false, turn + 1);
            scores<Q | K, T>(s);
            decay_state(s, D);
            put_state(D, D_tile, s.own(), ready<exact>(1));
            float du[2][4] = {}, dv[2][4] = {}, dz[2][4] = {};
            UNROLL for (int m = 0; m < KEYS / 8; m++) {
                Left x = as_left<exact>(D[m]);
                times_turned<T>(x, s.b(), m, du);
                times_turned<T>(x, s.k(), m, dv);
            }
            cp_async_wait<1>();
            __syncthreads();
            Left rows[2];
            {
                float z[2][4] = {}, u[2][4] = {};
                UNROLL for (int m = 0; m < KEYS / 8; m++) {
                    Left x;
                    if constexpr (LEAN)
                        x = left_plain(state_at(i), s.own(), 8 * m);
                    else
                        x = left_far(S_tile, s.own(), 8 * m);
                    Right columns[2];
                    rights_turned_far(s.a(), 0, 8 * m, columns);
                    UNROLL for (int half = 0; half < 2; half++) multiply<exact>(z[half], x, columns[half]);
                }
                lefts_turned(s.v(turn), s.own(), rows);
                times_lower_turned<exact>(rows, s.square(AK), z);
                as_lefts<exact>(z, rows);
                times_lower_turned<exact>(rows, s.square(INVERSE), u);
                put_turned<exact>(u, u_tile, s.own());
            }
            {
                Left dy[2];
                lefts_turned(s.dy(turn), s.own(), dy);
                times_lower<exact>(dy, s.square(QB), du);
                times_lower<exact>(dy, s.square(QK), dv);
                retreat<T>(s, D, dy, du, dz, rows);
                times_lower<exact>(rows, s.square(AK), dv);
                put_turned<exact>(dz, dz_tile, s.own());
                store_rows<T>(s, dv, {reinterpret_cast<T*>(s.memory + B::Place::out)}, c.dv, chunk);
            }
            __syncthreads();
            constexpr float factor = exact ? 1 : HALF_STEP;
#pragma unroll 1
            for (int task = s.warp(); task <= QB; task += WARPS) {
                Square natural = s.square(task), turned = s.square(TURNED + task);
                if (task == AB) score<exact, B::ROWS>(dz_tile, u_tile, true, factor, natural, turned);
                if (task == AK) score<exact, B::ROWS>(dz_tile, s.v(turn), true, factor, natural, turned);
                if (task == QK) score<exact, B::ROWS>(s.dy(turn), s.v(turn), false, factor, natural, turned);
                if (task == QB) score<exact, B::ROWS>(s.dy(turn), u_tile, false, factor, natural, turned);
            }
            __syncthreads();
#pragma unroll 1
            for (int j = s.own(); j < KEYS; j += B::ROWS) {
                if constexpr (LEAN)
                    key_gradients<T>(s, c.in.w, turn, u_tile, dz_tile, state_at(i), D_tile, e_far, chunk, j, to);
                else
                    key_gradients<T>(s, c.in.w, turn, u_tile, dz_tile, S_tile, D_tile, e_tile, chunk, j, to);
            }
        }
    }
    if (!one) store_state(s, D, c.dstate + s.batch_head * state_size);
}

// The sum of what several blocks, each with some of the values, have of each of five gradients.
template <class T>
__global__ void add_parts(const float* parts, T* dr, T* dw, T* dk, T* da, T* db, int64_t all, int splits) {
    T* to = blockIdx.y == 0 ? dr : blockIdx.y == 1 ? dw : blockIdx.y == 2 ? dk : blockIdx.y == 3 ? da : db;
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += int64_t(gridDim.x) * blockDim.x) {
        float sum = 0;
        for (int n = 0; n < splits; n++) sum += parts[(int64_t(blockIdx.y) * splits + n) * all + i];
        put_one(to + i, sum);
    }
}

// ------------------------------------------------------------------------------------------------------------------------ launches

// f(T(), warps) for what a record is of.
template <class F>
int with_kind(const Shape& s, F&& f) {
    auto typed = [&](auto type) {
        if constexpr (FEW < MANY)
            if (s.warps == FEW) return f(type, std::integral_constant<int, FEW>());
        return f(type, std::integral_constant<int, MANY>());
    };
    return s.is_bf16 ? typed(bf16()) : typed(float());
}

// One block for each head, or segment of one, and split of the values; times 2 for the two halves of maps.
dim3 grid(const Shape& s, int parts, int times) {
    return dim3(unsigned(s.batch * s.heads * parts), unsigned(KEYS / (16 * s.warps) * times));
}

int run_scan(const Shape& s, int64_t reverse, const float* first, const float* maps, float* before, float* after, int64_t stream) {
    Scan record{divide_up(s.steps, SEGMENT), s.size, reverse, first, maps, before, after};
    dim3 blocks(unsigned(s.batch * s.heads), unsigned(divide_up(s.size, 16)));
    constexpr int bytes = (STAGES * ENTRY + 16 * KEYS) * 4;
    return s.is_bf16 ? LAUNCH((scan<false>), blocks, 32, bytes, stream, record) : LAUNCH((scan<true>), blocks, 32, bytes, stream, record);
}

struct Plan {
    Shape s;          // its `parallel` asks: 0 fused, 1 parallel, 2 whichever is faster
    int64_t limit;    // of shared memory of a block in bytes; 0: the GPU's
    int64_t* result;  // parallel, warps; floats of scratch: Forward's maps; Backward's states, parts, maps, ends
    int64_t stream;
};

}  // namespace

// Chooses how to run a shape.
extern "C" int rwkv_wkv7_plan(const Plan* record) {
    Shape s = record->s;
    int limit = 227 * 1024, processors = 132;
#ifdef __CUDACC__
    int device = 0;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error) return int(error);
#endif
    if (record->limit) limit = int(record->limit);
    auto bytes = [&] { return with_kind(s, [](auto type, auto warps) { return Layout<decltype(type), warps(), BACKWARD>::END; }); };
    s.warps = MANY;
    if (bytes() > limit) s.warps = FEW;
    int64_t segments = divide_up(s.steps, SEGMENT), splits = KEYS / (16 * s.warps), heads = s.batch * s.heads;
    // In units of the time that a block takes for a chunk, two blocks to an SM: maps cost as much again as what uses them; a map is
    // applied in a quarter.
    auto turns = [&](int64_t count) { return double(divide_up(count, 2 * processors)); };
    double fused = turns(heads * splits) * divide_up(s.steps, CHUNK);
    double parallel = turns(heads * splits * segments) * PER * 2.2 + 0.25 * double(segments) + 6;
    int64_t in_parallel = s.parallel == 2 ? parallel < fused : s.parallel;
    int64_t maps = in_parallel ? heads * segments * Map::FLOATS : 0;
    int64_t* result = record->result;
    result[0] = in_parallel, result[1] = s.warps, result[2] = maps;
    result[3] = heads * (in_parallel ? segments : 1) * splits * scratch(int(16 * s.warps));
    result[4] = splits > 1 ? 5 * splits * heads * s.steps * s.size : 0;
    result[5] = maps, result[6] = in_parallel ? heads * segments * s.size * s.size : 0;
    return 0;
}

extern "C" int rwkv_wkv7_forward(const Forward* record) {
    return with_kind(record->s, [&](auto type, auto warps) {
        using T = decltype(type);
        constexpr int shared = Layout<T, warps(), FORWARD>::END, threads = 32 * warps();
        const Forward& c = *record;
        int segments = divide_up(c.s.steps, SEGMENT);
        if (c.s.parallel) {
            if (int error = LAUNCH((forward<K, T, warps()>), grid(c.s, segments, 2), threads, shared, c.stream, c)) return error;
            if (int error = run_scan(c.s, 0, c.state, c.maps, c.kept, c.final, c.stream)) return error;
        }
        return LAUNCH((forward<Q | K, T, warps()>), grid(c.s, c.s.parallel ? segments : 1, 1), threads, shared, c.stream, c);
    });
}

extern "C" int rwkv_wkv7_backward(const Backward* record) {
    return with_kind(record->s, [&](auto type, auto warps) {
        using T = decltype(type);
        constexpr int threads = 32 * warps(), splits = KEYS / (16 * warps());
        const Backward& c = *record;
        int segments = divide_up(c.s.steps, SEGMENT);
        if (c.s.parallel) {
            constexpr int shared = Layout<T, warps(), ADJOINT>::END;
            if (int error = LAUNCH((adjoint<T, warps()>), grid(c.s, segments, 2), threads, shared, c.stream, c)) return error;
            if (int error = run_scan(c.s, 1, c.dfinal, c.maps, c.ends, c.dstate, c.stream)) return error;
        }
        constexpr int shared = Layout<T, warps(), BACKWARD>::END;
        int error = LAUNCH((backward<T, warps()>), grid(c.s, c.s.parallel ? segments : 1, 1), threads, shared, c.stream, c);
        if (error || splits == 1) return error;
        auto typed = [](void* x) { return static_cast<T*>(x); };
        int64_t all = c.s.batch * c.s.steps * c.s.heads * c.s.size;
        return LAUNCH((add_parts<T>), dim3(unsigned(std::min<int64_t>((all + 255) / 256, 4096)), 5), 256, 0, c.stream,
                      static_cast<const float*>(c.parts), typed(c.dr), typed(c.dw), typed(c.dk), typed(c.da), typed(c.db), all, splits);
    });
}
