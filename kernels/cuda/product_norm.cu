// out = LayerNorm(x weight^T + bias + residual): a product whose epilogue is the norm of its rows.
//
// A tile is ROWS whole rows of COLUMNS columns, so that nothing of a row leaves its program. Sums
// are float32 in the order of k, whatever the batch: no sum is shared between programs, nothing is
// added atomically, and a row is the same bits in every batch.
//
// Three warpgroups: two multiply, 64 rows each; of the third one thread lets the copy engine fetch.
// Between them lies a ring of STAGES stages. Its items, for each tile of the program:
//
//     num_in / BLOCK_IN blocks of inputs: ROWS x BLOCK_IN of `x`, COLUMNS x BLOCK_IN of `weight`
//     2 blocks of the residual: ROWS x HALF columns
//
// Item n is in stage n % STAGES, for the (n / STAGES)-th time: its phase is that number's parity.
// Both sides count the same items, since both compute the same tiles from `control`.
//
//     full[stage]   1 arrival, the fetching thread's, and the bytes that it says come with it.
//                   Readers wait for the item's phase.
//     empty[stage]  8 arrivals, one of each reading warp, when its part of the item has been read:
//                   after the `wgmma` that read it have ended, or after every lane has loaded its
//                   part of the residual. The fetching thread waits for the phase before the
//                   item's; before a stage's first item that one counts as ended.
//
// Every item is waited for by all readers and released by all of them, the last ones too, so that no
// copy is under way when the program ends, and every phase ends exactly once.
#include "layout.cuh"
#ifndef MACHINE
#define MACHINE "hopper.cuh"
#endif
#include MACHINE

constexpr int THREADS = 384, READING_WARPS = 8;
// 168 registers a thread when the program starts: what the fetching warps give, the others take.
constexpr int FETCH_REGISTERS = 24, READ_REGISTERS = 240;
static_assert(FETCH_REGISTERS + 2 * READ_REGISTERS == 3 * 168, "more registers than there are");

// Where a side stands in the ring.
struct Ring {
    unsigned memory, stage = 0, phase = 0;

    __device__ explicit Ring(unsigned memory) : memory(memory) {}
    __device__ unsigned place() const { return memory + stage * STAGE_BYTES; }
    __device__ unsigned full() const { return memory + FULL_AT + 8 * stage; }
    __device__ unsigned empty() const { return memory + EMPTY_AT + 8 * stage; }
    __device__ void advance() {
        stage = stage + 1 == STAGES ? 0 : stage + 1;
        phase ^= stage == 0;
    }
};

struct Maps {
    const TensorMap &x, &weight, &residual;
};

// Waits until the ring's next stage is free, and announces what will come.
__device__ __forceinline__ void open_stage(const Ring &ring, unsigned num_bytes) {
    barrier_wait(ring.empty(), ring.phase ^ 1);
    barrier_arrive_expecting(ring.full(), num_bytes);
}

__device__ __forceinline__ void fetch(const Maps &maps, unsigned memory, int num_tiles, int num_in) {
    Ring ring(memory);
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        const int row = tile * ROWS;
#pragma unroll 1
        for (int inner = 0; inner < num_in; inner += BLOCK_IN) {
            open_stage(ring, BLOCK_BYTES);
            copy_box(ring.place(), maps.x, row, inner, ring.full());
            const unsigned weight = ring.place() + BOX_BYTES;
            copy_box(weight, maps.weight, 0, inner, ring.full());
            copy_box(weight + HALF_BYTES, maps.weight, HALF, inner, ring.full());
            ring.advance();
        }
#pragma unroll 1
        for (int column = 0; column < COLUMNS; column += HALF) {
            open_stage(ring, RESIDUAL_BYTES);
#pragma unroll
            for (int box = 0; box < BOXES; ++box)
                copy_box(ring.place() + box * BOX_BYTES, maps.residual, row,
                         column + box * BLOCK_IN, ring.full());
            ring.advance();
        }
    }
}

// Multiplies a tile's rows of this warpgroup. A stage is released one block later, when the next
// block's products are under way.
__device__ __forceinline__ void multiply_tile(Ring &ring, float (&sums)[2][SUMS], int num_in) {
    const unsigned first_row = threadIdx.x / 128 * GROUP_ROWS * ROW_BYTES;
    unsigned before = 0;
#pragma unroll 1
    for (int inner = 0; inner < num_in; inner += BLOCK_IN) {
        barrier_wait(ring.full(), ring.phase);
        const unsigned long long x = descriptor(ring.place() + first_row);
        const unsigned long long weight = descriptor(ring.place() + BOX_BYTES);
        products_begin();
#pragma unroll
        for (int step = 0; step < BLOCK_IN / STEP_IN; ++step)
#pragma unroll
            for (int half = 0; half < 2; ++half)
                multiply(sums[half], x + step * STEP_DESCRIPTOR,
                         weight + (half * HALF_BYTES >> 4) + step * STEP_DESCRIPTOR, inner + step);
        products_commit();
        products_wait<1>();
        if (inner > 0 && threadIdx.x % 32 == 0)
            barrier_arrive(before);
        before = ring.empty();
        ring.advance();
    }
    products_wait<0>();
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int sum = 0; sum < SUMS; ++sum)
            settle(sums[half][sum]);
    if (threadIdx.x % 32 == 0)
        barrier_arrive(before);
}

// Adds over the four lanes that hold a row.
__device__ __forceinline__ float row_sum(float value) {
    value += exchange(value, 1);
    return value + exchange(value, 2);
}

// Adds bias and residual; returns the mean of each of the thread's two rows.
__device__ __forceinline__ Pair add_residual(Ring &ring, float (&sums)[2][SUMS]) {
    const int thread = threadIdx.x, group_row = thread / 128 * GROUP_ROWS;
    Pair total{};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        barrier_wait(ring.full(), ring.phase);
#pragma unroll
        for (int sum = 0; sum < SUMS; sum += 2) {
            const int column = half * HALF + sum_column(thread, sum);
            const Pair bias = load_pair(ring.memory + VECTORS_AT + column * 4);
            const Word word = load_word(ring.place() + sum_place(thread, group_row, sum));
            const Pair residual = widened(word);
#pragma unroll
            for (int each = 0; each < 2; ++each) {
                float &value = sums[half][sum + each];
                value = value + bias.of[each] + residual.of[each];
                total.of[sum / 2 % 2] += value;
            }
        }
        fence_copies();
        sync_warp(); // all lanes have read
        if (thread % 32 == 0)
            barrier_arrive(ring.empty());
        ring.advance();
    }
    return Pair{{row_sum(total.of[0]) / COLUMNS, row_sum(total.of[1]) / COLUMNS}};
}

// Takes the means off; returns the reciprocal of each row's standard deviation.
__device__ __forceinline__ Pair center(float (&sums)[2][SUMS], Pair mean, float epsilon) {
    Pair squares{};
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int sum = 0; sum < SUMS; ++sum) {
            float &value = sums[half][sum];
            value -= mean.of[sum / 2 % 2];
            squares.of[sum / 2 % 2] += value * value;
        }
    return Pair{{reciprocal_root(row_sum(squares.of[0]) / COLUMNS + epsilon),
                 reciprocal_root(row_sum(squares.of[1]) / COLUMNS + epsilon)}};
}

// Four lanes hold two columns of each of four groups of 8; afterwards each holds one group whole:
// lane q of the four gets word q of lane k as its word k.
__device__ __forceinline__ void gather_groups(Words &words) {
    const int lane = threadIdx.x;
#pragma unroll
    for (int mask = 1; mask < 4; mask *= 2)
#pragma unroll
        for (int low = 0; low < 4; ++low)
            if (!(low & mask)) {
                const Word first = words.of[low], second = words.of[low + mask];
                const bool is_upper = lane & mask;
                const Word came = exchange(is_upper ? first : second, mask);
                words.of[low] = is_upper ? came : first;
                words.of[low + mask] = is_upper ? second : came;
            }
}

// Scales, shifts, rounds and writes the rows that the batch has, 16 bytes a thread at a time.
__device__ __forceinline__ void write_rows(const float (&sums)[2][SUMS], Pair scale, unsigned memory,
                                           unsigned short *out, int first_row, int num_rows) {
    const int thread = threadIdx.x;
    const unsigned weights = memory + VECTORS_AT + VECTOR_BYTES, biases = weights + VECTOR_BYTES;
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
        for (int group = 0; group < GROUPS; group += 4) {
            Words words[2];
#pragma unroll
            for (int each = 0; each < 4; ++each) {
                const int sum = 4 * (group + each);
                const int column = half * HALF + sum_column(thread, sum);
                const Pair weight = load_pair(weights + column * 4);
                const Pair bias = load_pair(biases + column * 4);
#pragma unroll
                for (int row = 0; row < 2; ++row) {
                    const float *pair = sums[half] + sum + 2 * row;
                    words[row].of[each] =
                        narrowed(pair[0] * scale.of[row] * weight.of[0] + bias.of[0],
                                 pair[1] * scale.of[row] * weight.of[1] + bias.of[1]);
                }
            }
#pragma unroll
            for (int row = 0; row < 2; ++row) {
                gather_groups(words[row]);
                const int place = first_row + sum_row(thread, 2 * row);
                const int column = half * HALF + 8 * (group + thread % 4);
                if (place < num_rows)
                    *reinterpret_cast<Words *>(out + (long long)place * COLUMNS + column) =
                        words[row];
            }
        }
}

// A map is followed by its array's shape and strides, which nothing here asks for.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
    product_norm(const __grid_constant__ TensorMap x, int, int, long long, long long,
                 const __grid_constant__ TensorMap weight, int, int, long long, long long,
                 const __grid_constant__ TensorMap residual, int, int, long long, long long,
                 const float *bias, const float *norm_weight, const float *norm_bias,
                 unsigned short *out, const long long *control, int rows_per_pair, int num_in,
                 float epsilon) {
    const unsigned memory = (shared_base() + ATOM_BYTES - 1) / ATOM_BYTES * ATOM_BYTES;
    const int thread = threadIdx.x;
    const int num_rows = static_cast<int>(control[1]) * rows_per_pair;
    const int num_tiles = (num_rows + ROWS - 1) / ROWS;
    const float *vectors[] = {bias, norm_weight, norm_bias};
#pragma unroll
    for (int each = 0; each < 3; ++each)
        for (int column = thread; column < COLUMNS; column += THREADS)
            store_float(memory + VECTORS_AT + each * VECTOR_BYTES + column * 4,
                        vectors[each][column]);
    if (thread == 0) {
        for (int stage = 0; stage < STAGES; ++stage) {
            barrier_init(memory + FULL_AT + 8 * stage, 1);
            barrier_init(memory + EMPTY_AT + 8 * stage, READING_WARPS);
        }
        publish_barriers();
    }
    sync_block();

    if (thread >= 32 * READING_WARPS) {
        give_registers<FETCH_REGISTERS>();
        if (thread == 32 * READING_WARPS) {
            prefetch_map(x), prefetch_map(weight), prefetch_map(residual);
            fetch({x, weight, residual}, memory, num_tiles, num_in);
        }
        return;
    }
    take_registers<READ_REGISTERS>();
    Ring ring(memory);
#pragma unroll 1
    for (int tile = blockIdx.x; tile < num_tiles; tile += gridDim.x) {
        float sums[2][SUMS];
        multiply_tile(ring, sums, num_in);
        const Pair mean = add_residual(ring, sums);
        const Pair scale = center(sums, mean, epsilon);
        write_rows(sums, scale, memory, out, tile * ROWS + thread / 128 * GROUP_ROWS, num_rows);
    }
}
