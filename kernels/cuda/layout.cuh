// Where the values of `product_norm` lie: in shared memory, in the accumulators of a thread, and in
// the matrix descriptors of `wgmma`. Plain functions, which a host's compiler takes as well.
//
// The build defines ROWS, COLUMNS, BLOCK_IN, STAGES and SHARED_BYTES (kernels/cuda_variants.py).
#pragma once

#ifdef __CUDACC__
#define PLACE __device__ constexpr
#else
#define PLACE constexpr
#endif

constexpr int HALF = COLUMNS / 2;         // columns of one `wgmma`, and of one block of the residual
constexpr int ROW_BYTES = BLOCK_IN * 2;   // one row of a box: the span of the 128-byte swizzle
constexpr int ATOM_BYTES = 8 * ROW_BYTES; // eight rows: the swizzle's pattern repeats
constexpr int BOX_BYTES = ROWS * ROW_BYTES;    // ROWS rows of `x` or of the residual
constexpr int HALF_BYTES = HALF * ROW_BYTES;   // HALF rows of the weight
constexpr int BOXES = HALF / BLOCK_IN;         // boxes of one block of the residual
constexpr int STEP_IN = 16;                    // inputs of one `wgmma`
constexpr int GROUP_ROWS = 64;                 // rows of one warpgroup's `wgmma`
constexpr int GROUPS = HALF / 8;               // groups of 8 columns in one `wgmma`
constexpr int SUMS = HALF / 2;                 // accumulators of one `wgmma` in a thread

constexpr int BLOCK_BYTES = BOX_BYTES + 2 * HALF_BYTES; // what one block of inputs brings
constexpr int RESIDUAL_BYTES = BOXES * BOX_BYTES;       // what one block of the residual brings
constexpr int STAGE_BYTES = BLOCK_BYTES > RESIDUAL_BYTES ? BLOCK_BYTES : RESIDUAL_BYTES;
constexpr int VECTOR_BYTES = COLUMNS * 4; // of bias, norm's weight and norm's bias, each
constexpr int VECTORS_AT = STAGES * STAGE_BYTES;
constexpr int FULL_AT = VECTORS_AT + 3 * VECTOR_BYTES;
constexpr int EMPTY_AT = FULL_AT + 8 * STAGES;

static_assert(EMPTY_AT + 8 * STAGES + ATOM_BYTES == SHARED_BYTES, "ATOM_BYTES align the first stage");

static_assert(ROW_BYTES == 128, "a box's row is the span of the 128-byte swizzle");
static_assert(ROWS == 2 * GROUP_ROWS, "two warpgroups share a tile");
static_assert(HALF % BLOCK_IN == 0 && HALF % 8 == 0 && HALF <= 256, "a `wgmma` takes HALF columns");
static_assert(BOX_BYTES % ATOM_BYTES == 0 && HALF_BYTES % ATOM_BYTES == 0, "boxes start patterns");
static_assert(STAGE_BYTES % ATOM_BYTES == 0, "stages start patterns");
static_assert(FULL_AT % 8 == 0, "an mbarrier lies on 8 bytes");

// The byte of element (row, column) in boxes of `BLOCK_IN` columns, `box_bytes` apart, that the copy
// engine wrote with the 128-byte swizzle: bits 4 to 6 of an address are xored with bits 7 to 9.
PLACE unsigned swizzled(unsigned row, unsigned column, unsigned box_bytes) {
    const unsigned chunk = column % BLOCK_IN / 8 ^ row % 8;
    return column / BLOCK_IN * box_bytes + row * ROW_BYTES + chunk * 16 + column % 8 * 2;
}

// The descriptor of a K-major operand that starts at `address`: address, leading dimension (which
// this swizzle ignores) and stride from 8 rows to the next, in units of 16 bytes; 128-byte swizzle.
PLACE unsigned long long descriptor(unsigned address) {
    return (address & 0x3FFFFull) >> 4 | 1ull << 16 | (unsigned long long)(ATOM_BYTES >> 4) << 32 |
           1ull << 62;
}

// What a descriptor grows by from one `wgmma` to the next: STEP_IN inputs, within the pattern.
constexpr unsigned long long STEP_DESCRIPTOR = STEP_IN * 2 >> 4;

// Accumulator `sum` of a thread belongs to this row of its warpgroup's 64 and this column of HALF.
PLACE int sum_row(int thread, int sum) {
    return thread % 128 / 32 * 16 + thread % 32 / 4 + sum / 2 % 2 * 8;
}
PLACE int sum_column(int thread, int sum) { return sum / 4 * 8 + thread % 4 * 2 + sum % 2; }

// The same place as `swizzled` gives for a sum's row, `first_row` further down, and column: what
// depends on the thread comes first, so that it is computed once for all sums.
PLACE unsigned sum_place(int thread, int first_row, int sum) {
    const unsigned first = (first_row + sum_row(thread, 0)) * ROW_BYTES + thread % 4 * 4;
    const unsigned turn = thread % 32 / 4 * 16;
    const int group = sum / 4, groups_a_box = BLOCK_IN / 8;
    return first + (turn ^ group % groups_a_box * 16) + group / groups_a_box * BOX_BYTES +
           sum / 2 % 2 * ATOM_BYTES;
}
