/* What pages.c offers; read by cffi as well, so no preprocessor here. */
typedef struct snap_pending snap_pending;
typedef struct {
	const uint8_t *keys;	/* nr_keys * 16 bytes, ascending */
	const uint64_t *locs;
	const uint32_t *fanout; /* (1 << fanout_bits) + 1 entries: first index of each prefix */
	uint64_t nr_keys;
	uint32_t fanout_bits;
} snap_table;
typedef struct {
	uint8_t *to;
	size_t size;
} snap_part;
typedef struct {
	uint64_t first_loc;
	uint8_t *keys;
	uint32_t *slots;
	uint64_t nr;
} snap_kind;

snap_pending *snap_pending_new(void);
void snap_pending_free(snap_pending *pending);
void snap_pending_expect(snap_pending *pending, uint64_t nr_pages);
int snap_stage(const snap_hash_key *key, uint8_t *pages, size_t nr_pages, const snap_table *tables, size_t nr_tables,
	       snap_pending *pending, snap_kind *plain, snap_kind *random, uint64_t *locs, uint64_t *nr_zero);
int snap_resolve(uint64_t *locs, size_t nr, const uint64_t *put, size_t nr_put, const uint64_t *finals, size_t nr_finals,
		 const uint64_t *starts, size_t nr_streams);
int snap_compact(uint8_t *pages, size_t nr_pages, const uint32_t *slots, size_t nr);
uint64_t snap_lookup(const snap_table *tables, size_t nr_tables, const uint8_t *key);
int snap_table_sort(uint8_t *keys, uint64_t *locs, uint64_t nr_keys);
void snap_table_fanout(const uint8_t *keys, uint64_t nr_keys, uint32_t fanout_bits, uint32_t *fanout);
int snap_table_check(const snap_table *table);
int snap_gather(uint8_t *dst, const uint8_t *src, size_t nr_src, const uint32_t *slots, size_t nr_pages);
int snap_put(const snap_hash_key *key, const uint8_t *data, size_t size, const snap_part *parts, size_t nr_parts, uint8_t *out);
int snap_put_pages(const snap_hash_key *key, const uint8_t *pages, size_t nr_pages, const uint32_t *slots, size_t nr,
		   const snap_part *parts, size_t nr_parts, uint8_t *out);
int snap_sync_range(int fd, int64_t offset, int64_t size);
void snap_keep_freed(void);
