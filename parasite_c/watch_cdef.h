// PAGEMAP_SCAN and UFFDIO_REGISTER over many ranges in one go.
#define SNAP_W_WATCHED 1                // it was registered with one, ours or another's
#define SNAP_W_OURS 2                   // it is registered with ours now

struct snap_range {
    uint64_t start;
    uint64_t end;
};

struct snap_scan {
    uint64_t inverted;                  // categories, as PAGEMAP_SCAN wants them
    uint64_t mask;
    uint64_t any_of;
    uint64_t wanted;
    uint64_t next;                      // which range to go on with, and where in it (0: its start)
    uint64_t position;
};

int64_t snap_scan_ranges(int pagemap, const struct snap_range *ranges, size_t nr, struct snap_scan *scan,
                         struct snap_region *out, size_t room);
void snap_watch(int uffd, int pagemap, const struct snap_range *ranges, size_t nr, uint8_t *states, int32_t *errors);
