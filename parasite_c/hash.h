/* The store's hashes, for pages.c; what they are stands in hash.c. */
#ifndef SNAP_HASH_H
#define SNAP_HASH_H

#include <stddef.h>
#include <stdint.h>

#define SNAP_PAGE 4096
#define SNAP_KEY 16
#define SNAP_PAGE_GROUP 16

#include "hash_cdef.h"

int snap_digest_pages(const snap_hash_key *key, const uint8_t *pages, const uint32_t *slots, size_t nr, uint8_t *out);
void snap_hash_page_group(const snap_hash_key *key, const uint8_t *const *pages, size_t nr, uint8_t (*keys)[SNAP_KEY]);

#endif
