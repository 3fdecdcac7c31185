// What the CUDA sources stand on, so that one text is both: with nvcc the GPU's own features under thin names; with a C++ compiler
// (-DRWKV_HOST) the slow and strict stand-in of host.h, by which tests prove kernels where there is no GPU.
//
// A kernel is written as in CUDA (__global__, __device__, threadIdx, __syncthreads, __shfl_xor_sync, ...), except:
//   SHARED(type, name, count);       instead of  __shared__ type name[count];
//   DYNAMIC_SHARED(type, name);      instead of  extern __shared__ type name[];     aligned to 128 bytes
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...)                 an int: 0, or the error for rwkv_error_string;
//                                                                                   kernel<a, b> in parentheses
//   DEVICE before a function that kernels call, and UNROLL before a loop
//   fast_exp, fast_exp2, fast_reciprocal; bf16, to_float, to_bf16, to_bf16_pair; to_tf32; mma_bf16, mma_tf32; ldmatrix,
//   ldmatrix_turned; cp_async, cp_async_commit, cp_async_wait
// Each source includes this once and is a library of its own.
#pragma once

#ifndef __CUDACC__
#undef _FORTIFY_SOURCE  // its longjmp takes the stack of a fiber, of which host.h has many, for a mistake
#endif

#include <cstddef>
#include <cstdint>

// A bfloat16 in memory: the upper half of a float.
struct bf16 {
    uint16_t bits;
};

#ifdef __CUDACC__  // ---------------------------------------------------------------------------------------------------- GPU

#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define SHARED(type, name, count) __shared__ __align__(16) type name[count]
#define DYNAMIC_SHARED(type, name)                                \
    extern __shared__ __align__(128) unsigned char rwkv_shared[]; \
    type* name = reinterpret_cast<type*>(rwkv_shared)
#define LAUNCH(...) rwkv_launch(__VA_ARGS__)

extern "C" const char* rwkv_error_string(int error) { return cudaGetErrorString(cudaError_t(error)); }

template <class... P, class... A>
int rwkv_launch(void (*kernel)(P...), dim3 grid, dim3 block, size_t shared, int64_t stream, const A&... arguments) {
    if (shared > 48 * 1024) {  // beyond what every GPU gives unasked
        cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
        if (error != cudaSuccess) return cudaGetLastError(), int(error);
    }
    kernel<<<grid, block, shared, reinterpret_cast<cudaStream_t>(stream)>>>(arguments...);
    return int(cudaGetLastError());
}

// Approximations in one instruction: 2^x and 1/x, to a relative error of 2^-22. What is below 2^-126 counts as 0.
DEVICE float fast_exp2(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fast_reciprocal(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
DEVICE float fast_exp(float x) { return fast_exp2(x * 1.4426950408889634f); }

DEVICE float to_float(bf16 x) { return __uint_as_float(uint32_t(x.bits) << 16); }

DEVICE bf16 to_bf16(float x) {
    bf16 y;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
}

// Two of them as they lie in memory, x first.
DEVICE uint32_t to_bf16_pair(float x, float y) {
    uint32_t z;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(z) : "f"(y), "f"(x));
    return z;
}

// To the nearest number of 10 bits of mantissa; a float's bits, the lower 13 of which are 0.
DEVICE uint32_t to_tf32(float x) {
    uint32_t y;
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
    return y;
}

// d (16 x 8) += a (16 x 16) b (16 x 8). With g = lane / 4, q = lane % 4:
//   a[0]: row g, columns 2q, 2q+1 (the lower half is 2q)   a[1]: row g+8   a[2]: row g, columns 2q+8, 2q+9   a[3]: row g+8, likewise
//   b[0]: rows 2q, 2q+1, column g   b[1]: rows 2q+8, 2q+9   d[0], d[1]: row g, columns 2q, 2q+1   d[2], d[3]: row g+8
DEVICE void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d (16 x 8) += a (16 x 8) b (8 x 8).   a[0]: row g, column q   a[1]: row g+8   a[2]: row g, column q+4   a[3]: row g+8, likewise
//   b[0]: row q, column g   b[1]: row q+4   d as above
DEVICE void mma_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// Four 8 x 16-byte tiles of shared memory: lane i gives the address of row i % 8 of tile i / 8, and gets the four bytes
// i % 4 of row i / 4 of each tile.
DEVICE void ldmatrix(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

// The same of numbers of 2 bytes, each tile transposed: numbers i % 4 * 2 and the next of column i / 4.
DEVICE void ldmatrix_turned(uint32_t (&x)[4], const void* row) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
                 : "r"(uint32_t(__cvta_generic_to_shared(row)))
                 : "memory");
}

// Start to copy 16 bytes (BYTES: 4, 8 or 16; both sides aligned to it) from global to shared memory; zeros if not `valid`.
template <int BYTES = 16>
DEVICE void cp_async(void* shared, const void* global, bool valid = true) {
    uint32_t to = uint32_t(__cvta_generic_to_shared(shared));
    int size = valid ? BYTES : 0;
    if constexpr (BYTES == 16)
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(size) : "memory");
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to), "l"(global), "n"(BYTES), "r"(size) : "memory");
}

// What this thread has started since the last commit is a group; wait until at most PENDING of its groups are under way.
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING = 0>
DEVICE void cp_async_wait() {
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
}

#else

#include "host.h"

#endif
