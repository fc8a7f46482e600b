// What `product_norm` asks of an NVIDIA GPU of compute capability 9.0, one instruction a function.
// Shared memory is addressed by 32-bit numbers.
#pragma once

using Word = unsigned; // two elements, the first in the low half
struct alignas(16) Words {
    Word of[4];
};
struct alignas(8) Pair {
    float of[2];
};
// What the driver's CUtensorMap is: the copy engine wants it on 64 bytes.
struct alignas(64) TensorMap {
    unsigned char bytes[128];
};

#if BFLOAT16
#define ELEMENT "bf16"
#else
#define ELEMENT "f16"
#endif

extern __shared__ unsigned char shared_memory[];

__device__ __forceinline__ unsigned shared_base() {
    return static_cast<unsigned>(__cvta_generic_to_shared(shared_memory));
}
__device__ __forceinline__ Word load_word(unsigned address) {
    Word word;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
    return word;
}
// For what is written before the block's barrier only: the compiler may move these loads.
__device__ __forceinline__ Pair load_pair(unsigned address) {
    Pair pair;
    asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(pair.of[0]), "=f"(pair.of[1]) : "r"(address));
    return pair;
}
__device__ __forceinline__ void store_float(unsigned address, float value) {
    asm volatile("st.shared.f32 [%0], %1;" ::"r"(address), "f"(value) : "memory");
}

__device__ __forceinline__ void sync_block() { __syncthreads(); }
__device__ __forceinline__ void sync_warp() { __syncwarp(); }
// Orders a thread's own accesses to shared memory against later ones of the copy engine.
__device__ __forceinline__ void fence_copies() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// mbarriers. A phase ends when `count` arrivals and all expected bytes have come; the next begins
// at once. Waiting for parity p returns when the phase of parity p has ended: that of parity 1 has
// "ended" before the first, which has parity 0.
__device__ __forceinline__ void barrier_init(unsigned barrier, unsigned count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
__device__ __forceinline__ void publish_barriers() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    fence_copies();
}
__device__ __forceinline__ void barrier_arrive(unsigned barrier) {
    asm volatile("mbarrier.arrive.release.cta.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void barrier_arrive_expecting(unsigned barrier, unsigned num_bytes) {
    asm volatile("mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%0], %1;" ::"r"(barrier),
                 "r"(num_bytes)
                 : "memory");
}
constexpr unsigned MOST_TRIES = 1u << 22;
// What never comes, a fault of this program, ends it with an error after some seconds: no hang.
__device__ __forceinline__ void barrier_wait(unsigned barrier, unsigned parity) {
    for (unsigned tries = 0, done = 0; !done; ++tries) {
        asm volatile("{\n"
                     ".reg .pred ended;\n"
                     "mbarrier.try_wait.parity.acquire.cta.shared::cta.b64 ended, [%1], %2;\n"
                     "selp.u32 %0, 1, 0, ended;\n"
                     "}"
                     : "=r"(done)
                     : "r"(barrier), "r"(parity)
                     : "memory");
        if (tries == MOST_TRIES)
            __trap();
    }
}

// Lets the copy engine fetch the box at (row, column) of a map; its bytes arrive at `barrier`. What
// lies outside of the array comes as zeros, and counts.
__device__ __forceinline__ void copy_box(unsigned target, const TensorMap &map, int row, int column,
                                         unsigned barrier) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%2, %3}], [%4];" ::"r"(target),
                 "l"(&map), "r"(column), "r"(row), "r"(barrier)
                 : "memory");
}
__device__ __forceinline__ void prefetch_map(const TensorMap &map) {
    asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

template <int COUNT> __device__ __forceinline__ void give_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(COUNT));
}
template <int COUNT> __device__ __forceinline__ void take_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COUNT));
}

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Blocks until at most PENDING committed groups of this warp run.
template <int PENDING> __device__ __forceinline__ void products_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory");
}
// Tells the compiler that a sum has its value from here on, and no earlier.
__device__ __forceinline__ void settle(float &sum) { asm volatile("" : "+f"(sum)::"memory"); }

#define SUMS_4(d, i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define SUMS_16(d, i) SUMS_4(d, i), SUMS_4(d, i + 4), SUMS_4(d, i + 8), SUMS_4(d, i + 12)
#define SUMS_96(d)                                                                                 \
    SUMS_16(d, 0), SUMS_16(d, 16), SUMS_16(d, 32), SUMS_16(d, 48), SUMS_16(d, 64), SUMS_16(d, 80)

// sums = (accumulate ? sums : 0) + x y^T for 64 rows, 192 columns and 16 inputs; returns at once.
__device__ __forceinline__ void multiply(float (&sums)[96], unsigned long long x,
                                         unsigned long long y, int accumulate) {
    asm volatile(
        "{\n"
        ".reg .pred add;\n"
        "setp.ne.b32 add, %98, 0;\n"
        "wgmma.mma_async.sync.aligned.m64n192k16.f32." ELEMENT "." ELEMENT " {"
        "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
        "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
        "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
        "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
        "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
        "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
        "}, %96, %97, add, 1, 1, 0, 0;\n"
        "}"
        : SUMS_96(sums)
        : "l"(x), "l"(y), "r"(accumulate));
}

__device__ __forceinline__ Word exchange(Word word, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, word, mask);
}
__device__ __forceinline__ float exchange(float value, int mask) {
    return __shfl_xor_sync(0xFFFFFFFFu, value, mask);
}
__device__ __forceinline__ float reciprocal_root(float value) { return rsqrtf(value); }
__device__ __forceinline__ Word narrowed(float first, float second) {
    Word word;
    asm("cvt.rn." ELEMENT "x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
__device__ __forceinline__ Pair widened(Word word) {
    Pair pair;
#if BFLOAT16
    pair.of[0] = __uint_as_float(word << 16);
    pair.of[1] = __uint_as_float(word & 0xFFFF0000u);
#else
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\n"
        "cvt.f32.f16 %0, low;\ncvt.f32.f16 %1, high;\n}"
        : "=f"(pair.of[0]), "=f"(pair.of[1])
        : "r"(word));
#endif
    return pair;
}
