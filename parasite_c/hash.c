/*
 * The store's hashes: keyed BLAKE3 (all lanes of the widest vector unit that the CPU has, chosen at run time), and the
 * digest that is made of PH and BLAKE3.
 *
 * PH (NH of Black et al., UMAC, CRYPTO '99, with carry-less multiplication: Lemire and Kaser, "Faster 64-bit universal hashing
 * using carry-less multiplications", 2016) reads a block at memory speed: pairs of 64-bit words, twice, under two
 * independent keys. Two different blocks have the same PH with probability 2^-128 at most, whoever chose
 * the blocks, as long as the keys are not known to them: of the first pair that differs, one word of the key is multiplied by a
 * difference that is not zero, in a ring without zero divisors, so one value of it in 2^64 fits; and so for the other key. BLAKE3 under the
 * same secret makes an evenly spread value of it that tells nothing of the keys: hash-then-PRF, the construction of UMAC.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <immintrin.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include "hash.h"

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, KEYED_HASH = 16 };

static const uint32_t blake3_iv[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
				      0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

/* BLAKE3's mixing step, on words or on vectors of them. */
#define ROTR(x, n) (((x) >> (n)) | ((x) << (32 - (n))))
#define G(a, b, c, d, x, y)                                                                                            \
	do {                                                                                                           \
		v[a] += v[b] + (x);                                                                                    \
		v[d] = ROTR(v[d] ^ v[a], 16);                                                                          \
		v[c] += v[d];                                                                                          \
		v[b] = ROTR(v[b] ^ v[c], 12);                                                                          \
		v[a] += v[b] + (y);                                                                                    \
		v[d] = ROTR(v[d] ^ v[a], 8);                                                                           \
		v[c] += v[d];                                                                                          \
		v[b] = ROTR(v[b] ^ v[c], 7);                                                                           \
	} while (0)

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,prefer-vector-width=512")
#define W 16
#define LANES(name) avx512_##name
#include "hash_lanes.h"
#undef W
#undef LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2")
#define W 8
#define LANES(name) avx2_##name
#include "hash_lanes.h"
#undef W
#undef LANES
#pragma GCC pop_options

#define W 4
#define LANES(name) sse2_##name
#include "hash_lanes.h"
#undef W
#undef LANES

typedef void many_fn(const uint8_t *const *in, size_t nr, size_t nr_blocks, const uint32_t key[8],
		     const uint64_t *counter, uint32_t flags, uint32_t flags_start, uint32_t flags_end,
		     uint8_t *const *out);
typedef void block_fn(const uint64_t *key, const uint8_t *block, uint8_t *out);

/*
 * PH of one block of 4096 bytes: 32 bytes. X: bits of a vector; each 128 of it are a pair. Four sums per key, because a sum
 * has to wait for the one before it.
 */
#define PH_VECTORS(name, vec, load, xor, clmul, store)                                                                 \
	static void name(const uint64_t *key, const uint8_t *block, uint8_t *out)                                      \
	{                                                                                                              \
		enum { STEP = sizeof(vec), WORDS = STEP / 8 };                                                         \
		vec one[2] = {{0}}, two[2] = {{0}};                                                                    \
		uint64_t parts[2][WORDS];                                                                              \
                                                                                                                       \
		for (int at = 0; at < SNAP_PAGE; at += 2 * STEP) {                                                     \
			for (int i = 0; i < 2; i++) {                                                                  \
				const uint64_t *k = key + at / 8 + i * WORDS;                                          \
				vec data = load((const void *)(block + at + i * STEP));                                \
				vec x = xor(data, load((const void *)k));                                              \
				vec y = xor(data, load((const void *)(k + SNAP_PAGE / 8)));                            \
                                                                                                                       \
				one[i] = xor(one[i], clmul(x, x, 1));                                                  \
				two[i] = xor(two[i], clmul(y, y, 1));                                                  \
			}                                                                                              \
		}                                                                                                      \
		store((void *)parts[0], xor(one[0], one[1]));                                                          \
		store((void *)parts[1], xor(two[0], two[1]));                                                          \
		ph_join(parts[0], parts[1], WORDS, out);                                                               \
	}

static void ph_join(const uint64_t *one, const uint64_t *two, int nr_words, uint8_t *out)
{
	uint64_t sums[4] = {0};

	for (int i = 0; i < nr_words; i += 2) {
		sums[0] ^= one[i];
		sums[1] ^= one[i + 1];
		sums[2] ^= two[i];
		sums[3] ^= two[i + 1];
	}
	memcpy(out, sums, sizeof(sums));
}

#pragma GCC push_options
#pragma GCC target("avx512f,vpclmulqdq,prefer-vector-width=512")
PH_VECTORS(ph_512, __m512i, _mm512_loadu_si512, _mm512_xor_si512, _mm512_clmulepi64_epi128, _mm512_storeu_si512)
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,vpclmulqdq")
PH_VECTORS(ph_256, __m256i, _mm256_loadu_si256, _mm256_xor_si256, _mm256_clmulepi64_epi128, _mm256_storeu_si256)
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("sse2,pclmul")
PH_VECTORS(ph_128, __m128i, _mm_loadu_si128, _mm_xor_si128, _mm_clmulepi64_si128, _mm_storeu_si128)
#pragma GCC pop_options

/* The same, for a CPU of before 2010: some 300 MB/s. */
static void ph_words(const uint64_t *key, const uint8_t *block, uint8_t *out)
{
	uint64_t sums[4] = {0};

	for (int i = 0; i < SNAP_PAGE / 8; i += 2) {
		uint64_t data[2];

		memcpy(data, block + i * 8, sizeof(data));
		for (int pass = 0; pass < 2; pass++) {
			const uint64_t *k = key + i + pass * SNAP_PAGE / 8;
			uint64_t x = data[0] ^ k[0], y = data[1] ^ k[1];

			sums[2 * pass] ^= -(y & 1) & x;
			for (int bit = 1; bit < 64; bit++) {
				uint64_t mask = -(y >> bit & 1);

				sums[2 * pass] ^= mask & x << bit;
				sums[2 * pass + 1] ^= mask & x >> (64 - bit);
			}
		}
	}
	memcpy(out, sums, sizeof(sums));
}

static many_fn *hash_many;
static block_fn *ph_block;
static const char *hash_variant;

/* 0: nothing that not every x86-64 has, 1: at most AVX2, 2: AVX-512. Returns -1 when the CPU lacks it; tests compare all that it has. */
int snap_hash_select(int variant)
{
	__builtin_cpu_init();
	if (variant >= 2) {
		if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
		    !__builtin_cpu_supports("avx512bw"))
			return -1;
		hash_variant = "avx512";
		hash_many = avx512_many;
		ph_block = __builtin_cpu_supports("vpclmulqdq") ? ph_512 : ph_128;
	} else if (variant == 1) {
		if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("pclmul"))
			return -1;
		hash_variant = "avx2";
		hash_many = avx2_many;
		ph_block = __builtin_cpu_supports("vpclmulqdq") ? ph_256 : ph_128;
	} else {
		hash_variant = "sse2";
		hash_many = sse2_many;
		ph_block = ph_words;
	}
	return 0;
}

__attribute__((constructor)) static void snap_hash_best(void)
{
	if (snap_hash_select(2) == 0 || snap_hash_select(1) == 0)
		return;
	snap_hash_select(0);
	if (__builtin_cpu_supports("pclmul"))
		ph_block = ph_128;
}

const char *snap_hash_variant(void)
{
	return hash_variant;
}

/* One block of one input: the tail of a message that is not a whole number of chunks. */
static void compress(uint32_t cv[8], const uint8_t *data, uint32_t size, uint64_t counter, uint32_t flags)
{
	static const uint8_t permutation[16] = {2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8};
	uint32_t m[16] = {0}, next[16], v[16];

	memcpy(m, data, size);
	memcpy(v, cv, 32);
	memcpy(v + 8, blake3_iv, 16);
	v[12] = (uint32_t)counter;
	v[13] = (uint32_t)(counter >> 32);
	v[14] = size;
	v[15] = flags;
	for (int round = 0; round < 7; round++) {
		G(0, 4, 8, 12, m[0], m[1]);
		G(1, 5, 9, 13, m[2], m[3]);
		G(2, 6, 10, 14, m[4], m[5]);
		G(3, 7, 11, 15, m[6], m[7]);
		G(0, 5, 10, 15, m[8], m[9]);
		G(1, 6, 11, 12, m[10], m[11]);
		G(2, 7, 8, 13, m[12], m[13]);
		G(3, 4, 9, 14, m[14], m[15]);
		for (int i = 0; i < 16; i++)
			next[i] = m[permutation[i]];
		memcpy(m, next, sizeof(m));
	}
	for (int i = 0; i < 8; i++)
		cv[i] = v[i] ^ v[i + 8];
}

/* A chunk of 0..1024 bytes, with `last` added to the flags of its last block. */
static void hash_chunk(const uint32_t key[8], const uint8_t *data, size_t size, uint64_t counter, uint32_t last,
		       uint8_t *out)
{
	uint32_t cv[8], flags = KEYED_HASH | CHUNK_START;

	memcpy(cv, key, 32);
	while (size > 64) {
		compress(cv, data, 64, counter, flags);
		flags = KEYED_HASH;
		data += 64;
		size -= 64;
	}
	compress(cv, data, (uint32_t)size, counter, flags | CHUNK_END | last);
	memcpy(out, cv, 32);
}

/* Keyed BLAKE3 of any message: 32 bytes to out. -1: out of memory. */
int snap_blake3(const uint8_t *key, const uint8_t *data, size_t size, uint8_t *out)
{
	enum { GROUP = 64 };
	size_t nr_full = size ? (size - 1) / 1024 : 0; /* the last chunk, whole or not, goes alone */
	size_t nr = nr_full + 1;
	uint32_t words[8];
	uint8_t *cvs;

	memcpy(words, key, 32);
	if (nr == 1) {
		hash_chunk(words, data, size, 0, ROOT, out);
		return 0;
	}
	cvs = malloc(nr * 32);
	if (!cvs)
		return -1;
	for (size_t base = 0; base < nr_full; base += GROUP) {
		size_t count = nr_full - base < GROUP ? nr_full - base : GROUP;
		const uint8_t *in[GROUP];
		uint64_t counter[GROUP];
		uint8_t *outs[GROUP];

		for (size_t i = 0; i < count; i++) {
			in[i] = data + (base + i) * 1024;
			counter[i] = base + i;
			outs[i] = cvs + (base + i) * 32;
		}
		hash_many(in, count, 16, words, counter, KEYED_HASH, CHUNK_START, CHUNK_END, outs);
	}
	hash_chunk(words, data + nr_full * 1024, size - nr_full * 1024, nr_full, 0, cvs + nr_full * 32);
	/* Joining neighbours level by level, an odd one going up as it is, gives BLAKE3's left-complete tree. */
	while (nr > 1) {
		size_t pairs = nr / 2;

		for (size_t base = 0; base < pairs; base += GROUP) {
			size_t count = pairs - base < GROUP ? pairs - base : GROUP;
			const uint8_t *in[GROUP];
			uint8_t *outs[GROUP], joined[GROUP][32];

			for (size_t i = 0; i < count; i++) {
				in[i] = cvs + (base + i) * 64;
				outs[i] = joined[i];
			}
			hash_many(in, count, 1, words, NULL, KEYED_HASH | PARENT | (nr == 2 ? ROOT : 0), 0, 0, outs);
			memcpy(cvs + base * 32, joined, count * 32);
		}
		if (nr & 1)
			memcpy(cvs + pairs * 32, cvs + (nr - 1) * 32, 32);
		nr = pairs + (nr & 1);
	}
	memcpy(out, cvs, 32);
	free(cvs);
	return 0;
}

/* Key material for PH out of the secret: BLAKE3 in counter mode under a label of its own. */
int snap_hash_init(snap_hash_key *key, const uint8_t *secret)
{
	uint8_t *out = (uint8_t *)key->ph;

	memcpy(key->words, secret, 32);
	for (uint64_t i = 0; i < sizeof(key->ph) / 32; i++) {
		uint8_t message[16] = "snap ph";

		memcpy(message + 8, &i, 8);
		if (snap_blake3(secret, message, sizeof(message), out + i * 32) < 0)
			return -1;
	}
	return 0;
}

/* `slots`: where the message's blocks lie in `data`; NULL: one after the other. */
static int digest(const snap_hash_key *key, const uint8_t *data, const uint32_t *slots, size_t size, uint8_t *out)
{
	size_t nr_full = size / SNAP_PAGE, rest = size % SNAP_PAGE, total = 32 * (1 + nr_full + (rest != 0));
	uint64_t size_word = size;
	uint8_t whole[32], *message = calloc(1, total);
	int result;

	if (!message)
		return -1;
	memcpy(message, &size_word, 8);
	for (size_t i = 0; i < nr_full; i++)
		ph_block(key->ph, data + (slots ? slots[i] : i) * SNAP_PAGE, message + 32 * (i + 1));
	if (rest) {
		uint8_t last[SNAP_PAGE] = {0};

		memcpy(last, data + nr_full * SNAP_PAGE, rest);
		ph_block(key->ph, last, message + 32 * (nr_full + 1));
	}
	result = snap_blake3((const uint8_t *)key->words, message, total, whole);
	free(message);
	memcpy(out, whole, SNAP_KEY);
	return result;
}

/*
 * Digest of any message, 16 bytes: keyed BLAKE3 of a header of 32 bytes (the size in the first 8, zeroes) and the PH of each
 * block, the last one filled up with zeroes. -1: out of memory.
 */
int snap_digest(const snap_hash_key *key, const uint8_t *data, size_t size, uint8_t *out)
{
	return digest(key, data, NULL, size, out);
}

/* The same of whole pages, those in these slots of `pages`. */
int snap_digest_pages(const snap_hash_key *key, const uint8_t *pages, const uint32_t *slots, size_t nr, uint8_t *out)
{
	return digest(key, pages, slots, nr * SNAP_PAGE, out);
}

/* The same for at most SNAP_PAGE_GROUP whole pages, anywhere, side by side. */
void snap_hash_page_group(const snap_hash_key *key, const uint8_t *const *pages, size_t nr, uint8_t (*keys)[SNAP_KEY])
{
	const uint8_t *in[SNAP_PAGE_GROUP] = {0};
	uint64_t counter[SNAP_PAGE_GROUP] = {0};
	uint8_t *out[SNAP_PAGE_GROUP] = {0};
	uint8_t messages[SNAP_PAGE_GROUP][64] = {{0}}, roots[SNAP_PAGE_GROUP][32];

	for (size_t i = 0; i < nr; i++) {
		uint64_t size = SNAP_PAGE;

		memcpy(messages[i], &size, 8);
		ph_block(key->ph, pages[i], messages[i] + 32);
		in[i] = messages[i];
		out[i] = roots[i];
	}
	hash_many(in, nr, 1, key->words, counter, KEYED_HASH | ROOT, CHUNK_START, CHUNK_END, out);
	for (size_t i = 0; i < nr; i++)
		memcpy(keys[i], roots[i], SNAP_KEY);
}

void snap_hash_pages(const snap_hash_key *key, const uint8_t *pages, size_t nr_pages, uint8_t *keys)
{
	for (size_t base = 0; base < nr_pages; base += SNAP_PAGE_GROUP) {
		size_t count = nr_pages - base < SNAP_PAGE_GROUP ? nr_pages - base : SNAP_PAGE_GROUP;
		const uint8_t *group[SNAP_PAGE_GROUP];

		for (size_t i = 0; i < count; i++)
			group[i] = pages + (base + i) * SNAP_PAGE;
		snap_hash_page_group(key, group, count, (uint8_t(*)[SNAP_KEY])(keys + base * SNAP_KEY));
	}
}
