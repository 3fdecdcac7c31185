// Products of small matrices by one warp on tensor cores, from tiles of floats in shared memory and from each other.
//
// Numbers are tf32 (a float of 10 bits of mantissa), or EXACT: each float is the sum of two tf32, and of the four products the
// three largest are taken. Tensor cores round their sums towards zero; EXACT adds up outside of them, to the nearest.
//
// A lane is g = lane / 4 and q = lane % 4. Of the 8 terms of a product it holds two, which the hardware calls q and q + 4, and which
// here are 2q and 2q+1: the order of terms is free, and with this one
//   - an operand whose terms are neighbours in memory is read two numbers at a time;
//   - a result (rows g, g+8; columns 2q, 2q+1) is an operand of the next product as it stands, its columns the terms.
#pragma once

#include "device.h"

DEVICE int lane_g() { return int(threadIdx.x) % 32 / 4; }
DEVICE int lane_q() { return int(threadIdx.x) % 4; }

DEVICE float to_float(float x) { return x; }

// A number as operands are stored.
template <bool EXACT>
DEVICE float ready(float x) {
    return EXACT ? x : __uint_as_float(to_tf32(x));
}

// Operands of d (16 x 8) += a (16 x 8) b (8 x 8).
struct Left { float x[4]; };   // row g, term 2q; row g+8, term 2q; row g, term 2q+1; row g+8, term 2q+1
struct Right { float x[2]; };  // column g, term 2q; term 2q+1

template <bool EXACT>
DEVICE void multiply(float (&d)[4], const Left& a, const Right& b) {
    uint32_t high_a[4], high_b[2];
    if constexpr (!EXACT) {
        UNROLL for (int i = 0; i < 4; i++) high_a[i] = __float_as_uint(a.x[i]);
        UNROLL for (int i = 0; i < 2; i++) high_b[i] = __float_as_uint(b.x[i]);
        mma_tf32(d, high_a, high_b);
    } else {
        uint32_t low_a[4], low_b[2];
        UNROLL for (int i = 0; i < 4; i++) high_a[i] = to_tf32(a.x[i]), low_a[i] = to_tf32(a.x[i] - __uint_as_float(high_a[i]));
        UNROLL for (int i = 0; i < 2; i++) high_b[i] = to_tf32(b.x[i]), low_b[i] = to_tf32(b.x[i] - __uint_as_float(high_b[i]));
        float sum[4] = {};
        mma_tf32(sum, low_a, high_b);
        mma_tf32(sum, high_a, low_b);
        mma_tf32(sum, high_a, high_b);
        UNROLL for (int i = 0; i < 4; i++) d[i] += sum[i];
    }
}

// A result as left operand, its columns the terms.
template <bool EXACT>
DEVICE Left as_left(const float (&d)[4]) {
    return {ready<EXACT>(d[0]), ready<EXACT>(d[2]), ready<EXACT>(d[1]), ready<EXACT>(d[3])};
}

// A tile whose rows are `pitch` apart, a multiple of 32. Blocks of 8 columns are swapped, by the row, such that no two lanes meet in a
// bank: neither in 8 (or 16) rows, each read at columns 2q and 2q+1, nor in rows 2q (or 2q+1), each read at columns g.
struct Tile {
    float* data;
    int pitch;

    DEVICE static int swap(int row) { return ((row & 3) ^ (row >> 2 & 1)) << 3; }
    // Written such that a column known to the compiler costs nothing.
    DEVICE float* at(int row, int column) const { return data + row * pitch + (column & ~31) + ((column & 31) ^ swap(row)); }
};

// A matrix as it lies in memory: no swaps.
struct Plain {
    float* data;
    int pitch;
    DEVICE float* at(int row, int column) const { return data + row * pitch + column; }
};

// 16 x 16 floats in shared memory. Of the ways they are read none meets more than two lanes in a bank.
struct Square {
    static constexpr int PITCH = 20, FLOATS = 16 * PITCH;
    float* data;
    DEVICE float* at(int row, int column) const { return data + row * PITCH + column; }
};

// Rows of the inputs' own type in shared memory; `pitch` is an odd multiple of 16 bytes.
template <class T>
struct Rows {
    T* data;
    int pitch;
    DEVICE T* at(int row, int column) const { return data + row * pitch + column; }
};

DEVICE float2 two(const float* p) { return *reinterpret_cast<const float2*>(p); }
DEVICE float2 two(const bf16* p) {
    uint32_t x = *reinterpret_cast<const uint32_t*>(p);
    return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u));
}
DEVICE void put_two(float* p, float x, float y) { *reinterpret_cast<float2*>(p) = make_float2(x, y); }

// Left operand: rows `row` to row+15 of x, its columns the terms.
template <class X>
DEVICE Left left(const X& x, int row, int column) {
    float2 up = two(x.at(row + lane_g(), column + 2 * lane_q())), low = two(x.at(row + 8 + lane_g(), column + 2 * lane_q()));
    return {up.x, low.x, up.y, low.y};
}

// Left operand: columns `column` to column+15 of x, its rows the terms.
template <class X>
DEVICE Left left_turned(const X& x, int row, int column) {
    int first = row + 2 * lane_q(), c = column + lane_g();
    return {to_float(*x.at(first, c)), to_float(*x.at(first, c + 8)), to_float(*x.at(first + 1, c)), to_float(*x.at(first + 1, c + 8))};
}

// Right operand: columns `column` to column+7 of x, its rows the terms.
template <class X>
DEVICE Right right(const X& x, int row, int column) {
    int first = row + 2 * lane_q(), c = column + lane_g();
    return {*x.at(first, c), *x.at(first + 1, c)};
}

// Right operand: rows `row` to row+7 of x, its columns the terms.
template <class X>
DEVICE Right right_turned(const X& x, int row, int column) {
    float2 terms = two(x.at(row + lane_g(), column + 2 * lane_q()));
    return {terms.x, terms.y};
}
