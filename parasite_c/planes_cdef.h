/* What Python sees of planes.c; read by cffi, so no preprocessor here. */

int snap_planes_select(int variant);

/* `planes` gets as many bytes as the pages have. */
void snap_to_planes(uint8_t *planes, const uint8_t *pages, size_t nr_pages);

/* pages[i] = page slots[i] of the nr_pages whose planes these are. -1: there is no such page; what is before it is there. */
int snap_from_planes(uint8_t *pages, const uint8_t *planes, size_t nr_pages, const uint32_t *slots, size_t nr_slots);
