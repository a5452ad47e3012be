/* What Python sees of pages.c; read by cffi, so no preprocessor here. */
typedef struct snap_pending snap_pending;
typedef struct {
	const uint8_t *keys;
	const uint64_t *locs;
	const uint32_t *fanout;
	uint64_t nr_keys;
	uint32_t fanout_bits;
} snap_table;

snap_pending *snap_pending_new(void);
void snap_pending_free(snap_pending *pending);
int64_t snap_stage(const snap_hash_key *key, uint8_t *pages, size_t nr_pages, const snap_table *tables, size_t nr_tables,
		   snap_pending *pending, uint64_t first_loc, uint64_t *locs, uint8_t *new_keys, uint64_t *nr_zero);
uint64_t snap_lookup(const snap_table *tables, size_t nr_tables, const uint8_t *key);
int snap_table_sort(uint8_t *keys, uint64_t *locs, uint64_t nr_keys);
void snap_table_fanout(const uint8_t *keys, uint64_t nr_keys, uint32_t fanout_bits, uint32_t *fanout);
int snap_table_check(const snap_table *table);
int snap_gather(uint8_t *dst, const uint8_t *src, size_t nr_src, const uint32_t *slots, size_t nr_pages);
void snap_copy(uint8_t *dst, const uint8_t *src, size_t size);
int snap_sync_range(int fd, int64_t offset, int64_t size);
void snap_keep_freed(void);
