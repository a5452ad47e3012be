/*
 * Pages as byte planes: of all 8-byte words of a frame first the lowest bytes, then the second lowest, and so on.
 *
 * Memory is mostly words that differ from their neighbours in their low bytes only (pointers, counters, floating point numbers of
 * similar size). As planes the bytes that are alike stand together, which zstd finds sooner and makes less of. Called through
 * cffi without the GIL; sizes are checked by the caller, slots here.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <immintrin.h>
#include <stddef.h>
#include <stdint.h>

#include "planes_cdef.h"

enum { PAGE_WORDS = 512, STEP = 16 }; /* words; sixteen of them are eight vectors */

/*
 * One round of a perfect shuffle: of the bits that number a byte (register, then place in it) the uppermost one of the place
 * becomes the register's bit `bit`, and that one the lowest of the place.
 */
static inline __attribute__((always_inline)) void shuffle_round(__m128i x[8], int bit)
{
#pragma GCC unroll 8
	for (int i = 0; i < 8; i++) {
		__m128i low, high;

		if (i & bit)
			continue;
		low = _mm_unpacklo_epi8(x[i], x[i | bit]);
		high = _mm_unpackhi_epi8(x[i], x[i | bit]);
		x[i] = low;
		x[i | bit] = high;
	}
}

/* Bytes of words, numbered [e3 e2 e1] [e0 b2 b1 b0], become bytes of planes, [b0 b2 b1] [e3 e2 e1 e0]. */
static const uint8_t plane_of_register[8] = {0, 2, 4, 6, 1, 3, 5, 7};

static void to_planes_128(uint8_t *planes, const uint8_t *pages, size_t nr_words)
{
	for (size_t word = 0; word < nr_words; word += STEP) {
		__m128i x[8];

#pragma GCC unroll 8
		for (int i = 0; i < 8; i++)
			x[i] = _mm_loadu_si128((const __m128i *)(pages + word * 8 + (size_t)i * 16));
		shuffle_round(x, 4);
		shuffle_round(x, 2);
		shuffle_round(x, 1);
		shuffle_round(x, 4);
#pragma GCC unroll 8
		for (int i = 0; i < 8; i++)
			_mm_storeu_si128((__m128i *)(planes + plane_of_register[i] * nr_words + word), x[i]);
	}
}

/* The same for 64 words at a time: bytes of eight words into order, then eight such vectors as a matrix of 8 x 8 parts turned over. */
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vbmi")
static void to_planes_512(uint8_t *planes, const uint8_t *pages, size_t nr_words)
{
	uint8_t bytes[64];
	__m512i order;

	for (int i = 0; i < 64; i++)
		bytes[i] = (uint8_t)(i % 8 * 8 + i / 8);
	order = _mm512_loadu_si512(bytes);
	for (size_t word = 0; word < nr_words; word += 64) {
		__m512i x[8], y[8];

#pragma GCC unroll 8
		for (int i = 0; i < 8; i++)
			x[i] = _mm512_permutexvar_epi8(order,
						       _mm512_loadu_si512(pages + word * 8 + (size_t)i * 64));
#pragma GCC unroll 8
		for (int i = 0; i < 8; i += 2) {
			y[i] = _mm512_unpacklo_epi64(x[i], x[i + 1]); /* planes 0, 2, 4, 6 of 16 words */
			y[i + 1] = _mm512_unpackhi_epi64(x[i], x[i + 1]);
		}
#pragma GCC unroll 2
		for (int odd = 0; odd < 2; odd++) {
			/* planes 0 and 4, planes 2 and 6, of 32 words */
			__m512i a = _mm512_shuffle_i64x2(y[odd], y[2 + odd], 0x88);
			__m512i b = _mm512_shuffle_i64x2(y[odd], y[2 + odd], 0xdd);
			__m512i c = _mm512_shuffle_i64x2(y[4 + odd], y[6 + odd], 0x88);
			__m512i d = _mm512_shuffle_i64x2(y[4 + odd], y[6 + odd], 0xdd);
			uint8_t *out = planes + (size_t)odd * nr_words + word;

			_mm512_storeu_si512(out, _mm512_shuffle_i64x2(a, c, 0x88));
			_mm512_storeu_si512(out + 4 * nr_words, _mm512_shuffle_i64x2(a, c, 0xdd));
			_mm512_storeu_si512(out + 2 * nr_words, _mm512_shuffle_i64x2(b, d, 0x88));
			_mm512_storeu_si512(out + 6 * nr_words, _mm512_shuffle_i64x2(b, d, 0xdd));
		}
	}
}
#pragma GCC pop_options

static int wide;

/* 0: what every x86-64 has, 1: AVX-512 with VBMI. Returns -1 when the CPU lacks it; tests compare both. */
int snap_planes_select(int variant)
{
	__builtin_cpu_init();
	if (variant && !(__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vbmi")))
		return -1;
	wide = variant;
	return 0;
}

__attribute__((constructor)) static void snap_planes_best(void)
{
	snap_planes_select(1);
}

void snap_to_planes(uint8_t *planes, const uint8_t *pages, size_t nr_pages)
{
	(wide ? to_planes_512 : to_planes_128)(planes, pages, nr_pages * PAGE_WORDS);
}

int snap_from_planes(uint8_t *pages, const uint8_t *planes, size_t nr_pages, const uint32_t *slots, size_t nr_slots)
{
	size_t nr_words = nr_pages * PAGE_WORDS;

	for (size_t slot = 0; slot < nr_slots; slot++) {
		const uint8_t *from = planes + (size_t)slots[slot] * PAGE_WORDS;

		if (slots[slot] >= nr_pages)
			return -1;
		for (size_t word = 0; word < PAGE_WORDS; word += STEP, pages += STEP * 8) {
			__m128i x[8];

#pragma GCC unroll 8
			for (int i = 0; i < 8; i++)
				x[i] = _mm_loadu_si128((const __m128i *)(from + (size_t)i * nr_words + word));
			shuffle_round(x, 4);
			shuffle_round(x, 2);
			shuffle_round(x, 1);
#pragma GCC unroll 8
			for (int i = 0; i < 8; i++)
				_mm_storeu_si128((__m128i *)(pages + (size_t)i * 16), x[i]);
		}
	}
	return 0;
}
