// Products of small matrices by one warp on tensor cores, from tiles of floats in shared memory and from each other.
//
// Numbers are cut to tf32, 10 bits of mantissa, by the tensor cores. `ready` makes that a rounding. EXACT instead takes each float
// as the sum of two tf32, and of the four products the three largest, which is as good as float32. Tensor cores round their sums
// towards zero: EXACT adds up outside of them.
//
// A lane is g = lane / 4 and q = lane % 4. Of the 8 terms of a product it holds two. The hardware calls them q and q + 4, and both
// operands may be put in any other order of terms. Two are of use:
//   near: 2q and 2q+1. A result (rows g, g+8; columns 2q, 2q+1) is an operand of the next product as it stands, its columns the
//         terms; so are bf16 as ldmatrix reads them.
//   far:  q and q+4, as ldmatrix reads floats, a whole operand at once.
#pragma once

#include "device.h"

DEVICE int lane_of() { return int(threadIdx.x % 32); }
DEVICE int lane_g() { return int(threadIdx.x % 32 / 4); }
DEVICE int lane_q() { return int(threadIdx.x % 4); }

// What is cut off of a mantissa is half a step on average, which is this part of the number: with it, cutting is right on average,
// in one instruction that a NaN passes. What tf32 holds with one bit to spare, as bf16, stays as it is.
constexpr float HALF_STEP = 1 + 0.6931472f / 2048;

// A number as operands are stored.
template <bool EXACT>
DEVICE float ready(float x) {
    return EXACT ? x : x * HALF_STEP;
}

// Operands of d (16 x 8) += a (16 x 8) b (8 x 8).
struct Left { float x[4]; };   // row g, first term; row g+8, first term; row g, second term; row g+8, second term
struct Right { float x[2]; };  // column g, first term; second term

DEVICE void split(float x, uint32_t& high, uint32_t& low) {
    high = __float_as_uint(x * HALF_STEP) & ~0x1fffu;
    low = __float_as_uint((x - __uint_as_float(high)) * HALF_STEP);
}

template <bool EXACT>
DEVICE void multiply(float (&d)[4], const Left& a, const Right& b) {
    uint32_t high_a[4], high_b[2];
    if constexpr (!EXACT) {
        UNROLL for (int i = 0; i < 4; i++) high_a[i] = __float_as_uint(a.x[i]);
        UNROLL for (int i = 0; i < 2; i++) high_b[i] = __float_as_uint(b.x[i]);
        mma_tf32(d, high_a, high_b);
    } else {
        uint32_t low_a[4], low_b[2];
        UNROLL for (int i = 0; i < 4; i++) split(a.x[i], high_a[i], low_a[i]);
        UNROLL for (int i = 0; i < 2; i++) split(b.x[i], high_b[i], low_b[i]);
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

// Below, a place is a row and a column, each in two parts: a multiple of 8, which is known to the compiler, or of 16, and up to 7
// that the lane knows: then all of a tile is at a few addresses, and constants.

// A tile whose rows are PITCH apart, a multiple of 32. Blocks of 8 columns are swapped, by the row, and their halves, such that no two
// lanes meet in a bank: in rows g, each read at columns 2q and 2q+1, or at 4 columns by ldmatrix; in rows 2q (2q+1, q, q+4), each read
// at columns g; in rows i, 4+i, 8+i, 12+i, each written at 4 pairs of columns.
template <int PITCH>
struct Tile {
    static_assert(PITCH % 32 == 0);
    float* data;
    DEVICE float* at(int row8, int row, int column8, int column) const {
        int swapped = (((column8 & 24) ^ (row8 & 8) << 1) ^ ((row & 3) ^ row >> 2) << 3) + (column ^ (row & 4));
        return data + row8 * PITCH + (column8 & ~31) + (row * PITCH + swapped);
    }
};

// A matrix as it lies in memory: no swaps.
template <int PITCH>
struct Plain {
    float* data;
    DEVICE float* at(int row8, int row, int column8, int column) const {
        return data + row8 * PITCH + column8 + (row * PITCH + column);
    }
};

// 16 x 16 floats in shared memory, their columns swapped by fours: ldmatrix meets nobody in a bank, other readers one more lane.
struct Square {
    float* data;
    DEVICE float* at(int row8, int row, int column8, int column) const {
        return data + row8 * 16 + (row * 16 + ((column8 + column) ^ (row & 6) << 1));
    }
};
constexpr int SQUARE = 16 * 16;

// 16 rows of COLUMNS of the inputs' own type in shared memory, an odd multiple of 16 bytes apart: no lanes meet in a bank.
template <class T, int COLUMNS>
struct Rows {
    static constexpr int PITCH = COLUMNS + 16 / int(sizeof(T)), BYTES = 16 * PITCH * int(sizeof(T));
    T* data;
    DEVICE T* at(int row8, int row, int column8, int column) const {
        return data + row8 * PITCH + column8 + (row * PITCH + column);
    }
};

DEVICE float to_float(float x) { return x; }
DEVICE float2 unpack(float2 x) { return x; }
DEVICE float2 unpack(uint32_t x) { return make_float2(__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)); }
DEVICE float2 two(const float* p) { return *reinterpret_cast<const float2*>(p); }
DEVICE float2 two(const bf16* p) { return unpack(*reinterpret_cast<const uint32_t*>(p)); }
DEVICE void put_one(float* p, float x) { *p = x; }
DEVICE void put_one(bf16* p, float x) { *p = to_bf16(x); }
DEVICE void put_two(float* p, float x, float y) { *reinterpret_cast<float2*>(p) = make_float2(x, y); }
DEVICE void put_two(bf16* p, float x, float y) {
    *reinterpret_cast<uint32_t*>(p) = to_bf16_pair(x, y);
}

// Left operand, near: columns `column` to column+15 of x, its rows the terms.
template <class X>
DEVICE Left left_turned(const X& x, int row, int column) {
    int q = 2 * lane_q(), g = lane_g();
    return {to_float(*x.at(row, q, column, g)), to_float(*x.at(row, q, column + 8, g)), to_float(*x.at(row, q + 1, column, g)),
            to_float(*x.at(row, q + 1, column + 8, g))};
}

// Right operand, near: columns `column` to column+7 of x, its rows the terms.
template <class X>
DEVICE Right right(const X& x, int row, int column) {
    return {*x.at(row, 2 * lane_q(), column, lane_g()), *x.at(row, 2 * lane_q() + 1, column, lane_g())};
}

// Right operand, near: rows `row` to row+7 of x, its columns the terms.
template <class X>
DEVICE Right right_turned(const X& x, int row, int column) {
    float2 terms = two(x.at(row, lane_g(), column, 2 * lane_q()));
    return {terms.x, terms.y};
}

// Two left operands, near: 16 rows, or for `turned` columns, of x; the other 16 are the terms.
template <int COLUMNS>
DEVICE void lefts(const Rows<float, COLUMNS>& x, int column, Left (&to)[2]) {
    UNROLL for (int n = 0; n < 2; n++) {
        float2 up = two(x.at(0, lane_g(), column + 8 * n, 2 * lane_q())), low = two(x.at(8, lane_g(), column + 8 * n, 2 * lane_q()));
        to[n] = {up.x, low.x, up.y, low.y};
    }
}
template <int COLUMNS>
DEVICE void lefts_turned(const Rows<float, COLUMNS>& x, int column, Left (&to)[2]) {
    UNROLL for (int n = 0; n < 2; n++) to[n] = left_turned(x, 8 * n, column);
}
DEVICE void unpack_lefts(const uint32_t (&packed)[4], Left (&to)[2]) {
    UNROLL for (int n = 0; n < 2; n++) {
        float2 up = unpack(packed[2 * n]), low = unpack(packed[2 * n + 1]);
        to[n] = {up.x, low.x, up.y, low.y};
    }
}
template <int COLUMNS>
DEVICE void lefts(const Rows<bf16, COLUMNS>& x, int column, Left (&to)[2]) {
    uint32_t packed[4];
    ldmatrix(packed, x.at(0, lane_of() % 16, column, lane_of() / 16 * 8));
    unpack_lefts(packed, to);
}
template <int COLUMNS>
DEVICE void lefts_turned(const Rows<bf16, COLUMNS>& x, int column, Left (&to)[2]) {
    uint32_t packed[4];
    ldmatrix_turned(packed, x.at(0, lane_of() % 8 + lane_of() / 16 * 8, column, lane_of() / 8 % 2 * 8));
    unpack_lefts(packed, to);
}

// Left operand, far: rows `row` to row+15 of a Tile or Square, its columns the terms.
template <class X>
DEVICE Left left_far(const X& x, int row, int column) {
    uint32_t y[4];
    ldmatrix(y, x.at(row + lane_of() / 8 % 2 * 8, lane_of() % 8, column, lane_of() / 16 * 4));
    return {__uint_as_float(y[0]), __uint_as_float(y[1]), __uint_as_float(y[2]), __uint_as_float(y[3])};
}

// Two right operands, far: rows `row` to row+15 of a Tile, its columns the terms.
template <class X>
DEVICE void rights_turned_far(const X& x, int row, int column, Right (&to)[2]) {
    uint32_t y[4];
    ldmatrix(y, x.at(row + lane_of() / 16 * 8, lane_of() % 8, column, lane_of() / 8 % 2 * 4));
    UNROLL for (int n = 0; n < 2; n++) to[n] = {__uint_as_float(y[2 * n]), __uint_as_float(y[2 * n + 1])};
}

// Right operand, far: columns `column` to column+7 of x, its rows the terms.
template <class X>
DEVICE Right right_far(const X& x, int row, int column) {
    return {*x.at(row, lane_q(), column, lane_g()), *x.at(row, lane_q() + 4, column, lane_g())};
}

// Where a Tile has column i of 8, such that its far terms are the near ones of what it is put for.
DEVICE int shuffled(int i) { return i / 2 + i % 2 * 4; }
