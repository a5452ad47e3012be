/* What Python sees of hash.c; read by cffi, so no preprocessor here. */
typedef struct {
	uint32_t words[8];
	uint64_t ph[1024];
} snap_hash_key;

const char *snap_hash_variant(void);
int snap_hash_select(int variant);
int snap_blake3(const uint8_t *key, const uint8_t *data, size_t size, uint8_t *out);
int snap_hash_init(snap_hash_key *key, const uint8_t *secret);
int snap_digest(const snap_hash_key *key, const uint8_t *data, size_t size, uint8_t *out);
void snap_hash_pages(const snap_hash_key *key, const uint8_t *pages, size_t nr_pages, uint8_t *keys);
