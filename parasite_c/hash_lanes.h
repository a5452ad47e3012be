/*
 * BLAKE3 compression of W inputs side by side, one per 32-bit lane, in GCC vector extensions.
 *
 * Included once per instruction set by hash.c with W (lanes), LANES(name) (the suffix) and the target set by
 * a pragma around the include, and with the mixing step G of hash.c. Written from the BLAKE3 paper (section 2, O'Connor et al. 2020).
 */

typedef uint32_t LANES(vec) __attribute__((vector_size(W * 4), aligned(W * 4)));
typedef uint32_t LANES(uvec) __attribute__((vector_size(W * 4), aligned(1), may_alias));

/* Interleaves the low and high halves of two vectors; log2(W) rounds of it transpose a W x W matrix. */
static const LANES(vec) LANES(zip_lo) = {
#if W == 16
	0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#elif W == 8
	0, 8, 1, 9, 2, 10, 3, 11
#else
	0, 4, 1, 5
#endif
};
static const LANES(vec) LANES(zip_hi) = {
#if W == 16
	8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31
#elif W == 8
	4, 12, 5, 13, 6, 14, 7, 15
#else
	2, 6, 3, 7
#endif
};

#define ROUND(s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11, s12, s13, s14, s15)                                    \
	do {                                                                                                           \
		G(0, 4, 8, 12, m[s0], m[s1]);                                                                          \
		G(1, 5, 9, 13, m[s2], m[s3]);                                                                          \
		G(2, 6, 10, 14, m[s4], m[s5]);                                                                         \
		G(3, 7, 11, 15, m[s6], m[s7]);                                                                         \
		G(0, 5, 10, 15, m[s8], m[s9]);                                                                         \
		G(1, 6, 11, 12, m[s10], m[s11]);                                                                       \
		G(2, 7, 8, 13, m[s12], m[s13]);                                                                        \
		G(3, 4, 9, 14, m[s14], m[s15]);                                                                        \
	} while (0)

/* Hashes W inputs of nr_blocks 64-byte blocks each into W chaining values. */
static void LANES(hash)(const uint8_t *const in[W], size_t nr_blocks, const uint32_t key[8], const uint64_t counter[W],
			uint32_t flags, uint32_t flags_start, uint32_t flags_end, uint8_t *const out[W])
{
	LANES(vec) h[8], counter_lo, counter_hi;

	for (int i = 0; i < 8; i++)
		h[i] = key[i] - (LANES(vec)){0};
	for (int i = 0; i < W; i++) {
		counter_lo[i] = (uint32_t)counter[i];
		counter_hi[i] = (uint32_t)(counter[i] >> 32);
	}
	for (size_t block = 0; block < nr_blocks; block++) {
		LANES(vec) m[16], v[16], t[W];
		uint32_t f = flags | (block == 0 ? flags_start : 0) | (block == nr_blocks - 1 ? flags_end : 0);

		for (int part = 0; part < 16 / W; part++) {
			LANES(vec) *r = m + part * W;

			for (int i = 0; i < W; i++)
				r[i] = *(const LANES(uvec) *)(in[i] + block * 64 + part * W * 4);
			for (int step = 1; step < W; step *= 2) {
				for (int i = 0; i < W / 2; i++) {
					t[2 * i] = __builtin_shuffle(r[i], r[i + W / 2], LANES(zip_lo));
					t[2 * i + 1] = __builtin_shuffle(r[i], r[i + W / 2], LANES(zip_hi));
				}
				for (int i = 0; i < W; i++)
					r[i] = t[i];
			}
		}
		for (int i = 0; i < 8; i++)
			v[i] = h[i];
		for (int i = 0; i < 4; i++)
			v[8 + i] = blake3_iv[i] - (LANES(vec)){0};
		v[12] = counter_lo;
		v[13] = counter_hi;
		v[14] = 64 - (LANES(vec)){0};
		v[15] = f - (LANES(vec)){0};
		ROUND(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
		ROUND(2, 6, 3, 10, 7, 0, 4, 13, 1, 11, 12, 5, 9, 14, 15, 8);
		ROUND(3, 4, 10, 12, 13, 2, 7, 14, 6, 5, 9, 0, 11, 15, 8, 1);
		ROUND(10, 7, 12, 9, 14, 3, 13, 15, 4, 0, 11, 2, 5, 8, 1, 6);
		ROUND(12, 13, 9, 11, 15, 10, 14, 8, 7, 2, 5, 3, 0, 1, 6, 4);
		ROUND(9, 14, 11, 5, 8, 12, 15, 1, 13, 3, 0, 10, 2, 6, 4, 7);
		ROUND(11, 15, 5, 0, 1, 9, 8, 6, 14, 10, 2, 12, 3, 4, 7, 13);
		for (int i = 0; i < 8; i++)
			h[i] = v[i] ^ v[i + 8];
	}
	for (int lane = 0; lane < W; lane++) {
		uint32_t words[8];

		for (int i = 0; i < 8; i++)
			words[i] = h[i][lane];
		memcpy(out[lane], words, 32);
	}
}

/* Any number of inputs; spare lanes of the last group repeat its first input into a sink. */
static void LANES(many)(const uint8_t *const *in, size_t nr, size_t nr_blocks, const uint32_t key[8],
			const uint64_t *counter, uint32_t flags, uint32_t flags_start, uint32_t flags_end,
			uint8_t *const *out)
{
	uint8_t sink[32];

	for (size_t base = 0; base < nr; base += W) {
		const uint8_t *group_in[W];
		uint64_t group_counter[W];
		uint8_t *group_out[W];

		for (size_t i = 0; i < W; i++) {
			int spare = base + i >= nr;

			group_in[i] = in[spare ? base : base + i];
			group_counter[i] = counter ? counter[spare ? base : base + i] : 0;
			group_out[i] = spare ? sink : out[base + i];
		}
		LANES(hash)(group_in, nr_blocks, key, group_counter, flags, flags_start, flags_end, group_out);
	}
}

#undef ROUND
