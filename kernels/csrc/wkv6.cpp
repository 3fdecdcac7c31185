// WKV-6, LENGTH steps at a time: forward, and backward from the states kept every INTERVAL steps. The equations are in
// kernels/wkv6.py, and what a chunk is in wkv7.cpp.
//
// A decay may be 0, so no product of decays is divided by another, and no sum is made as a difference of sums: next to a log
// decay of -1000 the digits of one of -0.001 would be lost. Every product is made of its own factors, every sum of its terms.

#include "heads.h"

namespace {

constexpr int64_t LENGTH = 16;
constexpr int64_t INTERVAL = 64;

enum Input { R, K, V, W, TIMED, U = TIMED, INPUTS };

using Inputs = InputsOf<INPUTS>;

// One chunk of one head. Rows over the keys are padded to `keys` values, those over the values to `lanes`, all begin on a
// cache line's border, and steps that a chunk lacks are rows of zeros.
struct Chunk {
    static constexpr int64_t L = LENGTH, PAIRS = round_up(L * (L + 1) / 2);
    int64_t keys, lanes;
    float *r, *k, *decay;  // (L, keys)
    float* reads;          // (L, keys): r, shrunk by the decays since the chunk's start and before its step
    float* writes;         // (L, keys): k, shrunk by the decays after its step until the chunk's end
    float* whole;          // (keys): the product of the decays
    float* values;         // (L, lanes): v
    float* pairs;          // what r of each step finds of k of each before, and of its own times the bonus

    static int64_t size(int64_t keys, int64_t lanes) { return (5 * L + 1) * keys + L * lanes + PAIRS; }

    Chunk(float* memory, int64_t keys, int64_t lanes) : keys(keys), lanes(lanes) {
        const auto take = [&](int64_t size) {
            float* const it = memory;
            memory += size;
            return it;
        };
        r = take(L * keys), k = take(L * keys), decay = take(L * keys), reads = take(L * keys), writes = take(L * keys);
        whole = take(keys), values = take(L * lanes), pairs = take(PAIRS);
    }
};

// Where step t's pair with step s <= t is.
constexpr int64_t pair(int64_t t, int64_t s) { return t * (t + 1) / 2 + s; }

// -exp(w_raw), and the decay exp(-exp(w_raw)).
struct Decay {
    part log, itself;
};

INLINE Decay squash(part w_raw) {
    const part rate = exp_part(w_raw);
    return {-rate, rate > 87.0f ? part{} : exp_part(-rate)};
}

// The inputs of steps `start` to `end` and of `count` values from `first` on. `log_decay` may be null.
APART void gather(const Inputs& in, const Shape& s, int64_t head, int64_t start, int64_t end, int64_t first, int64_t count,
                  const Chunk& c, float* log_decay) {
    constexpr int64_t L = LENGTH;
    const auto keys = [&](Input which, float* to) { fetch(in.rows(which), s, head, start, end, 0, s.size, L, to, c.keys); };
    keys(R, c.r), keys(K, c.k), keys(W, c.decay);
    fetch(in.rows(V), s, head, start, end, first, count, L, c.values, c.lanes);
    const int64_t there = std::min(end - start, L) * c.keys;
    for (int64_t i = 0; i < there; i += LANES) {
        const Decay decay = squash(load_part(c.decay + i));
        store_part(c.decay + i, decay.itself);
        if (log_decay) store_part(log_decay + i, decay.log);
    }
    std::fill(c.decay + there, c.decay + L * c.keys, 1.0f);
}

// reads, writes, whole and pairs, from the rows and the bonus.
APART void relate(const Chunk& c, const float* bonus, Ahead& ahead) {
    constexpr int64_t L = LENGTH, BLOCK = 4;  // registers of a row that stay in them
    const int64_t keys = c.keys;
    alignas(64) part found[Chunk::PAIRS];
    for (int64_t i = pair(L, 0); i < Chunk::PAIRS; i++) found[i] = part{};
    const auto block = [&](auto size, int64_t t, int64_t at) ALWAYS {
        constexpr int Q = size;
        const auto so_far = [&](int64_t s) ALWAYS { return at ? found[pair(t, s)] : part{}; };
        part x[Q], own = so_far(t);
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) {
            x[q] = load_part(c.r + t * keys + at + q * LANES);
            own += x[q] * load_part(bonus + at + q * LANES) * load_part(c.k + t * keys + at + q * LANES);
        }
        found[pair(t, t)] = own;
        for (int64_t s = t - 1; s >= 0; s--) {
            part total = so_far(s);
#pragma GCC unroll 4
            for (int q = 0; q < Q; q++) {
                const int64_t i = s * keys + at + q * LANES;
                total += x[q] * load_part(c.k + i);
                x[q] *= load_part(c.decay + i);
            }
            found[pair(t, s)] = total;
        }
#pragma GCC unroll 4
        for (int q = 0; q < Q; q++) store_part(c.reads + t * keys + at + q * LANES, x[q]);
    };
    for (int64_t t = 0; t < L; t++) {
        ahead.some();
        int64_t at = 0;
        for (; at + BLOCK * LANES <= keys; at += BLOCK * LANES) block(std::integral_constant<int, BLOCK>(), t, at);
        for (; at < keys; at += LANES) block(std::integral_constant<int, 1>(), t, at);
    }
    for (int64_t i = 0; i < Chunk::PAIRS; i += WIDTH) {
        part total[PARTS];
        sums(found + i, total);
        for (int j = 0; j < PARTS; j++) store_part(c.pairs + i + j * LANES, total[j]);
    }
    for (int64_t at = 0; at < keys; at += LANES) {
        part until = part{} + 1.0f;
        for (int64_t i = (L - 1) * keys + at; i >= 0; i -= keys) {
            store_part(c.writes + i, load_part(c.k + i) * until);
            until *= load_part(c.decay + i);
        }
        store_part(c.whole + at, until);
    }
}

// To what is read from the state before the chunk, y (L, lanes), what is read from the chunk's own steps.
APART void add_own(const Chunk& c, float* y) {
    constexpr int64_t L = LENGTH;
    for (int64_t at = 0; at < c.lanes; at += LANES) {
        part value[L];
#pragma GCC unroll 16
        for (int64_t t = 0; t < L; t++) {
            value[t] = load_part(c.values + t * c.lanes + at);
            part out = load_part(y + t * c.lanes + at);
#pragma GCC unroll 16
            for (int64_t s = 0; s <= t; s++) out += c.pairs[pair(t, s)] * value[s];
            store_part(y + t * c.lanes + at, out);
        }
    }
}

// Its transpose: to what the state after the chunk gives the values, dv (L, lanes), what dy (L, lanes) does.
APART void add_back(const Chunk& c, const float* dy, float* dv) {
    constexpr int64_t L = LENGTH;
    for (int64_t at = 0; at < c.lanes; at += LANES) {
        part grad[L];
#pragma GCC unroll 16
        for (int64_t s = L - 1; s >= 0; s--) {
            grad[s] = load_part(dy + s * c.lanes + at);
            part total = load_part(dv + s * c.lanes + at);
#pragma GCC unroll 16
            for (int64_t t = s; t < L; t++) total += c.pairs[pair(t, s)] * grad[t];
            store_part(dv + s * c.lanes + at, total);
        }
    }
}

// All steps of `count` values from `first` on of some heads.
void forward(const Inputs& in, const Shape& s, const Heads& heads, int64_t first, int64_t count, const float* state, Rows<void> y,
             float* final, float* before) {
    constexpr int64_t L = LENGTH;
    const int64_t keys = s.padded(), lanes = round_up(count), square = s.size * s.size;
    const Buffer memory = buffer(Chunk::size(keys, lanes) + (heads.count() * keys + L) * lanes + keys);
    const Chunk c(memory.get(), keys, lanes);
    float *const out = memory.get() + Chunk::size(keys, lanes), *const bonus = out + L * lanes, *const states = bonus + keys;
    for (int64_t head = heads.begin; head < heads.end; head++)
        enter(state + head * square, s, first, count, states + heads.index(head) * keys * lanes, lanes);
    for (int64_t begin = 0; begin < s.steps; begin += INTERVAL)
        for (int64_t head = heads.begin; head < heads.end; head++) {
            float* const S = states + heads.index(head) * keys * lanes;
            fetch(in.rows(U), {1, 1, s.heads, s.size}, head % s.heads, 0, 1, 0, s.size, 1, bonus, keys);
            if (before) keep(S, s, first, count, before + (head * s.intervals(INTERVAL) + begin / INTERVAL) * square, lanes);
            for (int64_t start = begin; start < std::min(begin + INTERVAL, s.steps); start += L) {
                const int64_t end = std::min(start + L, s.steps);
                gather(in, s, head, start, end, first, count, c, nullptr);
                Ahead ahead;
                const Place next = heads.next(head, end, INTERVAL);
                for (Input which : {R, K, V, W}) ahead.add(in.rows(which), s, next.head, next.step, next.step + L);
                ahead.add(y, s, next.head, next.step, next.step + L);
                relate(c, bonus, ahead);
                read_by(L, c.reads, S, keys, lanes, out, ahead);
                add_own(c, out);
                put(y, s, head, start, end, first, count, out, lanes);
                write_by(c.whole, S, c.writes, c.values, keys, lanes, S, ahead);
            }
        }
    for (int64_t head = heads.begin; head < heads.end; head++)
        leave(states + heads.index(head) * keys * lanes, s, first, count, final + head * square, lanes);
}

// One step of one head whose N is a multiple of 16, on the state as it lies, value by key.
void forward_1(const Inputs& in, const Shape& s, int64_t head, const float* state, Rows<void> y, float* final) {
    const int64_t n = s.size;
    const Buffer scratch = buffer((INPUTS + 1) * n);
    float* const row = scratch.get();
    float *const r = row + R * n, *const k = row + K * n, *const v = row + V * n, *const decay = row + W * n, *const out = row + INPUTS * n;
    for (Input which : {R, K, V, W}) fetch(in.rows(which), s, head, 0, 1, 0, n, 1, row + which * n, n);
    fetch(in.rows(U), {1, 1, s.heads, n}, head % s.heads, 0, 1, 0, n, 1, row + U * n, n);
    floats own{};
    for (int64_t j = 0; j < n; j += WIDTH) {
        own += load(r + j) * load(row + U * n + j) * load(k + j);
        store(decay + j, by_parts(load(decay + j), [](part w) { return squash(w).itself; }));
    }
    const float bonus = sum(own);
    for (int64_t i = 0; i < n; i += WIDTH) {
        const float *const from = state + (head * n + i) * n;
        float* const to = final + (head * n + i) * n;
        floats found[WIDTH];
        for (int l = 0; l < WIDTH; l++) {
            found[l] = floats{};
            for (int64_t j = 0; j < n; j += WIDTH) {
                const floats x = load(from + l * n + j);
                found[l] += x * load(r + j);
                store(to + l * n + j, x * load(decay + j) + v[i + l] * load(k + j));
            }
        }
        store(out + i, sums(found) + bonus * load(v + i));
    }
    put(y, s, head, 0, 1, 0, n, out, n);
}

// From the gradients of reads (`dr`) and writes (`dk`), (L, keys), of pairs (L, L), and `ends`, the state before the chunk
// times the gradient of the state after it, to those of r, k and w_raw, the first two in place, the last in place of the log
// decays. The bonus' is added to du.
APART void unrelate(const Chunk& c, const float* bonus, const float* dpairs, const float* ends, float* dr, float* dk, float* log_decay,
                    double* du) {
    constexpr int64_t L = LENGTH;
    for (int64_t at = 0; at < c.keys; at += LANES) {
        part k[L], decay[L], ddecay[L], later[L];
#pragma GCC unroll 16
        for (int64_t t = 0; t < L; t++) k[t] = load_part(c.k + t * c.keys + at), decay[t] = load_part(c.decay + t * c.keys + at);
        // A row's way back to the chunk's start is what it reads by after each step, `later`; what it has read by then comes the
        // other way. The decay between has their product for its gradient. First the state after the chunk, as if it read.
        part until = part{} + 1.0f, so_far = load_part(ends + at);
        for (int64_t m = L - 1; m >= 0; m--) later[m] = until, until *= decay[m];
        for (int64_t m = 0; m < L; m++) {
            ddecay[m] = later[m] * so_far;
            so_far = so_far * decay[m] + k[m] * load_part(dk + m * c.keys + at);
        }
        part total{};
        const part extra = load_part(bonus + at);
#pragma GCC unroll 16
        for (int64_t t = 0; t < L; t++) {
            const float own = dpairs[t * L + t];
            const part r = load_part(c.r + t * c.keys + at);
            part x = r;
#pragma GCC unroll 16
            for (int64_t m = t - 1; m >= 0; m--) later[m] = x, x *= decay[m];
            part read = load_part(dr + t * c.keys + at);
#pragma GCC unroll 16
            for (int64_t m = 0; m < t; m++) {
                ddecay[m] += later[m] * read;
                read = read * decay[m] + dpairs[t * L + m] * k[m];
            }
            store_part(dr + t * c.keys + at, read + own * extra * k[t]);
            total += own * r * k[t];
        }
        part written[L];
#pragma GCC unroll 16
        for (int64_t s = 0; s < L; s++) written[s] = load_part(dk + s * c.keys + at);
#pragma GCC unroll 16
        for (int64_t t = L - 1; t >= 0; t--) {
            const part r = load_part(c.r + t * c.keys + at);
#pragma GCC unroll 16
            for (int64_t s = 0; s < t; s++) written[s] = written[s] * decay[t] + dpairs[t * L + s] * r;
            store_part(dk + t * c.keys + at, written[t] + dpairs[t * L + t] * extra * r);
            float* const log = log_decay + t * c.keys + at;
            store_part(log, ddecay[t] * decay[t] * load_part(log));
        }
        for (int l = 0; l < LANES; l++) du[at + l] += total[l];
    }
}

void backward(const Inputs& in, const Shape& s, const Heads& heads, const float* before, Rows<const void> dy, const float* dfinal,
              const Rows<void>* grads, float* dstate, double* du) {
    constexpr int64_t L = LENGTH;
    const int64_t keys = s.padded(), n = s.size, square = n * n, whole = keys * keys;
    const int64_t each = Chunk::size(keys, keys) + L * keys + whole, most = INTERVAL / L;
    const Buffer memory = buffer(most * each + (5 * L + 2) * keys + L * L + heads.count() * whole);
    float *const dv = memory.get() + most * each, *const dout = dv + L * keys, *const dr = dout + L * keys, *const dk = dr + L * keys;
    float *const turned = dk + L * keys, *const ends = turned + L * keys, *const bonus = ends + keys, *const dpairs = bonus + keys;
    float* const dstates = dpairs + L * L;
    const auto chunk = [&](int64_t i) { return Chunk(memory.get() + i * each, keys, keys); };
    const auto log_decay = [&](int64_t i) { return memory.get() + i * each + Chunk::size(keys, keys); };
    const auto state = [&](int64_t i) { return log_decay(i) + L * keys; };
    for (int64_t head = heads.begin; head < heads.end; head++)
        enter(dfinal + head * square, s, 0, n, dstates + heads.index(head) * whole, keys);
    for (int64_t begin = (s.intervals(INTERVAL) - 1) * INTERVAL; begin >= 0; begin -= INTERVAL)
        for (int64_t head = heads.begin; head < heads.end; head++) {
            const int64_t stop = std::min(begin + INTERVAL, s.steps), chunks = (stop - begin + L - 1) / L;
            float* const G = dstates + heads.index(head) * whole;
            fetch(in.rows(U), {1, 1, s.heads, n}, head % s.heads, 0, 1, 0, n, 1, bonus, keys);
            take_up(before + (head * s.intervals(INTERVAL) + begin / INTERVAL) * square, s, state(0), keys);
            for (int64_t i = 0; i < chunks; i++) {
                const Chunk c = chunk(i);
                const int64_t start = begin + i * L, end = std::min(start + L, stop);
                gather(in, s, head, start, end, 0, n, c, log_decay(i));
                Ahead ahead;
                if (end < stop)
                    for (Input which : {R, K, V, W}) ahead.add(in.rows(which), s, head, end, end + L);
                else
                    ahead.add(dy, s, head, start, end);
                relate(c, bonus, ahead);
                if (end < stop) write_by(c.whole, state(i), c.writes, c.values, keys, keys, state(i + 1), ahead);
            }
            for (int64_t i = chunks - 1; i >= 0; i--) {
                const Chunk c = chunk(i);
                const int64_t start = begin + i * L, end = std::min(start + L, stop);
                Ahead ahead;
                for (Input which : {R, K, V, W}) ahead.add(grads[which], s, head, start, end);
                if (i > 0) ahead.add(dy, s, head, start - L, start);
                const Place next = heads.next(head, stop, -INTERVAL);
                for (Input which : {R, K, V, W}) {  // a share of the rows that come next
                    const int64_t share = L * L / INTERVAL, from = next.step + i * share;
                    ahead.add(in.rows(which), s, next.head, from, from + share);
                }
                fetch(dy, s, head, start, end, 0, n, L, dout, keys);
                read_by(L, c.writes, G, keys, keys, dv, ahead);
                add_back(c, dout, dv);
                turn_rows(c.values, keys, turned);
                read_by_turned(turned, G, keys, keys, dk, ahead);
                meet(state(i), G, keys, keys, ends);
                write_by(c.whole, G, c.reads, dout, keys, keys, G, ahead);
                turn_rows(dout, keys, turned);
                read_by_turned(turned, state(i), keys, keys, dr, ahead);
                read_by_turned(turned, c.values, L, keys, dpairs, ahead);
                unrelate(c, bonus, dpairs, ends, dr, dk, log_decay(i), du + head * keys);
                const float* const found[TIMED] = {dr, dk, dv, log_decay(i)};
                for (int which = 0; which < TIMED; which++) put(grads[which], s, head, start, end, 0, n, found[which], keys);
            }
        }
    for (int64_t head = heads.begin; head < heads.end; head++)
        leave(dstates + heads.index(head) * whole, s, 0, n, dstate + head * square, keys);
}

}  // namespace

// r, k, v, w_raw: (B, T, H, N), u: (H, N). States are kept before steps 0, 64, ...
extern "C" void rwkv_wkv6_forward(const Forward<INPUTS>* f) { run_forward(*f, forward_1, forward); }

extern "C" void rwkv_wkv6_backward(const Backward<INPUTS>* f) {
    const Shape s = f->shape;
    const int64_t keys = s.padded();
    std::vector<double> du(s.all() * keys);  // of each head of each batch, to be summed in their order
    run_backward(*f, [&](auto... given) { backward(given..., du.data()); });
    std::vector<float> total(keys);
    for (int64_t head = 0; head < s.heads; head++) {
        for (int64_t j = 0; j < keys; j++) {
            double sum = 0;
            for (int64_t b = 0; b < s.batch; b++) sum += du[(b * s.heads + head) * keys + j];
            total[j] = float(sum);
        }
        put({f->grads[U], bool(f->is_bf16 >> U & 1)}, {1, 1, s.heads, s.size}, head, 0, 1, 0, s.size, total.data(), keys);
    }
}
