/*
 * Page helpers of the store, called through cffi without the GIL: keyed hash, staging, key tables.
 *
 * Owns: keyed BLAKE3 (all lanes of the widest vector unit that the CPU has, chosen at run time), the zero
 * test, lookup in sorted key tables, the table of pages that one take has seen so far, gathering of pages.
 * Does no I/O but sync_file_range, and knows neither files nor formats: bounds of everything it is handed are
 * checked by the caller, except the contents of key tables, which may be damaged and are checked here.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define SNAP_PAGE 4096
#define SNAP_KEY 16

typedef struct {
	const uint8_t *keys;	/* nr_keys * 16 bytes, ascending */
	const uint64_t *locs;
	const uint32_t *fanout; /* (1 << fanout_bits) + 1 entries: first index of each prefix */
	uint64_t nr_keys;
	uint32_t fanout_bits;
} snap_table;

enum { CHUNK_START = 1, CHUNK_END = 2, PARENT = 4, ROOT = 8, KEYED_HASH = 16 };

static const uint32_t blake3_iv[8] = {0x6A09E667, 0xBB67AE85, 0x3C6EF372, 0xA54FF53A,
				      0x510E527F, 0x9B05688C, 0x1F83D9AB, 0x5BE0CD19};

#pragma GCC push_options
#pragma GCC target("avx512f,avx512vl,avx512bw,prefer-vector-width=512")
#define W 16
#define LANES(name) avx512_##name
#include "pages_lanes.h"
#undef W
#undef LANES
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2")
#define W 8
#define LANES(name) avx2_##name
#include "pages_lanes.h"
#undef W
#undef LANES
#pragma GCC pop_options

#define W 4
#define LANES(name) sse2_##name
#include "pages_lanes.h"
#undef W
#undef LANES

typedef void many_fn(const uint8_t *const *in, size_t nr, size_t nr_blocks, const uint32_t key[8],
		     const uint64_t *counter, uint32_t flags, uint32_t flags_start, uint32_t flags_end,
		     uint8_t *const *out);

static many_fn *hash_many;
static int hash_variant;

/* 0: SSE2, 1: AVX2, 2: AVX-512. Returns -1 when the CPU lacks it; tests compare all that it has. */
int snap_hash_select(int variant)
{
	__builtin_cpu_init();
	if (variant >= 2) {
		if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512vl") ||
		    !__builtin_cpu_supports("avx512bw"))
			return -1;
		hash_variant = 2;
		hash_many = avx512_many;
	} else if (variant == 1) {
		if (!__builtin_cpu_supports("avx2"))
			return -1;
		hash_variant = 1;
		hash_many = avx2_many;
	} else {
		hash_variant = 0;
		hash_many = sse2_many;
	}
	return 0;
}

__attribute__((constructor)) static void snap_hash_best(void)
{
	if (snap_hash_select(2) < 0 && snap_hash_select(1) < 0)
		snap_hash_select(0);
}

const char *snap_hash_variant(void)
{
	static const char *const names[] = {"sse2", "avx2", "avx512"};

	return names[hash_variant];
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
#undef G
#undef ROTR
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

enum { PAGE_GROUP = 16 };

/* At most PAGE_GROUP pages, anywhere, to 16 bytes each. */
static void hash_page_group(const uint32_t key[8], const uint8_t *const *pages, size_t nr, uint8_t (*keys)[SNAP_KEY])
{
	const uint8_t *in[PAGE_GROUP * 4];
	uint64_t counter[PAGE_GROUP * 4];
	uint8_t *out[PAGE_GROUP * 4];
	uint8_t chunks[PAGE_GROUP * 4][32], parents[PAGE_GROUP * 2][32], roots[PAGE_GROUP][32];

	for (size_t i = 0; i < nr * 4; i++) {
		in[i] = pages[i / 4] + (i % 4) * 1024;
		counter[i] = i % 4;
		out[i] = chunks[i];
	}
	hash_many(in, nr * 4, 16, key, counter, KEYED_HASH, CHUNK_START, CHUNK_END, out);
	for (size_t i = 0; i < nr * 2; i++) {
		in[i] = chunks[i * 2];
		out[i] = parents[i];
	}
	hash_many(in, nr * 2, 1, key, NULL, KEYED_HASH | PARENT, 0, 0, out);
	for (size_t i = 0; i < nr; i++) {
		in[i] = parents[i * 2];
		out[i] = roots[i];
	}
	hash_many(in, nr, 1, key, NULL, KEYED_HASH | PARENT | ROOT, 0, 0, out);
	for (size_t i = 0; i < nr; i++)
		memcpy(keys[i], roots[i], SNAP_KEY);
}

void snap_hash_pages(const uint8_t *key, const uint8_t *pages, size_t nr_pages, uint8_t *keys)
{
	uint32_t words[8];

	memcpy(words, key, 32);
	for (size_t base = 0; base < nr_pages; base += PAGE_GROUP) {
		size_t count = nr_pages - base < PAGE_GROUP ? nr_pages - base : PAGE_GROUP;
		const uint8_t *group[PAGE_GROUP];

		for (size_t i = 0; i < count; i++)
			group[i] = pages + (base + i) * SNAP_PAGE;
		hash_page_group(words, group, count, (uint8_t(*)[SNAP_KEY])(keys + base * SNAP_KEY));
	}
}

static uint64_t load_be64(const uint8_t *p)
{
	uint64_t value;

	memcpy(&value, p, 8);
	return __builtin_bswap64(value);
}

/* The location of a key, or 0. A damaged fanout cannot lead outside the table. */
static uint64_t table_lookup(const snap_table *table, const uint8_t *key)
{
	uint64_t prefix = load_be64(key), lo = 0, hi = table->nr_keys;

	if (table->fanout_bits) {
		uint64_t bucket = prefix >> (64 - table->fanout_bits);

		lo = table->fanout[bucket];
		hi = table->fanout[bucket + 1];
		if (hi > table->nr_keys)
			return 0;
	}
	while (lo < hi) {
		uint64_t middle = lo + (hi - lo) / 2;
		int order = memcmp(table->keys + middle * SNAP_KEY, key, SNAP_KEY);

		if (order == 0)
			return table->locs[middle];
		if (order < 0)
			lo = middle + 1;
		else
			hi = middle;
	}
	return 0;
}

uint64_t snap_lookup(const snap_table *tables, size_t nr_tables, const uint8_t *key)
{
	for (size_t i = 0; i < nr_tables; i++) {
		uint64_t loc = table_lookup(&tables[i], key);

		if (loc)
			return loc;
	}
	return 0;
}

struct entry {
	uint8_t key[SNAP_KEY];
	uint64_t loc;
};

/* Pages that this take has stored already but no key table knows yet. Open addressing; loc 0 is a free slot. */
struct snap_pending {
	pthread_mutex_t lock;
	struct entry *entries;
	uint64_t mask, used;
};
typedef struct snap_pending snap_pending;

snap_pending *snap_pending_new(void)
{
	snap_pending *pending = calloc(1, sizeof(*pending));

	if (!pending)
		return NULL;
	pending->mask = 4095;
	pending->entries = calloc(pending->mask + 1, sizeof(struct entry));
	if (!pending->entries) {
		free(pending);
		return NULL;
	}
	pthread_mutex_init(&pending->lock, NULL);
	return pending;
}

void snap_pending_free(snap_pending *pending)
{
	if (!pending)
		return;
	pthread_mutex_destroy(&pending->lock);
	free(pending->entries);
	free(pending);
}

static struct entry *pending_find(snap_pending *pending, const uint8_t *key)
{
	uint64_t at;

	memcpy(&at, key, 8);
	for (;; at++) {
		struct entry *entry = &pending->entries[at & pending->mask];

		if (!entry->loc || memcmp(entry->key, key, SNAP_KEY) == 0)
			return entry;
	}
}

/* Room for `more` entries at a load of at most one half. */
static int pending_reserve(snap_pending *pending, uint64_t more)
{
	struct entry *old = pending->entries;
	uint64_t old_size = pending->mask + 1, size = old_size;

	while ((pending->used + more) * 2 > size)
		size *= 4;
	if (size == old_size)
		return 0;
	pending->entries = calloc(size, sizeof(struct entry));
	if (!pending->entries) {
		pending->entries = old;
		return -1;
	}
	pending->mask = size - 1;
	for (uint64_t i = 0; i < old_size; i++)
		if (old[i].loc)
			*pending_find(pending, old[i].key) = old[i];
	free(old);
	return 0;
}

static int page_is_zero(const uint8_t *page)
{
	uint64_t first;

	memcpy(&first, page, 8);
	return first == 0 && memcmp(page, page + 8, SNAP_PAGE - 8) == 0;
}

/*
 * Decides for each of nr_pages pages where it is or will be: locs[i] is 0 (all zero), a location out of the
 * tables, or first_loc + k for the k-th page that nobody has. Those pages are moved to the front of `pages`, in
 * order, and their keys written to new_keys. Returns their number, or -1: out of memory.
 */
int64_t snap_stage(const uint8_t *key, uint8_t *pages, size_t nr_pages, const snap_table *tables, size_t nr_tables,
		   snap_pending *pending, uint64_t first_loc, uint64_t *locs, uint8_t *new_keys, uint64_t *nr_zero)
{
	uint32_t words[8];
	int64_t nr_new = 0;
	size_t next = 0;

	memcpy(words, key, 32);
	while (next < nr_pages) {
		const uint8_t *group[PAGE_GROUP];
		size_t index[PAGE_GROUP], count = 0;
		uint8_t keys[PAGE_GROUP][SNAP_KEY];

		for (; next < nr_pages && count < PAGE_GROUP; next++) {
			const uint8_t *page = pages + next * SNAP_PAGE;

			locs[next] = 0;
			if (page_is_zero(page)) {
				++*nr_zero;
				continue;
			}
			group[count] = page;
			index[count++] = next;
		}
		if (!count)
			continue;
		hash_page_group(words, group, count, keys);
		for (size_t i = 0; i < count; i++)
			locs[index[i]] = snap_lookup(tables, nr_tables, keys[i]);
		pthread_mutex_lock(&pending->lock);
		if (pending_reserve(pending, count) < 0) {
			pthread_mutex_unlock(&pending->lock);
			return -1;
		}
		for (size_t i = 0; i < count; i++) {
			struct entry *entry;

			if (locs[index[i]])
				continue;
			entry = pending_find(pending, keys[i]);
			if (!entry->loc) {
				memcpy(entry->key, keys[i], SNAP_KEY);
				entry->loc = first_loc + (uint64_t)nr_new;
				pending->used++;
				memcpy(new_keys + (size_t)nr_new * SNAP_KEY, keys[i], SNAP_KEY);
				if ((size_t)nr_new != index[i])
					memcpy(pages + (size_t)nr_new * SNAP_PAGE, group[i], SNAP_PAGE);
				nr_new++;
			}
			locs[index[i]] = entry->loc;
		}
		pthread_mutex_unlock(&pending->lock);
	}
	return nr_new;
}

static int entry_order(const void *a, const void *b)
{
	return memcmp(((const struct entry *)a)->key, ((const struct entry *)b)->key, SNAP_KEY);
}

/* Sorts keys and their locations: keys are evenly spread, so one pass into buckets does most of it. -1: memory. */
int snap_table_sort(uint8_t *keys, uint64_t *locs, uint64_t nr_keys)
{
	unsigned bits = 0;
	struct entry *entries;
	uint64_t *starts, nr_buckets;

	while (bits < 20 && (nr_keys >> bits) > 8)
		bits++;
	nr_buckets = 1ull << bits;
	entries = malloc((nr_keys + 1) * sizeof(*entries));
	starts = calloc(nr_buckets + 1, sizeof(*starts));
	if (!entries || !starts) {
		free(entries);
		free(starts);
		return -1;
	}
#define BUCKET(k) (bits ? load_be64(k) >> (64 - bits) : 0)
	for (uint64_t i = 0; i < nr_keys; i++)
		starts[BUCKET(keys + i * SNAP_KEY) + 1]++;
	for (uint64_t i = 0; i < nr_buckets; i++)
		starts[i + 1] += starts[i];
	for (uint64_t i = 0; i < nr_keys; i++) {
		struct entry *entry = &entries[starts[BUCKET(keys + i * SNAP_KEY)]++];

		memcpy(entry->key, keys + i * SNAP_KEY, SNAP_KEY);
		entry->loc = locs[i];
	}
#undef BUCKET
	for (uint64_t i = 0, start = 0; i < nr_buckets; start = starts[i++])
		if (starts[i] - start > 1)
			qsort(entries + start, starts[i] - start, sizeof(*entries), entry_order);
	for (uint64_t i = 0; i < nr_keys; i++) {
		memcpy(keys + i * SNAP_KEY, entries[i].key, SNAP_KEY);
		locs[i] = entries[i].loc;
	}
	free(entries);
	free(starts);
	return 0;
}

/* Fills (1 << fanout_bits) + 1 entries for sorted keys. */
void snap_table_fanout(const uint8_t *keys, uint64_t nr_keys, uint32_t fanout_bits, uint32_t *fanout)
{
	uint64_t bucket = 0, nr_buckets = 1ull << fanout_bits;

	for (uint64_t i = 0; i < nr_keys; i++) {
		uint64_t prefix = fanout_bits ? load_be64(keys + i * SNAP_KEY) >> (64 - fanout_bits) : 0;

		while (bucket <= prefix)
			fanout[bucket++] = (uint32_t)i;
	}
	while (bucket <= nr_buckets)
		fanout[bucket++] = (uint32_t)nr_keys;
}

/* 0 when keys ascend strictly and the fanout agrees with them; else -1. */
int snap_table_check(const snap_table *table)
{
	uint64_t nr_buckets = 1ull << table->fanout_bits;

	if (table->fanout[0] != 0 || table->fanout[nr_buckets] != table->nr_keys)
		return -1;
	for (uint64_t i = 0; i < nr_buckets; i++)
		if (table->fanout[i] > table->fanout[i + 1])
			return -1;
	for (uint64_t i = 1; i < table->nr_keys; i++)
		if (memcmp(table->keys + (i - 1) * SNAP_KEY, table->keys + i * SNAP_KEY, SNAP_KEY) >= 0)
			return -1;
	for (uint64_t i = 0; i < table->nr_keys; i++)
		if (table_lookup(table, table->keys + i * SNAP_KEY) != table->locs[i])
			return -1;
	return 0;
}

/* dst[i] = src[slots[i]], pages. -1: a slot is outside src, nothing more is copied. */
int snap_gather(uint8_t *dst, const uint8_t *src, size_t nr_src, const uint32_t *slots, size_t nr_pages)
{
	for (size_t i = 0; i < nr_pages; i++) {
		if (slots[i] >= nr_src)
			return -1;
		memcpy(dst + i * SNAP_PAGE, src + (size_t)slots[i] * SNAP_PAGE, SNAP_PAGE);
	}
	return 0;
}

/* Starts write-back without waiting for it. Best effort: a file system without it returns -errno. */
int snap_sync_range(int fd, int64_t offset, int64_t size)
{
	return sync_file_range(fd, offset, size, SYNC_FILE_RANGE_WRITE) < 0 ? -errno : 0;
}
