// A GPU's stand-in for device.h. Blocks run one after another, and a block's threads as fibers, each on a stack of its own until it
// waits for others. It is stricter than a GPU:
//   - all lanes of a warp must meet in a shuffle, mma, ldmatrix or __syncwarp, and all threads of a block in __syncthreads. Where they
//     can't, as some have returned or wait elsewhere, LAUNCH returns an error that says who waits where;
//   - shared memory is NaN when a block starts, and what lies around it must stay as it is;
//   - what cp_async copies is NaN until the thread that asked for it has waited, and is read only then;
//   - tensor cores cut operands as the hardware does (tf32: to 10 bits of mantissa) and round sums towards zero;
//   - rwkv_shim_order({1}) runs threads and blocks backwards. Where a barrier is missing, or blocks race, results differ between the
//     two orders, or are NaN.
// It sees no bank conflicts, and no lanes of one warp that race without __syncwarp if they happen to run in the right order both ways.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#define __global__ static
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define DEVICE inline
#define UNROLL
#define SHARED(type, name, count)        \
    alignas(16) static type name[count]; \
    static int64_t name##_block = -1;    \
    shim::fresh(name, sizeof name, name##_block)
#define DYNAMIC_SHARED(type, name) type* name = reinterpret_cast<type*>(shim::arena + shim::MARGIN)
#define LAUNCH(...) shim::launch(__VA_ARGS__)

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) float2 { float x, y; };
struct alignas(16) float4 { float x, y, z, w; };
struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
static inline float2 make_float2(float x, float y) { return {x, y}; }
static inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

static dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace shim {

constexpr int WARP = 32, THREADS = 1024, FAILURE = 719;
constexpr size_t STACK = 128 << 10, MARGIN = 4096, LIMIT = 227 << 10;

enum State { READY, AT_BARRIER, IN_WARP, RETURNED };

struct Copy { void* to; const void* from; int bytes; bool valid; };

struct Fiber {
    jmp_buf at;
    State state;
    dim3 index;
    std::unique_ptr<char[]> stack;
    std::vector<std::vector<Copy>> copies;  // cp_async's groups, the last one open
};

struct Warp { int waiting; const char* what; void* arguments[WARP]; };

alignas(128) static unsigned char arena[MARGIN + LIMIT + MARGIN];
static Fiber fibers[THREADS];
static Warp warps[THREADS / WARP];
static jmp_buf scheduler;
static std::function<void()> body;
static int self, count, backwards;
static int64_t serial;  // of the block that runs
static char message[400];

static void say(const char* what) {
    snprintf(message, sizeof message, "block (%u, %u, %u), thread %d: %s", blockIdx.x, blockIdx.y, blockIdx.z, self, what);
}

[[noreturn]] static void fail(const char* what) { say(what), _longjmp(scheduler, 1); }

__attribute__((noinline)) static void wait(State state) {
    fibers[self].state = state;
    if (!_setjmp(fibers[self].at)) _longjmp(scheduler, 1);
}

static void live() {  // a fiber's whole life: its thread in one block after another
    for (;;) {
        body();
        for (auto& group : fibers[self].copies)
            if (!group.empty()) fail("returns while cp_async is under way");
        wait(RETURNED);
    }
}

// Run thread i until it waits. Returns whether all is well.
__attribute__((noinline)) static bool step(int i) {
    if (_setjmp(scheduler)) return !message[0];
    self = i, threadIdx = fibers[i].index;
    if (fibers[i].stack) _longjmp(fibers[i].at, 1);
    fibers[i].stack.reset(new char[STACK]);
    static ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = fibers[i].stack.get(), context.uc_stack.ss_size = STACK;
    makecontext(&context, live, 0);
    setcontext(&context);
    return false;
}

inline void poison(void* data, size_t bytes) { memset(data, 0xff, bytes); }  // NaN in every format

inline void fresh(void* data, size_t bytes, int64_t& block) {
    if (block != serial) poison(data, bytes), block = serial;
}

static bool run_block(size_t shared) {
    serial++;
    poison(arena, sizeof arena);
    for (auto& warp : warps) warp.waiting = 0;
    for (int i = 0; i < count; i++) {
        fibers[i].state = READY;
        fibers[i].index = dim3(i % blockDim.x, i / blockDim.x % blockDim.y, i / blockDim.x / blockDim.y);
        fibers[i].copies.assign(1, {});
    }
    for (int at[4] = {count}; at[RETURNED] < count;) {
        int ran = 0;
        for (int n = 0; n < count; n++) {
            int i = backwards ? count - 1 - n : n;
            if (fibers[i].state == READY && (ran++, !step(i))) return false;
        }
        std::fill(at, at + 4, 0);
        for (int i = 0; i < count; i++) at[fibers[i].state]++;
        if (at[AT_BARRIER] == count) {
            for (int i = 0; i < count; i++) fibers[i].state = READY;
        } else if (!ran) {
            char text[200];
            snprintf(text, sizeof text, "the last of %d that are stuck: %d wait in __syncthreads, %d in an operation of their warp, "
                     "%d have returned", count, at[AT_BARRIER], at[IN_WARP], at[RETURNED]);
            return say(text), false;
        }
    }
    auto untouched = [](unsigned char byte) { return byte == 0xff; };
    if (std::all_of(arena, arena + MARGIN, untouched) && std::all_of(arena + MARGIN + shared, std::end(arena), untouched))
        return true;
    return say("(or another) wrote outside of the shared memory"), false;
}

template <class... P, class... A>
int launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, int64_t, const A&... arguments) {
    static std::mutex one;
    std::lock_guard<std::mutex> lock(one);
    message[0] = 0, blockDim = block, gridDim = grid, count = int(block.x * block.y * block.z), self = 0;
    if (shared > LIMIT) say("more shared memory than any GPU has");
    if (count < 1 || count > THREADS || !grid.x || !grid.y || !grid.z || grid.y > 65535 || grid.z > 65535)
        say("a grid or block that no GPU runs");
    body = [=] { kernel(arguments...); };
    int64_t blocks = int64_t(grid.x) * grid.y * grid.z;
    for (int64_t n = 0; n < blocks && !message[0]; n++) {
        int64_t i = backwards ? blocks - 1 - n : n;
        blockIdx = dim3(unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / grid.x / grid.y));
        run_block(shared);
    }
    if (!message[0]) return 0;
    for (auto& fiber : fibers) fiber.stack.reset();  // wherever they stand, they will not go on
    return FAILURE;
}

// Where all lanes of a warp meet. The last to come does `work` for all, on the arguments that lie on their stacks.
template <class A, class F>
void together(const char* what, A& mine, F work) {
    Warp& warp = warps[self / WARP];
    int first = self / WARP * WARP, lanes = std::min(WARP, count - first);
    if (warp.waiting && strcmp(warp.what, what)) fail("lanes of one warp are in different operations");
    warp.what = what, warp.arguments[self - first] = &mine;
    if (++warp.waiting < lanes) return wait(IN_WARP);
    warp.waiting = 0;
    A* all[WARP];
    for (int i = 0; i < lanes; i++) all[i] = static_cast<A*>(warp.arguments[i]), fibers[first + i].state = READY;
    work(all, lanes);
}

template <class T>
T shuffle(unsigned mask, T x, int from) {
    struct Lane { T given, got; int from; } mine = {x, x, from};
    int lanes = std::min(WARP, count - self / WARP * WARP);
    if (mask != ~0u) fail("a shuffle is for all lanes of a warp here: its mask must be ~0u");
    if (from < 0 || from >= lanes) fail("a shuffle from a lane that is not there");
    together("shuffle", mine, [](Lane** all, int lanes) {
        for (int i = 0; i < lanes; i++) all[i]->got = all[all[i]->from]->given;
    });
    return mine.got;
}

// d += a b of one warp, as the fragments of mma_bf16 and mma_tf32 hold them. `PER` numbers to a register.
template <int PER, class Decode>
void mma(const char* what, float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Decode decode) {
    struct Lane { float* d; const uint32_t *a, *b; Decode* decode; } mine = {d, a, b, &decode};
    if (count % WARP) fail("tensor cores work for whole warps");
    together(what, mine, [](Lane** all, int) {
        constexpr int K = 8 * PER;
        double A[16][K], B[K][8];
        for (int lane = 0; lane < WARP; lane++)
            for (int i = 0; i < 4; i++)
                for (int n = 0; n < PER; n++) {
                    int g = lane / 4, k = lane % 4 * PER + i / 2 * 4 * PER + n;
                    A[g + i % 2 * 8][k] = (*all[lane]->decode)(all[lane]->a[i], n);
                    if (i % 2 == 0) B[k][g] = (*all[lane]->decode)(all[lane]->b[i / 2], n);
                }
        for (int lane = 0; lane < WARP; lane++)
            for (int i = 0; i < 4; i++) {
                double sum = all[lane]->d[i];
                for (int k = 0; k < K; k++) sum += A[lane / 4 + i / 2 * 8][k] * B[k][lane % 4 * 2 + i % 2];
                float rounded = float(sum);
                all[lane]->d[i] = std::fabs(rounded) > std::fabs(sum) ? std::nextafter(rounded, 0.0f) : rounded;
            }
    });
}

}  // namespace shim

// Takes the record {order}: 0 runs threads and blocks forwards, 1 backwards.
extern "C" int rwkv_shim_order(const int64_t* record) { return shim::backwards = int(record[0]), 0; }

extern "C" const char* rwkv_error_string(int) { return shim::message; }

using std::max, std::min;

static inline float __uint_as_float(uint32_t bits) { float x; memcpy(&x, &bits, 4); return x; }
static inline uint32_t __float_as_uint(float x) { uint32_t bits; memcpy(&bits, &x, 4); return bits; }
static inline float fast_exp2(float x) { return std::exp2(x); }
static inline float fast_reciprocal(float x) { return 1 / x; }
static inline float fast_exp(float x) { return std::exp(x); }
template <class T> T __ldg(const T* p) { return *p; }

static inline void __syncthreads() { shim::wait(shim::AT_BARRIER); }
static inline void __syncwarp() { int none; shim::together("__syncwarp", none, [](int**, int) {}); }
template <class T> T __shfl_sync(unsigned mask, T x, int lane) { return shim::shuffle(mask, x, lane % 32); }
template <class T> T __shfl_xor_sync(unsigned mask, T x, int by) { return shim::shuffle(mask, x, shim::self % 32 ^ by); }
template <class T> T __shfl_down_sync(unsigned mask, T x, int by) {
    int lane = shim::self % 32;
    return shim::shuffle(mask, x, lane + by < 32 ? lane + by : lane);
}
template <class T> T __shfl_up_sync(unsigned mask, T x, int by) {
    int lane = shim::self % 32;
    return shim::shuffle(mask, x, lane >= by ? lane - by : lane);
}
static inline float atomicAdd(float* sum, float x) { float before = *sum; *sum += x; return before; }

static inline float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }
static inline bf16 to_bf16(float x) {
    uint32_t bits = __float_as_uint(x);
    return {uint16_t(x != x ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
static inline uint32_t to_bf16_pair(float x, float y) { return uint32_t(to_bf16(x).bits) | uint32_t(to_bf16(y).bits) << 16; }
static inline uint32_t to_tf32(float x) { return x != x ? 0x7fffffff : (__float_as_uint(x) + 0x1000) & ~0x1fffu; }

static inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    shim::mma<2>("mma_bf16", d, a, b, [](uint32_t x, int n) { return __uint_as_float(n ? x & 0xffff0000u : x << 16); });
}
static inline void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    shim::mma<1>("mma_tf32", d, a, b, [](uint32_t x, int) { return __uint_as_float(x & ~0x1fffu); });
}
template <bool TURNED>
void load_matrices(uint32_t (&x)[4], const void* row) {
    struct Lane { uint32_t* x; const void* row; } mine = {x, row};
    if (reinterpret_cast<uintptr_t>(row) % 16) shim::fail("ldmatrix from a row that is not aligned to 16 bytes");
    if (shim::count % 32) shim::fail("ldmatrix works for whole warps");
    shim::together(TURNED ? "ldmatrix_turned" : "ldmatrix", mine, [](Lane** all, int) {
        auto number = [&](int i, int r, int c) { return uint32_t(static_cast<const uint16_t*>(all[8 * i + r]->row)[c]); };
        for (int lane = 0; lane < 32; lane++)
            for (int i = 0; i < 4; i++) {
                int far = lane / 4, near = lane % 4 * 2;
                all[lane]->x[i] = TURNED ? number(i, near, far) | number(i, near + 1, far) << 16
                                         : number(i, far, near) | number(i, far, near + 1) << 16;
            }
    });
}
static inline void ldmatrix(uint32_t (&x)[4], const void* row) { load_matrices<false>(x, row); }
static inline void ldmatrix_turned(uint32_t (&x)[4], const void* row) { load_matrices<true>(x, row); }

template <int BYTES = 16>
void cp_async(void* shared, const void* global, bool valid = true) {
    static_assert(BYTES == 4 || BYTES == 8 || BYTES == 16);
    if (reinterpret_cast<uintptr_t>(shared) % BYTES || (valid && reinterpret_cast<uintptr_t>(global) % BYTES))
        shim::fail("cp_async between addresses that are not aligned to what it copies");
    shim::poison(shared, BYTES);
    shim::fibers[shim::self].copies.back().push_back({shared, global, BYTES, valid});
}
static inline void cp_async_commit() { shim::fibers[shim::self].copies.emplace_back(); }
template <int PENDING = 0>
void cp_async_wait() {
    auto& groups = shim::fibers[shim::self].copies;
    for (; groups.size() > PENDING + 1; groups.erase(groups.begin()))
        for (auto& copy : groups[0])
            copy.valid ? memcpy(copy.to, copy.from, copy.bytes) : memset(copy.to, 0, copy.bytes);
}
