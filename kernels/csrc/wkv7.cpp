// WKV-7, LENGTH steps at a time: forward, and backward from the states kept every INTERVAL steps. The equations are in
// kernels/wkv7.py.
//
// Within a chunk the state after each step is not formed. What a step reads by a row x over the keys, x' S, is what it reads
// from the state before the chunk and from each step in between: the row shrinks by the decays on its way back to them. So the
// work on states is products of matrices, sixteen rows at a time: those that are read by, a and r of eight steps; and those
// that are written by, k and b. The rest is sums over pairs of steps. No decay is divided by, so none need have a limit.
//
// Longer chunks would be less exact where all keys are alike: then what a step removes is a small difference of what the steps
// before it have written and removed. With fewer than 4 channels they are always alike, and steps go one by one.

#include "heads.h"
#include "rows7.h"

namespace {

constexpr int64_t LENGTH = 8;
constexpr int64_t INTERVAL = 64;

enum Input { R, W, K, V, A, B, INPUTS };

using Inputs = InputsOf<INPUTS>;

int64_t chunk_length(const Shape& s) { return s.size < 4 ? 1 : LENGTH; }

// One chunk of one head. Rows over the keys are padded to `keys` values, those over the values to `lanes`, all begin on a
// cache line's border, and steps that a chunk lacks are rows of zeros.
struct Chunk {
    static constexpr int64_t L = LENGTH;
    int64_t keys, lanes;
    float *r, *decay, *k, *a, *b;  // (L, keys)
    float* reads;                  // (2 L, keys): a and r, each shrunk by the decays since the chunk's start
    float* writes;                 // (2 L, keys): k and b, each shrunk by the decays until the chunk's end
    float* whole;                  // (keys): the product of the decays
    float* values;                 // (2 L, lanes): v, and u = S a
    float* pairs;                  // (2 L L): what each read row finds of each that was written before

    static int64_t size(int64_t keys, int64_t lanes) { return (9 * L + 1) * keys + 2 * L * lanes + 2 * L * L; }

    Chunk(float* memory, int64_t keys, int64_t lanes) : keys(keys), lanes(lanes) {
        const auto take = [&](int64_t size) {
            float* const it = memory;
            memory += size;
            return it;
        };
        r = take(L * keys), decay = take(L * keys), k = take(L * keys), a = take(L * keys), b = take(L * keys);
        reads = take(2 * L * keys), writes = take(2 * L * keys), whole = take(keys);
        values = take(2 * L * lanes), pairs = take(2 * L * L);
    }
};

// exp(x) for x in [LOG_DECAY_MIN, 0]: Taylor's series to x^9, exact near 0, where errors would add up over many steps.
INLINE part exp_small(part x) {
    part y = part{} + 1.0f / 362880;
    for (float term : {1.0f / 40320, 1.0f / 5040, 1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f}) y = y * x + term;
    return y;
}

// The inputs of steps `start` to `end` and of `count` values from `first` on. `slope`, unless null, becomes
// d decay / d w_raw over the decay: sigmoid(-w) there, for 1 - sigmoid(w) has no correct digit left at w = 17.
APART void gather(const Inputs& in, const Shape& s, int64_t head, int64_t start, int64_t end, int64_t first, int64_t count,
                  const Chunk& c, float* slope) {
    constexpr int64_t L = LENGTH;
    const auto keys = [&](Input which, float* to) { fetch(in.rows(which), s, head, start, end, 0, s.size, L, to, c.keys); };
    keys(R, c.r), keys(W, c.decay), keys(K, c.k), keys(A, c.a), keys(B, c.b);
    fetch(in.rows(V), s, head, start, end, first, count, L, c.values, c.lanes);
    const int64_t there = std::min(end - start, L) * c.keys;
    for (int64_t i = 0; i < there; i += LANES) {
        const part e = exp_part(-load_part(c.decay + i)), share = 1.0f / (1.0f + e);
        store_part(c.decay + i, exp_small(LOG_DECAY_MIN * share));
        if (slope) store_part(slope + i, LOG_DECAY_MIN * share * (e * share));
    }
    std::fill(c.decay + there, c.decay + L * c.keys, 1.0f);
}

// Where among the pairs those of step t begin: a and k of steps s < t, a and b, r and k of steps s <= t, r and b.
constexpr int64_t with(int64_t t) { return 2 * t * t; }
constexpr int64_t ak(int64_t t, int64_t s) { return with(t) + s; }
constexpr int64_t ab(int64_t t, int64_t s) { return with(t) + t + s; }
constexpr int64_t rk(int64_t t, int64_t s) { return with(t) + 2 * t + s; }
constexpr int64_t rb(int64_t t, int64_t s) { return with(t) + 3 * t + 1 + s; }

// reads, writes, whole and pairs, from the rows.
APART void relate(const Chunk& c, Ahead& ahead) {
    constexpr int64_t L = LENGTH, BLOCK = 4;  // registers of a row that stay in them
    const int64_t keys = c.keys;
    alignas(64) part found[with(L)];
    const auto block = [&](auto size, int64_t t, int64_t at) ALWAYS {
        constexpr int Q = size;
        const auto so_far = [&](int64_t i) ALWAYS { return at ? found[i] : part{}; };
        part x[Q], y[Q], own[2] = {so_far(rk(t, t)), so_far(rb(t, t))};
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            const int64_t i = t * keys + at + q * LANES;
            x[q] = load_part(c.a + i), y[q] = load_part(c.r + i);
            own[0] += y[q] * load_part(c.k + i), own[1] += y[q] * load_part(c.b + i);
            y[q] *= load_part(c.decay + i);
        }
        found[rk(t, t)] = own[0], found[rb(t, t)] = own[1];
        for (int64_t s = t - 1; s >= 0; s--) {
            part by_a[2] = {so_far(ak(t, s)), so_far(ab(t, s))}, by_r[2] = {so_far(rk(t, s)), so_far(rb(t, s))};
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) {
                const int64_t i = s * keys + at + q * LANES;
                const part k = load_part(c.k + i), b = load_part(c.b + i), decay = load_part(c.decay + i);
                by_a[0] += x[q] * k, by_a[1] += x[q] * b, by_r[0] += y[q] * k, by_r[1] += y[q] * b;
                x[q] *= decay, y[q] *= decay;
            }
            found[ak(t, s)] = by_a[0], found[ab(t, s)] = by_a[1], found[rk(t, s)] = by_r[0], found[rb(t, s)] = by_r[1];
        }
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            store_part(c.reads + t * keys + at + q * LANES, x[q]);
            store_part(c.reads + (L + t) * keys + at + q * LANES, y[q]);
        }
    };
    for (int64_t t = 0; t < L; t++) {
        ahead.some();
        int64_t at = 0;
        for (; at + BLOCK * LANES <= keys; at += BLOCK * LANES) block(std::integral_constant<int, BLOCK>(), t, at);
        for (; at < keys; at += LANES) block(std::integral_constant<int, 1>(), t, at);
    }
    for (int64_t i = 0; i < with(L); i += WIDTH) {
        part total[PARTS];
        sums(found + i, total);
        for (int j = 0; j < PARTS; j++) store_part(c.pairs + i + j * LANES, total[j]);
    }
    for (int64_t at = 0; at < keys; at += LANES) {
        part until = part{} + 1.0f;
        for (int64_t i = (L - 1) * keys + at; i >= 0; i -= keys) {
            store_part(c.writes + i, load_part(c.k + i) * until);
            store_part(c.writes + L * keys + i, load_part(c.b + i) * until);
            until *= load_part(c.decay + i);
        }
        store_part(c.whole + at, until);
    }
}

// From what a and r read from the state before the chunk, `found` (2 L, lanes), to u, among the values, and y (L, lanes),
// unless that is null.
APART void pass_on(const Chunk& c, const float* found, float* y) {
    constexpr int64_t L = LENGTH;
    for (int64_t at = 0; at < c.lanes; at += LANES) {
        part value[2 * L];
#pragma GCC unroll 8
        for (int64_t t = 0; t < L; t++) {
            value[t] = load_part(c.values + t * c.lanes + at);
            part u = load_part(found + t * c.lanes + at);
#pragma GCC unroll 8
            for (int64_t s = 0; s < t; s++) {
                u += c.pairs[ak(t, s)] * value[s];
                u += c.pairs[ab(t, s)] * value[L + s];
            }
            value[L + t] = u;
            store_part(c.values + (L + t) * c.lanes + at, u);
        }
        if (!y) continue;
#pragma GCC unroll 8
        for (int64_t t = 0; t < L; t++) {
            part out = load_part(found + (L + t) * c.lanes + at);
#pragma GCC unroll 8
            for (int64_t s = 0; s <= t; s++) {
                out += c.pairs[rk(t, s)] * value[s];
                out += c.pairs[rb(t, s)] * value[L + s];
            }
            store_part(y + t * c.lanes + at, out);
        }
    }
}

// All steps of `count` values from `first` on of some heads.
void forward(const Inputs& in, const Shape& s, const Heads& heads, int64_t first, int64_t count, const float* state, Rows<void> y,
             float* final, float* before) {
    const int64_t keys = s.padded(), lanes = round_up(count), square = s.size * s.size, length = chunk_length(s);
    const Buffer memory = buffer(Chunk::size(keys, lanes) + (heads.count() * keys + 3 * LENGTH) * lanes);
    const Chunk c(memory.get(), keys, lanes);
    float *const found = memory.get() + Chunk::size(keys, lanes), *const out = found + 2 * LENGTH * lanes;
    float* const states = out + LENGTH * lanes;
    for (int64_t head = heads.begin; head < heads.end; head++)
        enter(state + head * square, s, first, count, states + heads.index(head) * keys * lanes, lanes);
    for (int64_t begin = 0; begin < s.steps; begin += INTERVAL)
        for (int64_t head = heads.begin; head < heads.end; head++) {
            float* const S = states + heads.index(head) * keys * lanes;
            if (before) keep(S, s, first, count, before + (head * s.intervals(INTERVAL) + begin / INTERVAL) * square, lanes);
            for (int64_t start = begin; start < std::min(begin + INTERVAL, s.steps); start += length) {
                const int64_t end = std::min(start + length, s.steps);
                gather(in, s, head, start, end, first, count, c, nullptr);
                Ahead ahead;
                const Place next = heads.next(head, end, INTERVAL);
                for (Input which : {R, W, K, V, A, B}) ahead.add(in.rows(which), s, next.head, next.step, next.step + length);
                ahead.add(y, s, next.head, next.step, next.step + length);
                const Place after = heads.next(head, std::min(begin + INTERVAL, s.steps), INTERVAL);
                ahead.add(before, s, after, INTERVAL, (start - begin) / length, INTERVAL / length);
                relate(c, ahead);
                read_by(2 * LENGTH, c.reads, S, keys, lanes, found, ahead);
                pass_on(c, found, out);
                put(y, s, head, start, end, first, count, out, lanes);
                write_by(c.whole, S, c.writes, c.values, keys, lanes, S, ahead);
            }
        }
    for (int64_t head = heads.begin; head < heads.end; head++)
        leave(states + heads.index(head) * keys * lanes, s, first, count, final + head * square, lanes);
}

// One step of one head whose N is a multiple of 16.
void forward_1(const Inputs& in, const Shape& s, int64_t head, const float* state, Rows<void> y, float* final) {
    const int64_t n = s.size, square = n * n;
    const Buffer scratch = buffer((INPUTS + 1) * n);
    float* const x = scratch.get();
    for (int i = 0; i < INPUTS; i++) fetch(in.rows(Input(i)), s, head, 0, 1, 0, n, 1, x + i * n, n);
    squash(x + W * n, n);
    float* const out = x + INPUTS * n;
    step(n, x + R * n, x + W * n, x + K * n, x + V * n, x + A * n, x + B * n, state + head * square, final + head * square, out);
    put(y, s, head, 0, 1, 0, n, out, n);
}

// The transpose of `pass_on`. dvalues (2 L, lanes) has what the gradient of the state after the chunk gives v and u; dreads
// (2 L, lanes) has dy in its second half. The first becomes the gradient of v, in its first half, the other of what a and r
// read.
APART void pass_back(const Chunk& c, float* dvalues, float* dreads) {
    constexpr int64_t L = LENGTH;
    for (int64_t at = 0; at < c.lanes; at += LANES) {
        part grad[2 * L];  // of what a and r read
#pragma GCC unroll 8
        for (int64_t t = 0; t < L; t++) grad[L + t] = load_part(dreads + (L + t) * c.lanes + at);
#pragma GCC unroll 8
        for (int64_t s = L - 1; s >= 0; s--) {
            part dv = load_part(dvalues + s * c.lanes + at), du = load_part(dvalues + (L + s) * c.lanes + at);
#pragma GCC unroll 8
            for (int64_t t = s; t < L; t++) {
                dv += c.pairs[rk(t, s)] * grad[L + t];
                du += c.pairs[rb(t, s)] * grad[L + t];
            }
#pragma GCC unroll 8
            for (int64_t t = s + 1; t < L; t++) {
                dv += c.pairs[ak(t, s)] * grad[t];
                du += c.pairs[ab(t, s)] * grad[t];
            }
            grad[s] = du;
            store_part(dvalues + s * c.lanes + at, dv);
            store_part(dreads + s * c.lanes + at, du);
        }
    }
}

// From the gradients of reads and writes, (2 L, keys), and of pairs, to those of a and r, and of k and b, in place.
APART void unrelate(const Chunk& c, const float* dpairs, float* dreads, float* dwrites) {
    constexpr int64_t L = LENGTH;
    for (int64_t at = 0; at < c.keys; at += LANES) {
        const auto row = [&](const float* rows, int64_t t) { return load_part(rows + t * c.keys + at); };
        part x[L], y[L];
        // Forwards in time: what each row has read, shrinking by each decay as the state does.
#pragma GCC unroll 8
        for (int64_t t = 0; t < L; t++) x[t] = row(dreads, t), y[t] = row(dreads, L + t);
#pragma GCC unroll 8
        for (int64_t s = 0; s < L; s++) {
            const part k = row(c.k, s), b = row(c.b, s), decay = row(c.decay, s);
#pragma GCC unroll 8
            for (int64_t t = s; t < L; t++) {
                const float* const p = dpairs + (L + t) * 2 * L + s;
                y[t] = y[t] * decay + p[0] * k;
                y[t] += p[L] * b;
            }
#pragma GCC unroll 8
            for (int64_t t = s + 1; t < L; t++) {
                const float* const p = dpairs + t * 2 * L + s;
                x[t] = x[t] * decay + p[0] * k;
                x[t] += p[L] * b;
            }
        }
#pragma GCC unroll 8
        for (int64_t t = 0; t < L; t++) store_part(dreads + t * c.keys + at, x[t]), store_part(dreads + (L + t) * c.keys + at, y[t]);
        // Backwards: what has read each row.
#pragma GCC unroll 8
        for (int64_t s = 0; s < L; s++) x[s] = row(dwrites, s), y[s] = row(dwrites, L + s);
#pragma GCC unroll 8
        for (int64_t t = L - 1; t >= 0; t--) {
            const part r = row(c.r, t), a = row(c.a, t), decay = row(c.decay, t);
#pragma GCC unroll 8
            for (int64_t s = 0; s <= t; s++) {
                const float *const by_r = dpairs + (L + t) * 2 * L + s, *const by_a = dpairs + t * 2 * L + s;
                x[s] += by_r[0] * r;
                y[s] += by_r[L] * r;
                if (s == t) continue;
                x[s] = x[s] * decay + by_a[0] * a;
                y[s] = y[s] * decay + by_a[L] * a;
            }
        }
#pragma GCC unroll 8
        for (int64_t s = 0; s < L; s++) store_part(dwrites + s * c.keys + at, x[s]), store_part(dwrites + (L + s) * c.keys + at, y[s]);
    }
}

// The decays' gradients follow from the others. Let phi be the sum over the values of S times its own gradient: going through
// a step, phi before = a da + d log(decay), and phi after that = d log(decay) + k dk + b db, of which r dr is spent at once.
// `slope` becomes the gradient of w_raw, phi that after the chunk.
APART void decay_gradient(const Chunk& c, const float* dreads, const float* dwrites, float* phi, float* slope) {
    constexpr int64_t L = LENGTH;
    for (int64_t at = 0; at < c.keys; at += LANES) {
        part now = load_part(phi + at);
        for (int64_t t = 0; t < L; t++) {
            const int64_t i = t * c.keys + at, second = L * c.keys + i;
            const part dlog = now - load_part(c.a + i) * load_part(dreads + i);
            now = dlog + load_part(c.k + i) * load_part(dwrites + i) + load_part(c.b + i) * load_part(dwrites + second);
            now -= load_part(c.r + i) * load_part(dreads + second);
            store_part(slope + i, dlog * load_part(slope + i));
        }
    }
}

void backward(const Inputs& in, const Shape& s, const Heads& heads, const float* before, Rows<const void> dy, const float* dfinal,
              const Rows<void>* grads, float* dstate) {
    constexpr int64_t L = LENGTH;
    const int64_t keys = s.padded(), n = s.size, square = n * n, whole = keys * keys, length = chunk_length(s);
    const int64_t each = Chunk::size(keys, keys) + L * keys + whole, most = INTERVAL / length;
    const Buffer memory = buffer(most * each + 13 * L * keys + 4 * L * L + heads.count() * whole);
    float *const dvalues = memory.get() + most * each, *const dreads = dvalues + 2 * L * keys;
    float *const dread_rows = dreads + 2 * L * keys, *const dwritten_rows = dread_rows + 2 * L * keys;
    float *const turned = dwritten_rows + 2 * L * keys, *const phi = turned + 2 * L * keys, *const dpairs = phi + L * keys;
    float* const dstates = dpairs + 4 * L * L;
    const auto chunk = [&](int64_t i) { return Chunk(memory.get() + i * each, keys, keys); };
    const auto slope = [&](int64_t i) { return memory.get() + i * each + Chunk::size(keys, keys); };
    const auto state = [&](int64_t i) { return slope(i) + L * keys; };
    for (int64_t head = heads.begin; head < heads.end; head++)
        enter(dfinal + head * square, s, 0, n, dstates + heads.index(head) * whole, keys);
    for (int64_t begin = (s.intervals(INTERVAL) - 1) * INTERVAL; begin >= 0; begin -= INTERVAL)
        for (int64_t head = heads.begin; head < heads.end; head++) {
            const int64_t stop = std::min(begin + INTERVAL, s.steps), chunks = (stop - begin + length - 1) / length;
            float* const G = dstates + heads.index(head) * whole;
            take_up(before + (head * s.intervals(INTERVAL) + begin / INTERVAL) * square, s, state(0), keys);
            for (int64_t i = 0; i < chunks; i++) {
                const Chunk c = chunk(i);
                const int64_t start = begin + i * length, end = std::min(start + length, stop);
                gather(in, s, head, start, end, 0, n, c, slope(i));
                Ahead ahead;
                if (end < stop)
                    for (Input which : {R, W, K, V, A, B}) ahead.add(in.rows(which), s, head, end, end + length);
                else
                    ahead.add(dy, s, head, start, end);
                relate(c, ahead);
                read_by(L, c.reads, state(i), keys, keys, dvalues, ahead);
                pass_on(c, dvalues, nullptr);
                if (end < stop) write_by(c.whole, state(i), c.writes, c.values, keys, keys, state(i + 1), ahead);
            }
            for (int64_t i = chunks - 1; i >= 0; i--) {
                const Chunk c = chunk(i);
                const int64_t start = begin + i * length, end = std::min(start + length, stop);
                Ahead ahead;
                for (int which = 0; which < INPUTS; which++) ahead.add(grads[which], s, head, start, end);
                if (i > 0) ahead.add(dy, s, head, start - length, start);
                const Place next = heads.next(head, stop, -INTERVAL);
                for (Input which : {R, W, K, V, A, B}) {  // a share of the rows that come next
                    const int64_t share = length * length / INTERVAL, from = next.step + i * share;
                    ahead.add(in.rows(which), s, next.head, from, from + share);
                }
                ahead.add(before, s, next, INTERVAL, i, INTERVAL / length);
                fetch(dy, s, head, start, end, 0, n, L, dreads + L * keys, keys);
                read_by(2 * L, c.writes, G, keys, keys, dvalues, ahead);
                pass_back(c, dvalues, dreads);
                turn_rows(c.values, keys, turned);
                read_by_turned(turned, G, keys, keys, dwritten_rows, ahead);
                write_by(c.whole, G, c.reads, dreads, keys, keys, G, ahead);
                turn_rows(dreads, keys, turned);
                read_by_turned(turned, state(i), keys, keys, dread_rows, ahead);
                read_by_turned(turned, c.values, 2 * L, keys, dpairs, ahead);
                meet(state(i), G, keys, keys, phi);
                unrelate(c, dpairs, dread_rows, dwritten_rows);
                decay_gradient(c, dread_rows, dwritten_rows, phi, slope(i));
                const float* const found[INPUTS] = {dread_rows + L * keys, slope(i),   dwritten_rows,
                                                    dvalues,               dread_rows, dwritten_rows + L * keys};
                for (int which = 0; which < INPUTS; which++) put(grads[which], s, head, start, end, 0, n, found[which], keys);
            }
        }
    for (int64_t head = heads.begin; head < heads.end; head++)
        leave(dstates + heads.index(head) * whole, s, 0, n, dstate + head * square, keys);
}

}  // namespace

// r, w_raw, k, v, a, b: (B, T, H, N). States are kept before steps 0, 64, ...
extern "C" void rwkv_wkv7_forward(const Forward<INPUTS>* f) { run_forward(*f, forward_1, forward); }

extern "C" void rwkv_wkv7_backward(const Backward<INPUTS>* f) { run_backward(*f, backward); }
