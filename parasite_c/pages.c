/*
 * Page helpers of the store, called through cffi without the GIL: staging, key tables.
 *
 * Owns: the zero test, lookup in sorted key tables, the table of pages that one take has seen so far, gathering of pages.
 * Does no I/O but sync_file_range, and knows neither files nor formats: bounds of everything it is handed are
 * checked by the caller, except the contents of key tables, which may be damaged and are checked here.
 */
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <malloc.h>
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "hash.h"
#include "pages_cdef.h"

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

/* Zeroed. Looked into at random places, so that huge pages spare two faults and many walks for each small one. */
static struct entry *entries_new(uint64_t nr)
{
	size_t size = nr * sizeof(struct entry);
	void *found = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);

	if (found == MAP_FAILED)
		return NULL;
	madvise(found, size, MADV_HUGEPAGE); /* where there are none: small ones */
	return found;
}

static void entries_free(struct entry *entries, uint64_t nr)
{
	munmap(entries, nr * sizeof(struct entry));
}

snap_pending *snap_pending_new(void)
{
	snap_pending *pending = calloc(1, sizeof(*pending));

	if (!pending)
		return NULL;
	pending->mask = 4095;
	pending->entries = entries_new(pending->mask + 1);
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
	entries_free(pending->entries, pending->mask + 1);
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
		size *= 2;
	if (size == old_size)
		return 0;
	pending->entries = entries_new(size);
	if (!pending->entries) {
		pending->entries = old;
		return -1;
	}
	pending->mask = size - 1;
	for (uint64_t i = 0; i < old_size; i++)
		if (old[i].loc)
			*pending_find(pending, old[i].key) = old[i];
	entries_free(old, old_size);
	return 0;
}

/* Room for so many pages that may come, at once. Best effort: there will be more room when it is needed. */
void snap_pending_expect(snap_pending *pending, uint64_t nr_pages)
{
	pthread_mutex_lock(&pending->lock);
	pending_reserve(pending, nr_pages);
	pthread_mutex_unlock(&pending->lock);
}

static int page_is_zero(const uint8_t *page)
{
	uint64_t first;

	memcpy(&first, page, 8);
	return first == 0 && memcmp(page, page + 8, SNAP_PAGE - 8) == 0;
}

/* The sum of 256 bytes, none of them more than 1. */
static unsigned count_of(const uint8_t *seen)
{
	uint64_t total = 0, word;

	for (size_t i = 0; i < 256; i += 8) {
		memcpy(&word, seen + i, 8);
		total += word;
	}
	total = (total & 0x00ff00ff00ff00ffull) + (total >> 8 & 0x00ff00ff00ff00ffull);
	return (unsigned)(total * 0x0001000100010001ull >> 48);
}

/*
 * Whether a page's bytes look as if drawn by lot: encrypted or packed. Of 256 bytes drawn by lot 162 differ from each other, give or
 * take 5; of 64, 57 do (2.5). Of numbers with arbitrary digits, which still lose a quarter as byte planes, nearly as many do, but of their highest
 * bytes, as doubles and as floats have them, no more than 38.
 */
static int looks_random(const uint8_t *page)
{
	uint8_t seen[256] = {0}, high[256] = {0};

	/* Eight half cache lines. After four bytes of each most other pages have told what they are. */
	for (size_t i = 0; i < 8; i++) {
		uint32_t word;

		memcpy(&word, page + i * 512 + 96, 4);
		seen[word & 255] = seen[word >> 8 & 255] = seen[word >> 16 & 255] = seen[word >> 24] = 1;
	}
	if (count_of(seen) < 24)
		return 0;
	for (size_t i = 0; i < 32; i++) {
		uint64_t word;

		memcpy(&word, page + i / 4 * 512 + 96 + i % 4 * 8, 8);
		high[word >> 56] = high[word >> 24 & 255] = 1;
		for (size_t k = 0; k < 8; k++, word >>= 8)
			seen[word & 255] = 1;
	}
	return count_of(seen) >= 142 && count_of(high) >= 46;
}

static void compact(uint8_t *pages, const uint32_t *slots, size_t nr)
{
	for (size_t i = 0; i < nr; i++)
		if (slots[i] != i)
			memcpy(pages + i * SNAP_PAGE, pages + (size_t)slots[i] * SNAP_PAGE, SNAP_PAGE);
}

static int inside(const uint32_t *slots, size_t nr, size_t nr_pages)
{
	for (size_t i = 0; i < nr; i++)
		if (slots[i] >= nr_pages)
			return 0;
	return 1;
}

/* The pages in these ascending slots, moved to the front. -1: a slot is outside, nothing was done. */
int snap_compact(uint8_t *pages, size_t nr_pages, const uint32_t *slots, size_t nr)
{
	if (!inside(slots, nr, nr_pages))
		return -1;
	compact(pages, slots, nr);
	return 0;
}

/* The next page of a kind; returns its location. */
static uint64_t add_to(snap_kind *kind, size_t slot, const uint8_t *key)
{
	memcpy(kind->keys + kind->nr * SNAP_KEY, key, SNAP_KEY);
	kind->slots[kind->nr] = (uint32_t)slot;
	return kind->first_loc + kind->nr++;
}

/*
 * Decides for each of nr_pages pages where it is or will be: locs[i] is 0 (all zero), a location out of the
 * tables, or first_loc + k for the k-th page that nobody has, of its kind: `plain`, or `random` when that is not NULL and the page
 * will not compress. Of both kinds keys and slots are noted. Plain pages are moved to the front of `pages`, in order, unless there
 * are random ones: those must be taken from their slots first. Returns 0, or -1: out of memory.
 */
int snap_stage(const snap_hash_key *key, uint8_t *pages, size_t nr_pages, const snap_table *tables, size_t nr_tables,
	       snap_pending *pending, snap_kind *plain, snap_kind *random, uint64_t *locs, uint64_t *nr_zero)
{
	size_t next = 0;

	plain->nr = 0;
	if (random)
		random->nr = 0;
	while (next < nr_pages) {
		const uint8_t *group[SNAP_PAGE_GROUP];
		size_t index[SNAP_PAGE_GROUP], count = 0;
		uint8_t keys[SNAP_PAGE_GROUP][SNAP_KEY], is_random[SNAP_PAGE_GROUP];

		for (; next < nr_pages && count < SNAP_PAGE_GROUP; next++) {
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
		snap_hash_page_group(key, group, count, keys);
		for (size_t i = 0; i < count; i++) {
			locs[index[i]] = snap_lookup(tables, nr_tables, keys[i]);
			is_random[i] = random && !locs[index[i]] && looks_random(group[i]);
		}
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
				entry->loc = add_to(is_random[i] ? random : plain, index[i], keys[i]);
				pending->used++;
			}
			locs[index[i]] = entry->loc;
		}
		pthread_mutex_unlock(&pending->lock);
	}
	if (!random || !random->nr)
		compact(pages, plain->slots, plain->nr);
	return 0;
}

/*
 * Replaces locations that are marked by the highest bit: the place of one in `put`, and what is marked there too by that of its page in
 * `finals`: nr_streams lists one after the other, of which the s-th begins at starts[s]; a location there is s << 48 and a serial
 * number. -1: one is out of bounds.
 */
int snap_resolve(uint64_t *locs, size_t nr, const uint64_t *put, size_t nr_put, const uint64_t *finals, size_t nr_finals,
		 const uint64_t *starts, size_t nr_streams)
{
	const uint64_t mark = 1ull << 63, serial = (1ull << 48) - 1;

	for (size_t i = 0; i < nr; i++) {
		uint64_t loc = locs[i], stream, at;

		if (!(loc & mark))
			continue;
		if ((loc ^ mark) >= nr_put)
			return -1;
		loc = put[loc ^ mark];
		if (loc & mark) {
			stream = (loc ^ mark) >> 48;
			at = stream < nr_streams ? starts[stream] + (loc & serial) : nr_finals;
			if (at >= nr_finals)
				return -1;
			loc = finals[at];
		}
		locs[i] = loc;
	}
	return 0;
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

/* Digests a message and copies it to its places, which together have its size. -1: out of memory. */
int snap_put(const snap_hash_key *key, const uint8_t *data, size_t size, const snap_part *parts, size_t nr_parts, uint8_t *out)
{
	int result = snap_digest(key, data, size, out);

	for (size_t i = 0; i < nr_parts; data += parts[i++].size)
		memcpy(parts[i].to, data, parts[i].size);
	return result;
}

/* The same for a message of whole pages that lie in these slots of `pages`. -2: a slot is outside, nothing was done. */
int snap_put_pages(const snap_hash_key *key, const uint8_t *pages, size_t nr_pages, const uint32_t *slots, size_t nr,
		   const snap_part *parts, size_t nr_parts, uint8_t *out)
{
	size_t part = 0, done = 0;

	if (!inside(slots, nr, nr_pages))
		return -2;
	for (size_t i = 0; i < nr; i++) {
		const uint8_t *page = pages + (size_t)slots[i] * SNAP_PAGE;

		for (size_t copied = 0; copied < SNAP_PAGE && part < nr_parts;) {
			size_t room = parts[part].size - done, size = SNAP_PAGE - copied < room ? SNAP_PAGE - copied : room;

			memcpy(parts[part].to + done, page + copied, size);
			copied += size;
			done += size;
			if (done == parts[part].size) {
				part++;
				done = 0;
			}
		}
	}
	return snap_digest_pages(key, pages, slots, nr, out);
}

/* Starts write-back without waiting for it. Best effort: a file system without it returns -errno. */
int snap_sync_range(int fd, int64_t offset, int64_t size)
{
	return sync_file_range(fd, offset, size, SYNC_FILE_RANGE_WRITE) < 0 ? -errno : 0;
}

/*
 * Keeps what is freed for the next time: frames are buffers of a megabyte, and fresh memory costs its page faults (1.6 GB/s
 * and less, where reused memory is written at 7). For the whole process; does nothing where there is no glibc.
 */
void snap_keep_freed(void)
{
#ifdef __GLIBC__
	mallopt(M_MMAP_THRESHOLD, 32 << 20); /* the most that glibc takes */
	mallopt(M_TRIM_THRESHOLD, 256 << 20);
#endif
}
