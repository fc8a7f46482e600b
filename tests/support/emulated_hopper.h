// A machine of threads for `kernels/cuda/product_norm.cu`, by the PTX ISA's description: what
// `hopper.cuh` does with instructions, this does late and in random order wherever the hardware may.
//
// - A block is 384 threads. Shared memory begins off the swizzle's pattern, as NaN.
// - An mbarrier counts arrivals and bytes, and waits go by parity.
// - The copy engine is one more thread: it fetches boxes in random order; from the moment that a copy
//   is asked for its target holds NaN, so that whoever still reads it has a NaN in the result.
// - A `wgmma` reads its operands when its end is waited for, and no earlier; a warp's lanes end that
//   wait together (`.sync.aligned`), and meet nowhere else but where the program says so.
// - Copied bytes arrive where a tensor map's 128-byte swizzle puts them; descriptors are decoded.
//
// The first fault is noted, and all waits end from there on.
#pragma once
#include <atomic>
#include <barrier>
#include <chrono>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

using Word = unsigned;
struct alignas(16) Words {
    Word of[4];
};
struct Pair {
    float of[2];
};
struct alignas(64) TensorMap { // 128 bytes; what the driver would encode
    const unsigned short *rows;
    long long num_rows, num_columns, row_stride;
    int box_rows, box_columns, swizzle, element;
    char rest[80];
};
static_assert(sizeof(TensorMap) == 128);
struct Place {
    unsigned x;
};
inline thread_local Place threadIdx, blockIdx, gridDim;

constexpr unsigned BASE = 0x410, LEAST_TRANSFER = 16; // shared memory begins at BASE
constexpr int NUM_THREADS = 384, SWIZZLE_128B = 3, ELEMENT_TYPE = BFLOAT16 ? 9 : 6;
constexpr unsigned MOST_COUNT = (1 << 20) - 1;
constexpr auto PATIENCE = std::chrono::seconds(PATIENCE_S);

struct Copy {
    unsigned target, barrier;
    TensorMap map; // the program's own ends with its thread, a launch's with the launch
    int row, column;
};
struct Barrier {
    int count, pending;
    long long num_bytes;
    unsigned phase;
};
struct Warp {
    std::barrier<> meeting{32};
    Word words[2][32];
};

struct Block {
    std::vector<unsigned char> memory;
    std::mutex mutex;
    std::condition_variable changed;
    std::map<unsigned, Barrier> barriers;
    std::vector<Copy> copies;
    std::barrier<> meeting{NUM_THREADS};
    Warp warps[NUM_THREADS / 32];
    std::atomic<bool> broken = false;
    std::string fault;
    bool ended = false;

    explicit Block(unsigned num_bytes) : memory(num_bytes, 0xFF) {}

    void fail(const std::string &what) {
        std::lock_guard lock(mutex);
        if (!broken.exchange(true))
            fault = what;
        changed.notify_all();
    }
    unsigned char *at(unsigned address, unsigned num_bytes) {
        if (address < BASE || address - BASE + num_bytes > memory.size() || address % num_bytes) {
            fail("shared memory: " + std::to_string(num_bytes) + " bytes at " +
                 std::to_string(address));
            return memory.data();
        }
        return memory.data() + (address - BASE);
    }
    // With the mutex held.
    void end_phase(Barrier &barrier) {
        if (barrier.pending || barrier.num_bytes)
            return;
        barrier.pending = barrier.count;
        ++barrier.phase;
        changed.notify_all();
    }
};
inline Block *block;

inline unsigned shared_base() { return BASE; }
inline Word load_word(unsigned address) {
    Word word;
    std::memcpy(&word, block->at(address, 4), 4);
    return word;
}
inline Pair load_pair(unsigned address) {
    Pair pair;
    std::memcpy(&pair, block->at(address, 8), 8);
    return pair;
}
inline void store_float(unsigned address, float value) {
    std::memcpy(block->at(address, 4), &value, 4);
}

inline void sync_block() { block->meeting.arrive_and_wait(); }
inline Warp &own_warp() { return block->warps[threadIdx.x / 32]; }
inline void sync_warp() { own_warp().meeting.arrive_and_wait(); }
inline void fence_copies() {}
inline void publish_barriers() {}

inline void barrier_init(unsigned address, unsigned count) {
    block->at(address, 8);
    std::lock_guard lock(block->mutex);
    block->barriers[address] = {int(count), int(count), 0, 0};
}
inline void barrier_arrive_expecting(unsigned address, unsigned num_bytes) {
    std::unique_lock lock(block->mutex);
    Barrier &barrier = block->barriers[address];
    const bool is_sound = barrier.pending > 0 && num_bytes <= MOST_COUNT;
    --barrier.pending;
    barrier.num_bytes += num_bytes;
    block->end_phase(barrier);
    lock.unlock();
    if (!is_sound)
        block->fail("an arrival that no phase of the barrier waits for");
}
inline void barrier_arrive(unsigned address) { barrier_arrive_expecting(address, 0); }
inline void barrier_wait(unsigned address, unsigned parity) {
    std::unique_lock lock(block->mutex);
    const Barrier &barrier = block->barriers[address];
    const auto ended = [&] { return block->broken || barrier.phase % 2 != parity; };
    if (block->changed.wait_for(lock, PATIENCE, ended))
        return;
    lock.unlock();
    block->fail("thread " + std::to_string(threadIdx.x) + " waits for ever");
}

inline void prefetch_map(const TensorMap &) {}
inline void copy_box(unsigned target, const TensorMap &map, int row, int column, unsigned barrier) {
    const unsigned size = map.box_rows * map.box_columns * 2;
    if (map.element != ELEMENT_TYPE)
        block->fail("a map of another element type");
    if (target % 1024 || map.swizzle != SWIZZLE_128B || map.box_columns != 64 || map.box_rows > 256)
        block->fail("a box that the swizzle does not take");
    block->at(target, LEAST_TRANSFER);
    if (target - BASE + size > block->memory.size())
        return block->fail("a box past shared memory");
    std::memset(block->memory.data() + (target - BASE), 0xFF, size);
    std::lock_guard lock(block->mutex);
    block->copies.push_back({target, barrier, map, row, column});
    block->changed.notify_all();
}

inline void fetch_box(const Copy &copy) {
    const TensorMap &map = copy.map;
    for (int row = 0; row < map.box_rows; ++row)
        for (int column = 0; column < map.box_columns; ++column) {
            const long long r = copy.row + row, c = copy.column + column;
            const bool is_inside = r >= 0 && r < map.num_rows && c >= 0 && c < map.num_columns;
            const unsigned short value = is_inside ? map.rows[r * map.row_stride + c] : 0;
            unsigned address = copy.target + (row * map.box_columns + column) * 2;
            address ^= (address >> 7 & 7) << 4;
            std::memcpy(block->memory.data() + (address - BASE), &value, 2);
        }
}
inline void run_copies(unsigned seed) {
    std::mt19937 random(seed);
    std::unique_lock lock(block->mutex);
    for (;;) {
        block->changed.wait(lock, [] { return block->ended || !block->copies.empty(); });
        if (block->copies.empty())
            return;
        const unsigned chosen = random() % block->copies.size();
        const Copy copy = block->copies[chosen];
        block->copies.erase(block->copies.begin() + chosen);
        lock.unlock();
        if (random() % 2)
            std::this_thread::sleep_for(std::chrono::microseconds(random() % 500));
        fetch_box(copy);
        lock.lock();
        Barrier &barrier = block->barriers[copy.barrier];
        barrier.num_bytes -= copy.map.box_rows * copy.map.box_columns * 2;
        block->end_phase(barrier);
    }
}

template <int COUNT> void give_registers() {}
template <int COUNT> void take_registers() {}
inline void settle(float &) {}

inline float widened_half(unsigned short bits) {
#if BFLOAT16
    const unsigned wide = unsigned(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
#else
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31  ? (fraction ? NAN : INFINITY)
                       : exponent == 0 ? std::ldexp(float(fraction), -24)
                                       : std::ldexp(float(1024 + fraction), exponent - 25);
    return bits >> 15 ? -size : size;
#endif
}
inline unsigned short narrowed_half(float value) {
    unsigned bits;
    std::memcpy(&bits, &value, 4);
    const unsigned short sign = bits >> 16 & 0x8000;
    if (std::isnan(value))
        return 0x7FFF;
#if BFLOAT16
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;
#else
    const float size = std::fabs(value);
    if (size >= 65520.0f)
        return sign | 0x7C00;
    const int exponent = size < std::ldexp(1.0f, -14) ? -14 : std::ilogb(size);
    const int steps = int(std::nearbyint(std::ldexp(size, 10 - exponent))); // ties to even
    return sign | (steps + (exponent + 14) * 1024);
#endif
}

struct Multiplication {
    float *sums;
    unsigned long long x, y;
    bool accumulates;
};
inline thread_local std::vector<Multiplication> open_group;
inline thread_local std::deque<std::vector<Multiplication>> groups;

// Element (row, k) of a K-major operand with the 128-byte swizzle, its pattern on 1,024 bytes.
inline float operand(unsigned long long descriptor, int row, int k) {
    const unsigned start = (descriptor & 0x3FFF) << 4, stride = (descriptor >> 32 & 0x3FFF) << 4;
    if (descriptor >> 62 != 1 || (descriptor >> 49 & 7) || start % 1024 + 2 * STEP_IN > 128)
        block->fail("a descriptor other than of the 128-byte swizzle");
    unsigned address = start + row / 8 * stride + row % 8 * 128 + k * 2;
    address ^= (address >> 7 & 7) << 4;
    unsigned short bits;
    std::memcpy(&bits, block->at(address, 2), 2);
    return widened_half(bits);
}
// Lane 4 g + t of warp w holds, of each 8 columns, the pair 2 t of rows 16 w + g, then of 8 below.
inline void run(const Multiplication &each) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
    float x[2][16];
    for (int half = 0; half < 2; ++half)
        for (int k = 0; k < 16; ++k)
            x[half][k] = operand(each.x, warp * 16 + half * 8 + (lane >> 2), k);
    float *sum = each.sums;
    for (int group = 0; group < 24; ++group) {
        float y[2][16];
        for (int pair = 0; pair < 2; ++pair)
            for (int k = 0; k < 16; ++k)
                y[pair][k] = operand(each.y, group * 8 + (lane & 3) * 2 + pair, k);
        for (int half = 0; half < 2; ++half)
            for (int pair = 0; pair < 2; ++pair, ++sum) {
                float total = each.accumulates ? *sum : 0;
                for (int k = 0; k < 16; ++k)
                    total += x[half][k] * y[pair][k];
                *sum = total;
            }
    }
}
inline void products_begin() {}
inline void multiply(float (&sums)[96], unsigned long long x, unsigned long long y, int accumulate) {
    open_group.push_back({sums, x, y, accumulate != 0});
}
inline void products_commit() {
    groups.push_back(std::move(open_group));
    open_group.clear();
}
template <int PENDING> void products_wait() {
    for (; groups.size() > PENDING; groups.pop_front())
        for (const Multiplication &each : groups.front())
            run(each);
    sync_warp();
}

inline Word exchange(Word word, int mask) {
    thread_local int turn = 0;
    Warp &warp = own_warp();
    const int lane = threadIdx.x % 32;
    turn ^= 1; // who is a turn ahead writes elsewhere
    warp.words[turn][lane] = word;
    warp.meeting.arrive_and_wait();
    return warp.words[turn][lane ^ mask];
}
inline float exchange(float value, int mask) {
    Word word;
    std::memcpy(&word, &value, 4);
    word = exchange(word, mask);
    std::memcpy(&value, &word, 4);
    return value;
}
inline float reciprocal_root(float value) { return 1 / std::sqrt(value); }
inline Word narrowed(float first, float second) {
    return narrowed_half(first) | unsigned(narrowed_half(second)) << 16;
}
inline Pair widened(Word word) {
    return {{widened_half(word & 0xFFFF), widened_half(word >> 16)}};
}

// Runs the blocks of a grid one after the other; returns the first fault, or nothing.
inline std::string run_grid(unsigned grid, unsigned num_bytes, unsigned seed,
                            const std::function<void()> &program) {
    for (unsigned place = 0; place < grid; ++place) {
        Block own(num_bytes);
        block = &own;
        std::thread engine(run_copies, seed + place);
        std::vector<std::thread> threads;
        for (unsigned each = 0; each < NUM_THREADS; ++each)
            threads.emplace_back([=, &program] {
                threadIdx.x = each, blockIdx.x = place, gridDim.x = grid;
                program();
            });
        for (std::thread &thread : threads)
            thread.join();
        const bool is_under_way = [&] {
            std::lock_guard lock(own.mutex);
            own.ended = true;
            bool waits = !own.copies.empty();
            for (const auto &[address, each] : own.barriers)
                waits |= each.pending != each.count || each.num_bytes;
            own.changed.notify_all();
            return waits;
        }();
        engine.join();
        if (own.broken)
            return own.fault;
        if (is_under_way)
            return "copies or arrivals were under way when the program ended";
    }
    return "";
}
