/* XXH3-64 of more than 240 bytes, and XXH3-128 with seed 0 of any size but 0, as the specification has
 * them (github.com/Cyan4973/xxHash, doc/xxhash_spec.md); written anew from it.
 */
#include <stdint.h>
#include <string.h>

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__ || !defined(__SIZEOF_INT128__)
#error "little-endian 64-bit systems only: elsewhere Python reads"
#endif

/* One build for every x86-64 CPU: what this one has is asked for when the module is loaded. */
#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define HAS_VECTORS 1
#else
#define HAS_VECTORS 0
#endif

enum { LANES = 8, STRIPE = 64, SECRET_WORDS = 24, BLOCK_STRIPES = 16, LEAST_BYTES = 241 };
enum { LAST = 8 * SECRET_WORDS - STRIPE }; /* where the secret of a block's end begins */

static const uint64_t P32_1 = 0x9E3779B1U, P32_2 = 0x85EBCA77U, P32_3 = 0xC2B2AE3DU;
static const uint64_t P64_1 = 0x9E3779B185EBCA87ULL, P64_2 = 0xC2B2AE3D27D4EB4FULL;
static const uint64_t P64_3 = 0x165667B19E3779F9ULL, P64_4 = 0x85EBCA77C2B2AE63ULL;
static const uint64_t P64_5 = 0x27D4EB2F165667C5ULL;

static const uint64_t SECRET[SECRET_WORDS] = {
    0xbe4ba423396cfeb8ULL, 0x1cad21f72c81017cULL, 0xdb979083e96dd4deULL, 0x1f67b3b7a4a44072ULL,
    0x78e5c0cc4ee679cbULL, 0x2172ffcc7dd05a82ULL, 0x8e2443f7744608b8ULL, 0x4c263a81e69035e0ULL,
    0xcb00c391bb52283cULL, 0xa32e531b8b65d088ULL, 0x4ef90da297486471ULL, 0xd8acdea946ef1938ULL,
    0x3f349ce33f76faa8ULL, 0x1d4f0bc7c7bbdcf9ULL, 0x3159b4cd4be0518aULL, 0x647378d9c97e9fc8ULL,
    0xc3ebd33483acc5eaULL, 0xeb6313faffa081c5ULL, 0x49daf0b751dd0d17ULL, 0x9e68d429265516d3ULL,
    0xfca1477d58be162bULL, 0xce31d07ad1b8f88fULL, 0x280416958f3acb45ULL, 0x7e404bbbcafbd7afULL,
};

static inline uint64_t word(const uint8_t *at) {
    uint64_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

/* Takes `num_blocks` blocks into the 8 lanes of acc, each scrambled behind its 16 stripes, then `rest`
 * stripes more. The secret moves on by 8 bytes with each stripe of a block. */
typedef void taking_in(
    uint64_t *acc, const uint8_t *data, const uint8_t *secret, size_t num_blocks, size_t rest
);

static void take_in_words(
    uint64_t *acc, const uint8_t *data, const uint8_t *secret, size_t num_blocks, size_t rest
) {
    for (size_t block = 0; block <= num_blocks; block++) {
        size_t count = block < num_blocks ? BLOCK_STRIPES : rest;
        for (size_t stripe = 0; stripe < count; stripe++, data += STRIPE)
            for (int lane = 0; lane < LANES; lane++) {
                uint64_t mixed = word(data + 8 * lane) ^ word(secret + 8 * (stripe + lane));
                acc[lane] += (mixed & 0xFFFFFFFFU) * (mixed >> 32) + word(data + 8 * (lane ^ 1));
            }
        for (int lane = 0; lane < LANES && block < num_blocks; lane++)
            acc[lane] = (acc[lane] ^ (acc[lane] >> 47) ^ word(secret + LAST + 8 * lane)) * P32_1;
    }
}

#if HAS_VECTORS
__attribute__((target("avx2"))) static inline __m256i mixed_avx2(
    __m256i acc, const uint8_t *data, const uint8_t *secret
) {
    __m256i values = _mm256_loadu_si256((const __m256i *)data);
    __m256i mixed = _mm256_xor_si256(values, _mm256_loadu_si256((const __m256i *)secret));
    mixed = _mm256_mul_epu32(mixed, _mm256_srli_epi64(mixed, 32));
    return _mm256_add_epi64(acc, _mm256_add_epi64(mixed, _mm256_shuffle_epi32(values, 0x4E)));
}

__attribute__((target("avx2"))) static inline __m256i scrambled_avx2(
    __m256i acc, const uint8_t *secret
) {
    const __m256i prime = _mm256_set1_epi64x((long long)P32_1);
    __m256i keys = _mm256_loadu_si256((const __m256i *)secret);
    acc = _mm256_xor_si256(_mm256_xor_si256(acc, _mm256_srli_epi64(acc, 47)), keys);
    __m256i high = _mm256_mul_epu32(_mm256_srli_epi64(acc, 32), prime);
    return _mm256_add_epi64(_mm256_mul_epu32(acc, prime), _mm256_slli_epi64(high, 32));
}

__attribute__((target("avx2"))) static void take_in_avx2(
    uint64_t *acc, const uint8_t *data, const uint8_t *secret, size_t num_blocks, size_t rest
) {
    __m256i low = _mm256_loadu_si256((const __m256i *)acc);
    __m256i high = _mm256_loadu_si256((const __m256i *)acc + 1);
    for (size_t block = 0; block <= num_blocks; block++) {
        size_t count = block < num_blocks ? BLOCK_STRIPES : rest;
        for (size_t stripe = 0; stripe < count; stripe++, data += STRIPE) {
            low = mixed_avx2(low, data, secret + 8 * stripe);
            high = mixed_avx2(high, data + 32, secret + 8 * stripe + 32);
        }
        if (block < num_blocks) {
            low = scrambled_avx2(low, secret + LAST);
            high = scrambled_avx2(high, secret + LAST + 32);
        }
    }
    _mm256_storeu_si256((__m256i *)acc, low);
    _mm256_storeu_si256((__m256i *)acc + 1, high);
}

__attribute__((target("avx512f"))) static void take_in_avx512(
    uint64_t *acc, const uint8_t *data, const uint8_t *secret, size_t num_blocks, size_t rest
) {
    const __m512i prime = _mm512_set1_epi64((long long)P32_1);
    __m512i lanes = _mm512_loadu_si512(acc), keys = _mm512_loadu_si512(secret + LAST);
    for (size_t block = 0; block <= num_blocks; block++) {
        size_t count = block < num_blocks ? BLOCK_STRIPES : rest;
        for (size_t stripe = 0; stripe < count; stripe++, data += STRIPE) {
            __m512i values = _mm512_loadu_si512(data);
            __m512i mixed = _mm512_xor_si512(values, _mm512_loadu_si512(secret + 8 * stripe));
            __m512i swapped = _mm512_shuffle_epi32(values, (_MM_PERM_ENUM)0x4E);
            mixed = _mm512_mul_epu32(mixed, _mm512_srli_epi64(mixed, 32));
            lanes = _mm512_add_epi64(lanes, _mm512_add_epi64(mixed, swapped));
        }
        if (block < num_blocks) {
            lanes = _mm512_xor_si512(_mm512_xor_si512(lanes, _mm512_srli_epi64(lanes, 47)), keys);
            __m512i high = _mm512_mul_epu32(_mm512_srli_epi64(lanes, 32), prime);
            lanes = _mm512_add_epi64(_mm512_mul_epu32(lanes, prime), _mm512_slli_epi64(high, 32));
        }
    }
    _mm512_storeu_si512(acc, lanes);
}
#endif

static taking_in *take_in = take_in_words;

static void choose_vectors(void) {
#if HAS_VECTORS
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f"))
        take_in = take_in_avx512;
    else if (__builtin_cpu_supports("avx2"))
        take_in = take_in_avx2;
#endif
}

static uint64_t folded_product(uint64_t left, uint64_t right) {
    unsigned __int128 product = (unsigned __int128)left * right;
    return (uint64_t)product ^ (uint64_t)(product >> 64);
}

static uint64_t avalanche(uint64_t value) {
    value = (value ^ (value >> 37)) * 0x165667919E3779F9ULL;
    return value ^ (value >> 32);
}

/* Takes `size` > 240 bytes into 8 lanes. */
static void take_in_all(uint64_t *acc, const uint8_t *data, size_t size, const uint8_t *secret) {
    static const uint64_t begin[LANES] = {P32_3, P64_1, P64_2, P64_3, P64_4, P32_2, P64_5, P32_1};
    const size_t block = BLOCK_STRIPES * STRIPE;
    memcpy(acc, begin, sizeof begin);
    take_in(acc, data, secret, (size - 1) / block, (size - 1) % block / STRIPE);
    take_in(acc, data + size - STRIPE, secret + LAST - 7, 0, 1);
}

static uint64_t merged(const uint64_t *acc, const uint8_t *secret, uint64_t sum) {
    for (int pair = 0; pair < LANES / 2; pair++) {
        const uint8_t *keys = secret + 16 * pair;
        sum += folded_product(acc[2 * pair] ^ word(keys), acc[2 * pair + 1] ^ word(keys + 8));
    }
    return avalanche(sum);
}

/* XXH3-64 of `size` > 240 bytes. */
static uint64_t hash_of(const uint8_t *data, size_t size, uint64_t seed) {
    uint64_t words[SECRET_WORDS], acc[LANES];
    const uint8_t *secret = (const uint8_t *)words;
    for (int at = 0; at < SECRET_WORDS; at++)
        words[at] = at % 2 ? SECRET[at] - seed : SECRET[at] + seed;
    take_in_all(acc, data, size, secret);
    return merged(acc, secret + 11, size * P64_1);
}

typedef struct {
    uint64_t low, high;
} digest;

static digest product(uint64_t left, uint64_t right) {
    unsigned __int128 whole = (unsigned __int128)left * right;
    return (digest){(uint64_t)whole, (uint64_t)(whole >> 64)};
}

/* Words of the secret, from a byte of it on, that keys of short inputs are made of. */
static uint64_t flips(const uint8_t *secret) { return word(secret) ^ word(secret + 8); }

static uint32_t half_word(const uint8_t *at) {
    uint32_t value;
    memcpy(&value, at, sizeof value);
    return value;
}

static uint64_t avalanche_of_few(uint64_t value) {
    value = (value ^ (value >> 33)) * P64_2;
    value = (value ^ (value >> 29)) * P64_3;
    return value ^ (value >> 32);
}

/* XXH3-128 of 1 to 16 bytes. */
static digest digest_of_few(const uint8_t *data, size_t size, const uint8_t *secret) {
    if (size < 4) {
        uint32_t low = (uint32_t)data[0] << 16 | (uint32_t)data[size >> 1] << 24 | data[size - 1];
        low |= (uint32_t)size << 8;
        uint32_t swapped = __builtin_bswap32(low);
        uint32_t high = swapped << 13 | swapped >> 19;
        uint32_t low_flip = half_word(secret) ^ half_word(secret + 4);
        uint32_t high_flip = half_word(secret + 8) ^ half_word(secret + 12);
        return (digest){avalanche_of_few(low ^ low_flip), avalanche_of_few(high ^ high_flip)};
    }
    if (size < 9) {
        uint64_t both = half_word(data) | (uint64_t)half_word(data + size - 4) << 32;
        digest found = product(both ^ flips(secret + 16), P64_1 + (size << 2));
        found.high += found.low << 1;
        found.low ^= found.high >> 3;
        found.low = (found.low ^ (found.low >> 35)) * 0x9FB21C651E98DF25ULL;
        found.low ^= found.low >> 28;
        return (digest){found.low, avalanche(found.high)};
    }
    uint64_t first = word(data), last = word(data + size - 8);
    digest mixed = product(first ^ last ^ flips(secret + 32), P64_1);
    mixed.low += (uint64_t)(size - 1) << 54;
    last ^= flips(secret + 48);
    mixed.high += last + (last & 0xFFFFFFFFU) * (P32_2 - 1);
    mixed.low ^= __builtin_bswap64(mixed.high);
    digest found = product(mixed.low, P64_2);
    found.high += mixed.high * P64_2;
    return (digest){avalanche(found.low), avalanche(found.high)};
}

static uint64_t mixed_16(const uint8_t *data, const uint8_t *secret) {
    return folded_product(word(data) ^ word(secret), word(data + 8) ^ word(secret + 8));
}

static void take_in_32(digest *acc, const uint8_t *left, const uint8_t *right, const uint8_t *secret) {
    acc->low = (acc->low + mixed_16(left, secret)) ^ (word(right) + word(right + 8));
    acc->high = (acc->high + mixed_16(right, secret + 16)) ^ (word(left) + word(left + 8));
}

/* XXH3-128 of 1 byte or more, with seed 0. */
static digest digest_of(const uint8_t *data, size_t size) {
    const uint8_t *secret = (const uint8_t *)SECRET;
    digest acc = {size * P64_1, 0};
    if (size <= 16)
        return digest_of_few(data, size, secret);
    if (size > 240) {
        uint64_t lanes[LANES];
        take_in_all(lanes, data, size, secret);
        uint64_t low = merged(lanes, secret + 11, size * P64_1);
        return (digest){low, merged(lanes, secret + LAST - 11, ~(size * P64_2))};
    }
    if (size <= 128) {
        for (size_t part = (size - 1) / 32 + 1; part-- > 0;)
            take_in_32(&acc, data + 16 * part, data + size - 16 * (part + 1), secret + 32 * part);
    } else {
        for (size_t at = 0; at < 128; at += 32)
            take_in_32(&acc, data + at, data + at + 16, secret + at);
        acc = (digest){avalanche(acc.low), avalanche(acc.high)};
        for (size_t at = 128; at + 32 <= size; at += 32)
            take_in_32(&acc, data + at, data + at + 16, secret + 3 + at - 128);
        take_in_32(&acc, data + size - 16, data + size - 32, secret + 103);
    }
    uint64_t high = acc.low * P64_1 + acc.high * P64_4 + size * P64_2;
    return (digest){avalanche(acc.low + acc.high), 0 - avalanche(high)};
}
