// WKV-7 on tensor cores: chunks of 16 steps as products of small matrices. The equations are in kernels/wkv7.py.
#include <algorithm>
#include <type_traits>

#include "tile.h"

namespace {

constexpr int CHUNK = 16, SEGMENT = 64;
constexpr int NK = KEYS;                   // as wide as heads are in here: N, and zeros
constexpr int WARPS = NK == 128 ? 8 : 4;   // of a block at most
constexpr int THREADS = 32 * WARPS;

enum { FORWARD, ADJOINT, BACKWARD };

// Blocks that an SM should hold: it bounds the registers.
constexpr int blocks(bool exact, int kind) { return NK > 64 ? 1 : kind == BACKWARD || exact ? 2 : 4; }

// ------------------------------------------------------------------------------------------------ what both directions share

struct Shape {
    int64_t batch, steps, heads, size, is_bf16;
    int64_t parallel, warps;  // as rwkv_wkv7_plan has said
};

struct Inputs { const void *r, *w, *k, *v, *a, *b; };

template <class T>
constexpr bool EXACT = sizeof(T) == 4;

__host__ DEVICE int divide_up(int64_t x, int64_t by) { return int((x + by - 1) / by); }

// The tiles that a kernel has need of, bits of WITH. `a` and `b` always.
enum { Q = 1, K = 2, E = 4 };

// Where things lie in shared memory, in bytes.
struct Layout {
    int q, a, k, b, e, squares, decay, v, dy, out, u, dz, S, D, end;
};

enum { AAB, AAK, AQK, AQB, INVERSE, SQUARES };

__host__ __device__ constexpr int padded(int rows) { return (rows + 31) / 32 * 32; }

// Whether the state and E stay out of shared memory, which they would fill.
constexpr bool LEAN = NK > 128;

template <class T>
__host__ DEVICE int row_pitch(int rows) {
    return rows + 16 / int(sizeof(T));
}

template <class T>
__host__ DEVICE Layout layout(int kind, int rows) {
    Layout at{};
    int end = 0;
    auto take = [&](bool wanted, int bytes) {
        int begin = end;
        end += wanted ? (bytes + 15) / 16 * 16 : 0;
        return begin;
    };
    int keys = CHUNK * NK * 4, values = CHUNK * row_pitch<T>(rows) * int(sizeof(T));
    at.a = take(true, keys);
    at.b = take(true, keys);
    at.q = take(true, keys);
    at.k = take(kind != ADJOINT, keys);
    at.e = take(kind == BACKWARD && !LEAN, keys);
    at.u = take(kind == BACKWARD, CHUNK * padded(rows) * 4);
    at.dz = take(kind == BACKWARD, CHUNK * padded(rows) * 4);
    at.S = take(kind == BACKWARD && !LEAN, rows * NK * 4);
    at.D = take(kind == BACKWARD, rows * NK * 4);
    at.squares = take(true, SQUARES * Square::FLOATS * 4);
    at.decay = take(true, NK * 4 * 2);
    at.v = take(kind != ADJOINT, 2 * values);
    at.dy = take(kind != FORWARD, 2 * values);
    at.out = take(kind == BACKWARD, values);
    at.end = end;
    return at;
}

// Two neighbours of a row as they lie in memory.
template <class T> struct Pair;
template <> struct Pair<float> { float2 x; };
template <> struct Pair<bf16> { uint32_t x; };

DEVICE float2 open(Pair<float> p) { return p.x; }
DEVICE float2 open(Pair<bf16> p) { return make_float2(__uint_as_float(p.x << 16), __uint_as_float(p.x & 0xffff0000u)); }
DEVICE Pair<float> join(float x, float y) { return {make_float2(x, y)}; }
DEVICE Pair<bf16> join(bf16 x, bf16 y) { return {uint32_t(x.bits) | uint32_t(y.bits) << 16}; }
DEVICE float from(float x, float*) { return x; }
DEVICE bf16 from(float x, bf16*) { return to_bf16(x); }

// Columns j and j+1 of a row of `size`, 0 beyond it.
template <class T>
DEVICE Pair<T> get_pair(const T* row, int j, int size) {
    if (j >= size) return {};
    if (size % 2 == 0) return *reinterpret_cast<const Pair<T>*>(row + j);
    return join(row[j], j + 1 < size ? row[j + 1] : T{});
}

template <class T>
DEVICE void put_pair(T* row, int j, int size, float x, float y) {
    if (j >= size) return;
    T first = from(x, row), second = from(y, row);
    if (size % 2 == 0) {
        *reinterpret_cast<Pair<T>*>(row + j) = join(first, second);
    } else {
        row[j] = first;
        if (j + 1 < size) row[j + 1] = second;
    }
}

constexpr float RATE = 0.6065306597126334f;  // exp(-1/2): the log decay is -RATE sigmoid(w)

template <bool EXACT>
DEVICE float exponential(float x) {
    return EXACT ? expf(x) : fast_exp(x);
}
template <bool EXACT>
DEVICE float quotient(float x, float y) {
    return EXACT ? x / y : fast_divide(x, y);
}

// What a thread has read ahead of r, w, k, a, b: two columns of rows h, 4+h, 8+h, 12+h, where h = thread % 4.
template <class T>
struct Ahead { Pair<T> r[4], w[4], k[4], a[4], b[4]; };

// One block's view: a head of a batch, NK keys (N and zeros) by 16 rows of values for each warp.
template <class T>
struct Block {
    int steps, size, heads, rows, first_row, batch_head;
    int64_t head;  // where step 0 of this head begins in (B, T, H, N)
    Inputs in;
    const T* dy_in;
    Tile q, a, k, b;
    Plain e_far;
    Tile e;
    float *squares, *decay, *decay_all;
    Rows<T> v_rows, dy_rows, out;
    bool values;  // whether these rows have values, and are not rows of the identity

    DEVICE Block(const Shape& s, const Inputs& in, const void* dy_in, int kind, int part_of, int split)
        : in(in), dy_in(static_cast<const T*>(dy_in)) {
        DYNAMIC_SHARED(unsigned char, memory);
        rows = int(blockDim.x) / 2;
        Layout at = layout<T>(kind, rows);
        auto floats = [&](int offset) { return reinterpret_cast<float*>(memory + offset); };
        steps = int(s.steps), size = int(s.size), heads = int(s.heads);
        batch_head = int(blockIdx.x) / part_of;
        head = (int64_t(batch_head / heads) * steps * heads + batch_head % heads) * size;
        first_row = split * rows, values = true;
        q = {floats(at.q), NK}, a = {floats(at.a), NK}, k = {floats(at.k), NK}, b = {floats(at.b), NK}, e = {floats(at.e), NK};
        squares = floats(at.squares), decay = floats(at.decay), decay_all = decay + NK;
        int pitch = row_pitch<T>(rows);
        auto typed = [&](int offset) { return reinterpret_cast<T*>(memory + offset); };
        v_rows = {typed(at.v), pitch}, dy_rows = {typed(at.dy), pitch}, out = {typed(at.out), pitch};
    }

    // The one of two buffers that is this turn's.
    DEVICE Rows<T> v(int turn) const { return {v_rows.data + turn % 2 * CHUNK * v_rows.pitch, v_rows.pitch}; }
    DEVICE Rows<T> dy(int turn) const { return {dy_rows.data + turn % 2 * CHUNK * dy_rows.pitch, dy_rows.pitch}; }

    DEVICE Square square(int which) const { return {squares + which * Square::FLOATS}; }
    DEVICE int warp() const { return int(threadIdx.x) / 32; }
    DEVICE int own_row() const { return warp() * 16; }  // of this warp, within the block
    DEVICE int count(int chunk) const { return min(CHUNK, steps - chunk * CHUNK); }
    DEVICE int64_t row(int t) const { return head + int64_t(t) * heads * size; }
};

// Read what `scale` will take of a chunk. `item`: a pair of columns, four times.
template <int WITH, class T>
DEVICE void fetch(const Block<T>& s, int chunk, int item, Ahead<T>& x) {
    int j = item / 4 * 2, count = s.count(chunk);
    UNROLL for (int i = 0; i < 4; i++) {
        int t = 4 * i + item % 4;
        bool there = t < count;
        int64_t row = s.row(chunk * CHUNK + (there ? t : 0));
        auto get = [&](const void* input) {
            return there ? get_pair(static_cast<const T*>(input) + row, j, s.size) : Pair<T>{};
        };
        x.w[i] = get(s.in.w), x.a[i] = get(s.in.a), x.b[i] = get(s.in.b);
        if (WITH & Q) x.r[i] = get(s.in.r);
        if (WITH & K) x.k[i] = get(s.in.k);
    }
}

// With c_t the sum of log decays up to and with step t, fill  q = r e^c, a = a e^(c before t), k = k e^-c, b = b e^-c,  E = e^c, and the
// decay of the whole chunk. e^-c is at most e^(16 RATE) = 16392. Steps beyond the last are 0, and decay nothing.
template <int WITH, class T>
DEVICE void scale(const Block<T>& s, int chunk, const Ahead<T>& ahead) {
    constexpr bool exact = EXACT<T>;
    for (int item = int(threadIdx.x); item < 2 * NK; item += int(blockDim.x)) {
        Ahead<T> x = ahead;
        if (item != int(threadIdx.x)) fetch<WITH>(s, chunk, item, x);
        int j = item / 4 * 2, h = item % 4, lane = int(threadIdx.x) % 32, count = s.count(chunk);
        float before[2] = {};  // the sum up to the last step
        UNROLL for (int i = 0; i < 4; i++) {
            int t = 4 * i + h;
            float2 w = open(x.w[i]);
            float step[2] = {w.x, w.y}, c[2], up[2], down[2], late[2];
            UNROLL for (int n = 0; n < 2; n++) {
                step[n] = t < count ? -quotient<exact>(RATE, 1 + exponential<exact>(-step[n])) : 0;
                c[n] = step[n];
                UNROLL for (int by = 1; by < 4; by *= 2) {
                    float other = __shfl_up_sync(~0u, c[n], by);
                    if (h >= by) c[n] += other;
                }
                c[n] += before[n];
                before[n] = __shfl_sync(~0u, c[n], lane | 3);
                up[n] = exponential<exact>(c[n]), down[n] = exponential<exact>(-c[n]);
                late[n] = exponential<exact>(c[n] - step[n]);
            }
            auto put = [&](const Tile& tile, Pair<T> pair, const float* factor) {
                float2 y = open(pair);
                put_two(tile.at(t, j), ready<exact>(y.x * factor[0]), ready<exact>(y.y * factor[1]));
            };
            put(s.a, x.a[i], late), put(s.b, x.b[i], down);
            if (WITH & Q) put(s.q, x.r[i], up);
            if (WITH & K) put(s.k, x.k[i], down);
            if constexpr ((WITH & E) && LEAN) put_two(s.e_far.at(t, j), up[0], up[1]);
            if constexpr ((WITH & E) && !LEAN) put_two(s.e.at(t, j), up[0], up[1]);
            if (t == CHUNK - 1) put_two(s.decay + j, up[0], up[1]);
        }
    }
}

// Start to copy a chunk's rows of values, zeros beyond the steps and the rows.
template <class T>
DEVICE void copy_rows(const Block<T>& s, const void* input, int chunk, const Rows<T>& to) {
    constexpr int PER = 16 / int(sizeof(T));
    const T* from = static_cast<const T*>(input);
    int count = s.values ? s.count(chunk) : 0;
    bool whole = s.size % PER == 0;
    int parts = s.rows / (whole ? PER : 1);
    for (int n = int(threadIdx.x); n < CHUNK * parts; n += int(blockDim.x)) {
        int t = n / parts, i = n % parts * (whole ? PER : 1);
        bool there = t < count && s.first_row + i < s.size;
        const T* x = there ? from + s.row(chunk * CHUNK + t) + s.first_row + i : from;
        if (whole)
            cp_async(to.at(t, i), x, there);
        else
            *to.at(t, i) = there ? *x : T{};
    }
}

// This warp's columns of `stage`, filled by it, to rows of steps in memory.
template <class T>
DEVICE void store_rows(const Block<T>& s, const Rows<T>& stage, T* output, int chunk) {
    constexpr int PER = 16 / int(sizeof(T));
    __syncwarp();
    int lane = int(threadIdx.x) % 32, count = s.count(chunk);
    bool whole = s.size % PER == 0;
    int parts = 16 / (whole ? PER : 1);
    for (int n = lane; n < CHUNK * parts; n += 32) {
        int t = n / parts, i = s.own_row() + n % parts * (whole ? PER : 1);
        if (t >= count || s.first_row + i >= s.size) continue;
        T* to = output + s.row(chunk * CHUNK + t) + s.first_row + i;
        if (whole)
            *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(stage.at(t, i));
        else
            *to = *stage.at(t, i);
    }
}

// A result of this warp's 16 rows of values by 16 steps, to columns of `stage`.
template <class T>
DEVICE void stage_rows(const Block<T>& s, const float (&x)[2][4], const Rows<T>& stage) {
    __syncwarp();
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int i = 0; i < 4; i++) {
            T* to = stage.at(8 * n + 2 * lane_q() + i % 2, s.own_row() + lane_g() + i / 2 * 8);
            *to = from(x[n][i], to);
        }
}

// tril(x y'), 16 x 16, strictly if `strict`, of two tiles.
template <bool EXACT, int WIDTH, class X, class Y>
DEVICE void score(const X& x, const Y& y, int width, bool strict, bool rounded, const Square& to) {
    float d[2][4] = {};
    if (WIDTH) width = WIDTH;
#pragma unroll 8
    for (int j = 0; j < width; j += 8) {
        Left rows = left(x, 0, j);
        UNROLL for (int n = 0; n < 2; n++) {
            float2 terms = two(y.at(8 * n + lane_g(), j + 2 * lane_q()));
            multiply<EXACT>(d[n], rows, Right{terms.x, terms.y});
        }
    }
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int i = 0; i < 4; i += 2) {
            int t = lane_g() + i / 2 * 8, at = 8 * n + 2 * lane_q(), end = strict ? t : t + 1;
            float first = at < end ? d[n][i] : 0, second = at + 1 < end ? d[n][i + 1] : 0;
            put_two(to.at(t, at), rounded ? ready<EXACT>(first) : first, rounded ? ready<EXACT>(second) : second);
        }
}

// (I - x)^-1 of a strictly lower triangular x by substitution, a column to a lane. Powers of x, the alternative for tensor cores,
// grow by up to C(15, 7) where keys are alike, and cancel.
template <bool EXACT>
DEVICE void invert(const Square& x, const Square& to) {
    __syncwarp();
    int column = int(threadIdx.x) % 16;
    float m[16];
    UNROLL for (int t = 0; t < 16; t++) {
        m[t] = t == column ? 1.0f : 0.0f;
        UNROLL for (int s = 0; s < t; s += 4) {
            float4 row = *reinterpret_cast<const float4*>(x.at(t, s));
            float parts[4] = {row.x, row.y, row.z, row.w};
            UNROLL for (int i = 0; i < 4; i++)
                if (s + i < t) m[t] += parts[i] * m[s + i];
        }
        *to.at(t, column) = ready<EXACT>(m[t]);
    }
    __syncwarp();
}

// The scores of a chunk, shared out over the warps; the first inverts.
template <int WITH, class T>
DEVICE void scores(const Block<T>& s) {
    constexpr bool exact = EXACT<T>;
#pragma unroll 1
    for (int task = s.warp(); task <= AQB; task += int(blockDim.x) / 32) {
        bool of_q = task >= AQK, with_k = task == AAK || task == AQK;
        if ((of_q && !(WITH & Q)) || (with_k && !(WITH & K))) continue;
        score<exact, NK>(of_q ? s.q : s.a, with_k ? s.k : s.b, NK, !of_q, task != AAB, s.square(task));
        if (task == AAB) invert<exact>(s.square(AAB), s.square(INVERSE));
    }
}

// A warp's rows of a state: N x N in memory, here 16 x NK, zeros beyond.
using State = float[NK / 8][4];

template <class T>
DEVICE void load_state(const Block<T>& s, const float* from, State& S) {
    UNROLL for (int half = 0; half < 2; half++) {
        int i = s.first_row + s.own_row() + lane_g() + 8 * half;
        UNROLL for (int n = 0; n < NK / 8; n++) {
            float2 x = i < s.size ? open(get_pair(from + int64_t(i) * s.size, 8 * n + 2 * lane_q(), s.size)) : make_float2(0, 0);
            S[n][2 * half] = x.x, S[n][2 * half + 1] = x.y;
        }
    }
}

template <class T>
DEVICE void store_state(const Block<T>& s, const State& S, float* to) {
    UNROLL for (int half = 0; half < 2; half++) {
        int i = s.first_row + s.own_row() + lane_g() + 8 * half;
        if (i >= s.size) continue;
        UNROLL for (int n = 0; n < NK / 8; n++)
            put_pair(to + int64_t(i) * s.size, 8 * n + 2 * lane_q(), s.size, S[n][2 * half], S[n][2 * half + 1]);
    }
}

// The same in rows of NK: whole, as scratch has it. `x` is a Plain or a Tile, of which this warp's rows begin at `row`.
template <bool ROUNDED, class X>
DEVICE void put_state(const State& S, const X& x, int row) {
    UNROLL for (int n = 0; n < NK / 8; n++)
        UNROLL for (int half = 0; half < 2; half++) {
            float first = S[n][2 * half], second = S[n][2 * half + 1];
            put_two(x.at(row + lane_g() + 8 * half, 8 * n + 2 * lane_q()), ROUNDED ? ready<false>(first) : first,
                    ROUNDED ? ready<false>(second) : second);
        }
}

template <class X>
DEVICE void get_state(State& S, const X& x, int row) {
    UNROLL for (int n = 0; n < NK / 8; n++)
        UNROLL for (int half = 0; half < 2; half++) {
            float2 pair = two(x.at(row + lane_g() + 8 * half, 8 * n + 2 * lane_q()));
            S[n][2 * half] = pair.x, S[n][2 * half + 1] = pair.y;
        }
}

// d (16 rows of values x 16 steps) += x y', y of two rows of 8 steps, NK columns: the product of a state.
template <class T>
DEVICE void times_turned(const Left& x, const Tile& y, int n, float (&d)[2][4]) {
    UNROLL for (int half = 0; half < 2; half++) multiply<EXACT<T>>(d[half], x, right_turned(y, 8 * half, 8 * n));
}

// d += x y' and d += x y, with 16 x 16 y lower triangular: what is above the diagonal is left out by halves.
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

// S += x y, x 16 x 16, y 16 x NK.
template <class T>
DEVICE void add_product(State& S, const Left (&x)[2], const Tile& y) {
    UNROLL for (int n = 0; n < NK / 8; n++)
        UNROLL for (int half = 0; half < 2; half++) multiply<EXACT<T>>(S[n], x[half], right(y, 8 * half, 8 * n));
}

// One chunk of a state, and of y if WITH has Q. All tiles are filled; v is on its way, and one more group of copies behind it.
//   z' = S a' + v' Aak'   u' = z' M'   y' = S q' + v' Aqk' + u' Aqb'   S = (S + v' k + u' b) decay
template <int WITH, class T>
DEVICE void advance(const Block<T>& s, State& S, const Rows<T>& v_rows, int chunk, T* y_out) {
    constexpr bool exact = EXACT<T>;
    scores<WITH>(s);
    float z[2][4] = {}, y[2][4] = {};
    UNROLL for (int n = 0; n < NK / 8; n++) {
        Left x = as_left<exact>(S[n]);
        times_turned<T>(x, s.a, n, z);
        if (WITH & Q) times_turned<T>(x, s.q, n, y);
    }
    cp_async_wait<1>();
    __syncthreads();
    Left v[2] = {left_turned(v_rows, 0, s.own_row()), left_turned(v_rows, 8, s.own_row())};
    times_lower_turned<exact>(v, s.square(AAK), z);
    float result[2][4] = {};
    {
        Left x[2] = {as_left<exact>(z[0]), as_left<exact>(z[1])};
        times_lower_turned<exact>(x, s.square(INVERSE), result);
    }
    Left u[2] = {as_left<exact>(result[0]), as_left<exact>(result[1])};
    if (WITH & Q) {
        times_lower_turned<exact>(v, s.square(AQK), y);
        times_lower_turned<exact>(u, s.square(AQB), y);
        stage_rows(s, y, v_rows);  // of which only this warp reads these columns
        store_rows(s, v_rows, y_out, chunk);
    }
    add_product<T>(S, v, s.k);
    add_product<T>(S, u, s.b);
    UNROLL for (int n = 0; n < NK / 8; n++) {
        float2 decay = two(s.decay + 8 * n + 2 * lane_q());
        S[n][0] *= decay.x, S[n][1] *= decay.y, S[n][2] *= decay.x, S[n][3] *= decay.y;
    }
}

// ------------------------------------------------------------------------------------------------------------------- forward

struct Forward {
    Shape s;
    Inputs in;
    const float* state;
    void* y;
    float *final, *kept;  // kept: (B, H, segments, N, N), or null
    float* maps;          // of `parallel`
    int64_t stream;
};

// What a segment makes of a state:  S e + S P + Q.
struct Map {
    static constexpr int64_t FLOATS = (2 * NK + 1) * NK;
    float* data;
    DEVICE Plain q(int row) const { return {data + row * NK, NK}; }
    DEVICE Plain p(int row) const { return {data + NK * NK + row * NK, NK}; }
    DEVICE float* e() const { return data + 2 * NK * NK; }
};

// Keep the decay of all chunks so far.
template <class T>
DEVICE void gather_decay(const Block<T>& s, bool first) {
    for (int j = int(threadIdx.x); j < NK; j += int(blockDim.x)) s.decay_all[j] = first ? s.decay[j] : s.decay_all[j] * s.decay[j];
}

// Of the rows of a map: those of Q come of state 0, those of P of the identity and no values. P goes without e on its diagonal, which
// is as large as all the rest: e is not to be rounded.
template <class T>
DEVICE void begin_map(Block<T>& s, State& S) {
    s.values = int(blockIdx.y) * s.rows < NK;
    s.first_row = int(blockIdx.y) * s.rows % NK;
    UNROLL for (int n = 0; n < NK / 8; n++)
        UNROLL for (int i = 0; i < 4; i++) {
            int row = s.first_row + s.own_row() + lane_g() + i / 2 * 8, column = 8 * n + 2 * lane_q() + i % 2;
            S[n][i] = !s.values && row == column && row < s.size ? 1 : 0;
        }
}

template <class T>
DEVICE void end_map(const Block<T>& s, State& S, float* maps) {
    Map map{maps + int64_t(blockIdx.x) * Map::FLOATS};
    __syncthreads();
    if (s.values) {
        put_state<false>(S, map.q(s.first_row), s.own_row());
        if (s.first_row == 0)
            for (int j = int(threadIdx.x); j < NK; j += int(blockDim.x)) map.e()[j] = s.decay_all[j];
        return;
    }
    UNROLL for (int n = 0; n < NK / 8; n++)
        UNROLL for (int i = 0; i < 4; i++) {
            int row = s.first_row + s.own_row() + lane_g() + i / 2 * 8, column = 8 * n + 2 * lane_q() + i % 2;
            if (row == column && row < s.size) S[n][i] -= s.decay_all[column];
        }
    put_state<!EXACT<T>>(S, map.p(s.first_row), s.own_row());
}

// Of all chunks, or (s.parallel) of one segment from the state that is kept of it; or, without Q, the map of a segment.
template <int WITH, class T>
__global__ void __launch_bounds__(THREADS, blocks(EXACT<T>, FORWARD)) forward(Forward c) {
    constexpr bool mapping = !(WITH & Q);
    int segments = divide_up(c.s.steps, SEGMENT), chunks = divide_up(c.s.steps, CHUNK), parts = c.s.parallel ? segments : 1;
    Block<T> s(c.s, c.in, nullptr, FORWARD, parts, int(blockIdx.y));
    int part = int(blockIdx.x) % parts, chunk = part * (SEGMENT / CHUNK);
    int end = c.s.parallel ? min(chunk + SEGMENT / CHUNK, chunks) : chunks;
    int64_t state_size = int64_t(s.size) * s.size;
    float* kept = c.kept ? c.kept + int64_t(s.batch_head) * segments * state_size : nullptr;
    State S;
    if (mapping)
        begin_map(s, S);
    else
        load_state(s, c.s.parallel ? kept + part * state_size : c.state + s.batch_head * state_size, S);
    Ahead<T> ahead;
    if (int(threadIdx.x) < 2 * NK) fetch<WITH>(s, chunk, int(threadIdx.x), ahead);
    copy_rows(s, s.in.v, chunk, s.v(0));
    cp_async_commit();
    for (int i = 0; chunk < end; i++, chunk++) {
        if (!c.s.parallel && kept && chunk % (SEGMENT / CHUNK) == 0) store_state(s, S, kept + chunk / (SEGMENT / CHUNK) * state_size);
        __syncthreads();
        scale<WITH>(s, chunk, ahead);
        __syncthreads();
        if (mapping) gather_decay(s, i == 0);
        if (chunk + 1 < end) {
            if (int(threadIdx.x) < 2 * NK) fetch<WITH>(s, chunk + 1, int(threadIdx.x), ahead);
            copy_rows(s, s.in.v, chunk + 1, s.v(i + 1));
        }
        cp_async_commit();
        advance<WITH>(s, S, s.v(i), chunk, static_cast<T*>(c.y));
    }
    if (mapping)
        end_map(s, S, c.maps);
    else if (!c.s.parallel)
        store_state(s, S, c.final + s.batch_head * state_size);
}

struct Scan {
    int64_t segments, size, reverse;
    const float *first, *maps;
    float *before, *after;  // (heads of batches, segments, N, N): the state that each map is applied to; and the last
};

constexpr int STAGES = 4;

// The maps of a head's segments one after another, on 16 rows of its state.
template <bool EXACT>
__global__ void __launch_bounds__(32) scan(Scan c) {
    constexpr int ENTRY = 17 * NK, ENTRIES = 1 + NK / 16;  // of a map: Q and e, then P, 16 rows at a time
    DYNAMIC_SHARED(float, memory);
    Tile copy{memory + STAGES * ENTRY, NK};
    int head = int(blockIdx.x), row = int(blockIdx.y) * 16, lane = int(threadIdx.x), size = int(c.size), segments = int(c.segments);
    auto start = [&](int entry) {
        if (entry < segments * ENTRIES) {
            int segment = c.reverse ? segments - 1 - entry / ENTRIES : entry / ENTRIES, slab = entry % ENTRIES - 1;
            Map map{const_cast<float*>(c.maps) + (int64_t(head) * segments + segment) * Map::FLOATS};
            Tile to{memory + entry % STAGES * ENTRY, NK};
            Plain from = slab < 0 ? map.q(row) : map.p(16 * slab);
            for (int n = lane; n < 16 * NK / 4; n += 32) {
                int i = n / (NK / 4), j = n % (NK / 4) * 4;
                cp_async(to.at(i, j), from.at(i, j));
            }
            if (slab < 0)
                for (int n = lane; n < NK / 4; n += 32) cp_async(to.data + 16 * NK + 4 * n, map.e() + 4 * n);
        }
        cp_async_commit();
    };
    for (int entry = 0; entry < STAGES - 1; entry++) start(entry);
    State S;
    int64_t state_size = int64_t(size) * size;
    auto each_pair = [&](auto&& f) {
        UNROLL for (int half = 0; half < 2; half++)
            UNROLL for (int n = 0; n < NK / 8; n++) {
                int i = row + lane_g() + 8 * half, j = 8 * n + 2 * lane_q();
                if (i < size) f(int64_t(i) * size, j, S[n][2 * half], S[n][2 * half + 1]);
            }
    };
    UNROLL for (int n = 0; n < NK / 8; n++)
        UNROLL for (int i = 0; i < 4; i++) S[n][i] = 0;
    each_pair([&](int64_t at, int j, float& x, float& y) {
        float2 pair = open(get_pair(c.first + head * state_size + at, j, size));
        x = pair.x, y = pair.y;
    });
    for (int n = 0; n < segments; n++) {
        int64_t segment = int64_t(head) * segments + (c.reverse ? segments - 1 - n : n);
        each_pair([&](int64_t at, int j, float x, float y) { put_pair(c.before + segment * state_size + at, j, size, x, y); });
        __syncwarp();
        put_state<!EXACT>(S, copy, 0);
        for (int slab = 0; slab < ENTRIES; slab++) {
            int entry = n * ENTRIES + slab;
            cp_async_wait<STAGES - 2>();
            __syncwarp();
            Tile x{memory + entry % STAGES * ENTRY, NK};
            if (slab == 0) {
                UNROLL for (int m = 0; m < NK / 8; m++)
                    UNROLL for (int half = 0; half < 2; half++) {
                        float2 q = two(x.at(lane_g() + 8 * half, 8 * m + 2 * lane_q())), e = two(x.data + 16 * NK + 8 * m + 2 * lane_q());
                        S[m][2 * half] = S[m][2 * half] * e.x + q.x, S[m][2 * half + 1] = S[m][2 * half + 1] * e.y + q.y;
                    }
            } else {
                Left rows[2] = {left(copy, 0, 16 * (slab - 1)), left(copy, 0, 16 * (slab - 1) + 8)};
                UNROLL for (int m = 0; m < NK / 8; m++)
                    UNROLL for (int half = 0; half < 2; half++) multiply<EXACT>(S[m], rows[half], right(x, 8 * half, 8 * m));
            }
            __syncwarp();
            start(entry + STAGES - 1);
        }
    }
    each_pair([&](int64_t at, int j, float x, float y) { put_pair(c.after + head * state_size + at, j, size, x, y); });
}

// ------------------------------------------------------------------------------------------------------------------ backward

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

// The state's part of one chunk backwards, D the gradient of the state at its end (at its start, on return); `du` and `dv` have
// been begun with D.   du' += dy' Aqb   dz' = du' M   D += dy' q + dz' a
template <class T>
DEVICE void retreat(const Block<T>& s, State& D, const Left (&dy)[2], const float (&du)[2][4], Left (&dz)[2]) {
    constexpr bool exact = EXACT<T>;
    Left x[2] = {as_left<exact>(du[0]), as_left<exact>(du[1])};
    float result[2][4] = {};
    times_lower<exact>(x, s.square(INVERSE), result);
    UNROLL for (int n = 0; n < 2; n++) dz[n] = as_left<exact>(result[n]);
    add_product<T>(D, dy, s.q);
    add_product<T>(D, dz, s.a);
}

template <class T>
DEVICE void decay_state(const Block<T>& s, State& D) {
    UNROLL for (int n = 0; n < NK / 8; n++) {
        float2 decay = two(s.decay + 8 * n + 2 * lane_q());
        D[n][0] *= decay.x, D[n][1] *= decay.y, D[n][2] *= decay.x, D[n][3] *= decay.y;
    }
}

// The map of a segment backwards, as `forward` has it without Q.
template <class T>
__global__ void __launch_bounds__(THREADS, blocks(EXACT<T>, ADJOINT)) adjoint(Backward c) {
    constexpr bool exact = EXACT<T>;
    int segments = divide_up(c.s.steps, SEGMENT), chunks = divide_up(c.s.steps, CHUNK);
    Block<T> s(c.s, c.in, c.dy, ADJOINT, segments, int(blockIdx.y));
    int first = int(blockIdx.x) % segments * (SEGMENT / CHUNK), chunk = min(first + SEGMENT / CHUNK, chunks) - 1;
    State D;
    begin_map(s, D);
    Ahead<T> ahead;
    if (int(threadIdx.x) < 2 * NK) fetch<Q>(s, chunk, int(threadIdx.x), ahead);
    copy_rows(s, c.dy, chunk, s.dy(0));
    cp_async_commit();
    for (int i = 0; chunk >= first; i++, chunk--) {
        __syncthreads();
        scale<Q>(s, chunk, ahead);
        __syncthreads();
        gather_decay(s, i == 0);
        if (chunk > first) {
            if (int(threadIdx.x) < 2 * NK) fetch<Q>(s, chunk - 1, int(threadIdx.x), ahead);
            copy_rows(s, c.dy, chunk - 1, s.dy(i + 1));
        }
        cp_async_commit();
        scores<Q>(s);
        decay_state(s, D);
        float du[2][4] = {};
        UNROLL for (int n = 0; n < NK / 8; n++) times_turned<T>(as_left<exact>(D[n]), s.b, n, du);
        cp_async_wait<1>();
        __syncthreads();
        Left dy[2] = {left_turned(s.dy(i), 0, s.own_row()), left_turned(s.dy(i), 8, s.own_row())}, dz[2];
        times_lower<exact>(dy, s.square(AQB), du);
        retreat(s, D, dy, du, dz);
    }
    end_map(s, D, c.maps);
}

// The transposed 16 x 16 result x (values by steps) to columns of a tile of steps by values.
template <bool EXACT>
DEVICE void put_turned(const float (&x)[2][4], const Tile& to, int row) {
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int i = 0; i < 4; i++) *to.at(8 * n + 2 * lane_q() + i % 2, row + lane_g() + i / 2 * 8) = ready<EXACT>(x[n][i]);
}

// Where the gradients of keys go: to where they belong, or, of one of several splits of the values, to scratch.
template <class T>
struct Gradients {
    void* data[5];
    bool whole;
    DEVICE void put(int which, int64_t row, int j, int size, float x, float y) const {
        if (whole)
            put_pair(static_cast<T*>(data[which]) + row, j, size, x, y);
        else
            put_pair(static_cast<float*>(data[which]) + row, j, size, x, y);
    }
};

// Gradients of r, w, k, a, b at 16 columns from `j` on, of one chunk. m are the masked products dA.
//   dr = E (dAqk k + dAqb b + dy S)   da = E_before (dAak k + dAab b + dz S)
//   dk = (dAqk' q + dAak' a + v D) / E   db = (dAqb' q + dAab' a + u D) / E     where D has been decayed
// and of the log decay of step t, with x_t = r dr - k dk - b db and f_t = a da,
//   sum_i D S + sum_s (k (v D) + b (u D))_s + sum_{s >= t} x_s + sum_{s > t} f_s
template <class T, class TileS, class TileE>
DEVICE void key_gradients(const Block<T>& s, const Rows<T>& v, const Rows<T>& dy, const Tile& u, const Tile& dz, const TileS& S,
                          const Tile& D, const TileE& e, int chunk, int j, const Gradients<T>& to) {
    constexpr bool exact = EXACT<T>;
    float dr[2][4] = {}, da[2][4] = {}, dk[2][4] = {}, db[2][4] = {}, sum[2] = {};
#pragma unroll 2
    for (int i = 0; i < s.rows; i += 8) {
        Left rows_dy = left(dy, 0, i), rows_dz = left(dz, 0, i), rows_v = left(v, 0, i), rows_u = left(u, 0, i);
        UNROLL for (int n = 0; n < 2; n++) {
            Right state = right(S, i, j + 8 * n), grad = right(D, i, j + 8 * n);
            multiply<exact>(dr[n], rows_dy, state), multiply<exact>(da[n], rows_dz, state);
            multiply<exact>(dk[n], rows_v, grad), multiply<exact>(db[n], rows_u, grad);
            sum[n] += state.x[0] * grad.x[0] + state.x[1] * grad.x[1];  // at column g
        }
    }
    // From here on a lane has rows g, g+8 and columns 2q, 2q+1 of both halves, as results stand.
    int64_t row = s.row(chunk * CHUNK + lane_g());
    int count = s.count(chunk);
    float anchor[2][2];
    UNROLL for (int n = 0; n < 2; n++) {
        UNROLL for (int by = 1; by < 4; by *= 2) sum[n] += __shfl_xor_sync(~0u, sum[n], by);
        UNROLL for (int i = 0; i < 2; i++) anchor[n][i] = __shfl_sync(~0u, sum[n], 4 * (2 * lane_q() + i));
    }
    auto at = [&](const auto& x, int n, int half) { return two(x.at(lane_g() + 8 * half, j + 8 * n + 2 * lane_q())); };
    float made[2][4];  // k (v D) + b (u D)
    UNROLL for (int n = 0; n < 2; n++)
        UNROLL for (int half = 0; half < 2; half++) {
            float2 k = at(s.k, n, half), b = at(s.b, n, half);
            made[n][2 * half] = k.x * dk[n][2 * half] + b.x * db[n][2 * half];
            made[n][2 * half + 1] = k.y * dk[n][2 * half + 1] + b.y * db[n][2 * half + 1];
        }
    UNROLL for (int t = 0; t < 16; t += 8) {
        Left qk = left(s.square(AQK), 0, t), qb = left(s.square(AQB), 0, t), ak = left(s.square(AAK), 0, t), ab = left(s.square(AAB), 0, t);
        UNROLL for (int n = 0; n < 2; n++) {
            Right k = right(s.k, t, j + 8 * n), b = right(s.b, t, j + 8 * n);
            multiply<exact>(dr[n], qk, k), multiply<exact>(dr[n], qb, b);
            multiply<exact>(da[n], ak, k), multiply<exact>(da[n], ab, b);
        }
        qk = left_turned(s.square(AQK), t, 0), qb = left_turned(s.square(AQB), t, 0);
        ak = left_turned(s.square(AAK), t, 0), ab = left_turned(s.square(AAB), t, 0);
        UNROLL for (int n = 0; n < 2; n++) {
            Right q = right(s.q, t, j + 8 * n), a = right(s.a, t, j + 8 * n);
            multiply<exact>(dk[n], qk, q), multiply<exact>(dk[n], ak, a);
            multiply<exact>(db[n], qb, q), multiply<exact>(db[n], ab, a);
        }
    }
    UNROLL for (int n = 0; n < 2; n++) {
        int column = j + 8 * n + 2 * lane_q();
        float2 raw[2] = {};
        UNROLL for (int half = 0; half < 2; half++)
            if (lane_g() + 8 * half < count)
                raw[half] = open(get_pair(static_cast<const T*>(s.in.w) + row + int64_t(8 * half) * s.heads * s.size, column, s.size));
        float dw[4], all[2][2];  // x + f, then the sums over later steps
        UNROLL for (int half = 0; half < 2; half++) {
            float2 q = at(s.q, n, half), a = at(s.a, n, half), k = at(s.k, n, half), b = at(s.b, n, half);
            float tiles[4][2] = {{q.x, q.y}, {a.x, a.y}, {k.x, k.y}, {b.x, b.y}};
            UNROLL for (int i = 0; i < 2; i++) {
                int m = 2 * half + i;
                dw[m] = tiles[0][i] * dr[n][m] - tiles[2][i] * dk[n][m] - tiles[3][i] * db[n][m];
                all[half][i] = dw[m] + tiles[1][i] * da[n][m];
            }
        }
        UNROLL for (int i = 0; i < 2; i++) {
            float later[2], total[2];
            UNROLL for (int half = 0; half < 2; half++) {
                float x = all[half][i];  // of step g + 8 half; then also of those after it up to 7
                UNROLL for (int by = 1; by < 8; by *= 2) {
                    float other = __shfl_down_sync(~0u, x, 4 * by);
                    if (lane_g() + by < 8) x += other;
                }
                later[half] = x - all[half][i];
                total[half] = __shfl_sync(~0u, x, lane_q());
            }
            float start = made[n][i] + made[n][2 + i];
            UNROLL for (int by = 4; by < 32; by *= 2) start += __shfl_xor_sync(~0u, start, by);
            start += anchor[n][i];
            dw[i] += start + later[0] + total[1], dw[2 + i] += start + later[1];
        }
        UNROLL for (int half = 0; half < 2; half++) {
            int t = lane_g() + 8 * half;
            if (t >= count) continue;
            float2 up = two(e.at(t, column)), late = t ? two(e.at(t - 1, column)) : make_float2(1, 1);
            int64_t to_row = row + int64_t(8 * half) * s.heads * s.size;
            int m = 2 * half;
            auto slope = [&](float w) {  // of the log decay: sigmoid(w) sigmoid(-w), exact on both sides
                float x = exponential<exact>(-fabsf(w));
                return -RATE * quotient<exact>(x, (1 + x) * (1 + x));
            };
            to.put(0, to_row, column, s.size, up.x * dr[n][m], up.y * dr[n][m + 1]);
            to.put(1, to_row, column, s.size, slope(raw[half].x) * dw[m], slope(raw[half].y) * dw[m + 1]);
            to.put(2, to_row, column, s.size, quotient<exact>(dk[n][m], up.x), quotient<exact>(dk[n][m + 1], up.y));
            to.put(3, to_row, column, s.size, late.x * da[n][m], late.y * da[n][m + 1]);
            to.put(4, to_row, column, s.size, quotient<exact>(db[n][m], up.x), quotient<exact>(db[n][m + 1], up.y));
        }
    }
}

// Of all segments, the last first, or (s.parallel) of one, from the gradient of the state at its end. A segment's chunks are gone
// through forwards for the states at their starts, and then backwards.
template <class T>
__global__ void __launch_bounds__(THREADS, blocks(EXACT<T>, BACKWARD)) backward(Backward c) {
    constexpr bool exact = EXACT<T>;
    constexpr int PER = SEGMENT / CHUNK;
    int segments = divide_up(c.s.steps, SEGMENT), chunks = divide_up(c.s.steps, CHUNK), parts = c.s.parallel ? segments : 1;
    Block<T> s(c.s, c.in, c.dy, BACKWARD, parts, int(blockIdx.y));
    DYNAMIC_SHARED(unsigned char, memory);
    Layout where = layout<T>(BACKWARD, s.rows);
    auto tile = [&](int offset, int pitch) { return Tile{reinterpret_cast<float*>(memory + offset), pitch}; };
    Tile u_tile = tile(where.u, padded(s.rows)), dz_tile = tile(where.dz, padded(s.rows)), S_tile = tile(where.S, NK), D_tile = tile(where.D, NK);
    int splits = int(gridDim.y);
    int64_t block = int64_t(blockIdx.x) * splits + blockIdx.y, state_size = int64_t(s.size) * s.size;
    float* states = c.states + block * (PER * s.rows + (LEAN ? CHUNK : 0)) * NK;
    auto state_at = [&](int i) { return Plain{states + int64_t(i) * s.rows * NK, NK}; };
    s.e_far = state_at(PER);
    Gradients<T> to = {{c.dr, c.dw, c.dk, c.da, c.db}, splits == 1};
    if (!to.whole) {
        int64_t all = c.s.batch * c.s.steps * c.s.heads * c.s.size;
        UNROLL for (int n = 0; n < 5; n++) to.data[n] = c.parts + (n * splits + int(blockIdx.y)) * all;
    }
    const int last = c.s.parallel ? int(blockIdx.x) % parts : segments - 1, first = c.s.parallel ? last : 0;

    State D;
    load_state(s, c.s.parallel ? c.ends + int64_t(blockIdx.x) * state_size : c.dfinal + s.batch_head * state_size, D);
    Ahead<T> ahead;
    int turn = 0;  // which of the two buffers of v and dy
    auto prepare = [&](int chunk, bool both, int buffer) {
        if (chunk >= 0) {
            if (int(threadIdx.x) < 2 * NK) {
                if (both)
                    fetch<Q | K>(s, chunk, int(threadIdx.x), ahead);
                else
                    fetch<K>(s, chunk, int(threadIdx.x), ahead);
            }
            copy_rows(s, s.in.v, chunk, s.v(buffer));
            if (both) copy_rows(s, c.dy, chunk, s.dy(buffer));
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
            put_state<false>(D, D_tile, s.own_row());
            for (int i = 0; i < n; i++) {
                put_state<!exact>(S, state_at(i), s.own_row());
                if (i == n - 1) break;
                __syncthreads();
                scale<K>(s, base + i, ahead);
                __syncthreads();
                prepare(base + i + 1, i + 1 == n - 1, turn + 1);
                advance<K>(s, S, s.v(turn), base + i, static_cast<T*>(nullptr));
                turn++;
            }
            get_state(D, D_tile, s.own_row());
        }
        for (int i = n - 1; i >= 0; i--) {
            int chunk = base + i;
            Rows<T> v_rows = s.v(turn), dy_rows = s.dy(turn);
            __syncthreads();
            if constexpr (!LEAN) {
                Plain from = state_at(i);
                for (int m = int(threadIdx.x); m < s.rows * NK / 4; m += int(blockDim.x))
                    cp_async(S_tile.at(m / (NK / 4), m % (NK / 4) * 4), from.at(m / (NK / 4), m % (NK / 4) * 4));
            }
            cp_async_commit();
            scale<Q | K | E>(s, chunk, ahead);
            __syncthreads();
            if (i > 0)
                prepare(chunk - 1, true, turn + 1);
            else
                prepare(segment > first ? (segment - 1) * PER : -1, false, turn + 1);
            scores<Q | K>(s);
            decay_state(s, D);
            put_state<!exact>(D, D_tile, s.own_row());
            float du[2][4] = {}, dv[2][4] = {}, z[2][4] = {};
            UNROLL for (int m = 0; m < NK / 8; m++) {
                Left x = as_left<exact>(D[m]);
                times_turned<T>(x, s.b, m, du);
                times_turned<T>(x, s.k, m, dv);
            }
            cp_async_wait<1>();
            __syncthreads();
            {
                Left v[2] = {left_turned(v_rows, 0, s.own_row()), left_turned(v_rows, 8, s.own_row())};
                UNROLL for (int m = 0; m < NK / 8; m++) {
                    Left x = LEAN ? left(state_at(i), s.own_row(), 8 * m) : left(S_tile, s.own_row(), 8 * m);
                    times_turned<T>(x, s.a, m, z);
                }
                times_lower_turned<exact>(v, s.square(AAK), z);
                Left x[2] = {as_left<exact>(z[0]), as_left<exact>(z[1])};
                float u[2][4] = {};
                times_lower_turned<exact>(x, s.square(INVERSE), u);
                put_turned<exact>(u, u_tile, s.own_row());
            }
            {
                Left dy[2] = {left_turned(dy_rows, 0, s.own_row()), left_turned(dy_rows, 8, s.own_row())}, dz[2];
                times_lower<exact>(dy, s.square(AQB), du);
                times_lower<exact>(dy, s.square(AQK), dv);
                retreat(s, D, dy, du, dz);
                times_lower<exact>(dz, s.square(AAK), dv);
                float back[2][4];
                UNROLL for (int m = 0; m < 2; m++) back[m][0] = dz[m].x[0], back[m][1] = dz[m].x[2], back[m][2] = dz[m].x[1], back[m][3] = dz[m].x[3];
                put_turned<exact>(back, dz_tile, s.own_row());
                stage_rows(s, dv, s.out);
                store_rows(s, s.out, static_cast<T*>(c.dv), chunk);
            }
            __syncthreads();
            for (int task = 0; task < 4; task++) {
                if (task % (int(blockDim.x) / 32) != s.warp()) continue;
                if (task == AAB) score<exact, 0>(dz_tile, u_tile, s.rows, true, true, s.square(AAB));
                if (task == AAK) score<exact, 0>(dz_tile, v_rows, s.rows, true, true, s.square(AAK));
                if (task == AQK) score<exact, 0>(dy_rows, v_rows, s.rows, false, true, s.square(AQK));
                if (task == AQB) score<exact, 0>(dy_rows, u_tile, s.rows, false, true, s.square(AQB));
            }
            __syncthreads();
            for (int j = 16 * s.warp(); j < NK; j += int(blockDim.x) / 2) {
                if constexpr (LEAN)
                    key_gradients(s, v_rows, dy_rows, u_tile, dz_tile, state_at(i), D_tile, s.e_far, chunk, j, to);
                else
                    key_gradients(s, v_rows, dy_rows, u_tile, dz_tile, S_tile, D_tile, s.e, chunk, j, to);
            }
            turn++;
        }
    }
    if (!c.s.parallel) store_state(s, D, c.dstate + s.batch_head * state_size);
}

// The sum of what the splits have of each of five gradients.
template <class T>
__global__ void add_parts(const float* parts, void* dr, void* dw, void* dk, void* da, void* db, int64_t all, int splits) {
    void* to[5] = {dr, dw, dk, da, db};
    T* y = static_cast<T*>(to[blockIdx.y]);
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < all; i += int64_t(gridDim.x) * blockDim.x) {
        float sum = 0;
        for (int n = 0; n < splits; n++) sum += parts[(int64_t(blockIdx.y) * splits + n) * all + i];
        y[i] = from(sum, y);
    }
}

// -------------------------------------------------------------------------------------------------------------------- launches

// f(T()) for the inputs' type.
template <class F>
int with_type(const Shape& s, F&& f) {
    return s.is_bf16 ? f(bf16()) : f(float());
}

struct Launch {
    const Shape& s;
    dim3 grid(int parts, int times = 1) const {
        return dim3(unsigned(s.batch * s.heads * parts), unsigned(NK / (16 * int(s.warps)) * times));
    }
};

struct Plan {
    Shape s;        // of which `parallel` asks: 0 fused, 1 parallel, 2 whichever is faster
    int64_t limit;  // of shared memory of a block in bytes; 0: the GPU's
    int64_t* result;  // parallel, warps; floats of scratch: Forward's maps; Backward's states, parts, maps, ends
    int64_t stream;
};

}  // namespace

// Chooses how to run a shape: warps of a block (16 rows of values each), and the schedule.
extern "C" int rwkv_wkv7_plan(const Plan* record) {
    const Plan& p = *record;
    const Shape& s = p.s;
    int limit = 227 * 1024, processors = 132;
#ifdef __CUDACC__
    int device;
    cudaError_t error = cudaGetDevice(&device);
    if (!error) error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (!error) error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
    if (error) return int(error);
#endif
    if (p.limit) limit = int(p.limit);
    int warps = WARPS, segments = divide_up(s.steps, SEGMENT);
    auto fits = [&] {
        return with_type(s, [&](auto type) { return layout<decltype(type)>(BACKWARD, 16 * warps).end <= limit; });
    };
    while (warps > 1 && !fits()) warps /= 2;
    int64_t splits = NK / (16 * warps), heads = s.batch * s.heads, slots = 2 * processors;
    // In units of the time that a block takes for a chunk: maps cost as much again as what uses them; a map is applied in a quarter.
    auto waves = [&](int64_t count) { return double((count + slots - 1) / slots); };
    double fused = waves(heads * splits) * double(divide_up(s.steps, CHUNK));
    double parallel = waves(heads * splits * segments) * (SEGMENT / CHUNK) * 2.2 + 0.25 * segments + 6;
    int64_t in_parallel = s.parallel == 2 ? parallel < fused : s.parallel;
    int64_t square = int64_t(NK) * NK, parts = in_parallel ? segments : 1;
    int64_t maps = in_parallel ? heads * segments * (2 * NK + 1) * NK : 0;
    p.result[0] = in_parallel, p.result[1] = warps, p.result[2] = maps;
    p.result[3] = heads * parts * (SEGMENT / CHUNK * square + (LEAN ? splits * CHUNK * NK : 0));
    p.result[4] = splits > 1 ? 5 * splits * heads * s.steps * s.size : 0;
    p.result[5] = maps, p.result[6] = in_parallel ? heads * segments * s.size * s.size : 0;
    return 0;
}

extern "C" int rwkv_wkv7_forward(const Forward* record) {
    return with_type(record->s, [&](auto type) {
        using T = decltype(type);
        const Forward& c = *record;
        int segments = divide_up(c.s.steps, SEGMENT), parts = c.s.parallel ? segments : 1, threads = int(32 * c.s.warps);
        int shared = layout<T>(FORWARD, threads / 2).end;
        Launch launch{c.s};
        if (c.s.parallel) {
            int error = LAUNCH((forward<K, T>), launch.grid(segments, 2), threads, shared, c.stream, c);
            if (error) return error;
            Scan scans{segments, c.s.size, 0, c.state, c.maps, c.kept, c.final};
            error = LAUNCH((scan<EXACT<T>>), dim3(unsigned(c.s.batch * c.s.heads), NK / 16), 32,
                           (17 * STAGES + 16) * NK * 4, c.stream, scans);
            if (error) return error;
        }
        return LAUNCH((forward<Q | K, T>), launch.grid(parts), threads, shared, c.stream, c);
    });
}

extern "C" int rwkv_wkv7_backward(const Backward* record) {
    return with_type(record->s, [&](auto type) {
        using T = decltype(type);
        const Backward& c = *record;
        int segments = divide_up(c.s.steps, SEGMENT), parts = c.s.parallel ? segments : 1, threads = int(32 * c.s.warps);
        Launch launch{c.s};
        if (c.s.parallel) {
            int error = LAUNCH((adjoint<T>), launch.grid(segments, 2), threads,
                               layout<T>(ADJOINT, threads / 2).end, c.stream, c);
            if (error) return error;
            Scan scans{segments, c.s.size, 1, c.dfinal, c.maps, c.ends, c.dstate};
            error = LAUNCH((scan<EXACT<T>>), dim3(unsigned(c.s.batch * c.s.heads), NK / 16), 32,
                           (17 * STAGES + 16) * NK * 4, c.stream, scans);
            if (error) return error;
        }
        int error = LAUNCH((backward<T>), launch.grid(parts), threads,
                           layout<T>(BACKWARD, threads / 2).end, c.stream, c);
        int splits = NK / (threads / 2);
        if (error || splits == 1) return error;
        int64_t all = c.s.batch * c.s.steps * c.s.heads * c.s.size;
        return LAUNCH((add_parts<T>), dim3(unsigned(std::min<int64_t>((all + 255) / 256, 4096)), 5), 256, 0, c.stream,
                      static_cast<const float*>(c.parts), c.dr, c.dw, c.dk, c.da, c.db, all, splits);
    });
}
