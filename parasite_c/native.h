// What the cffi module needs to see of native.c and frames.c to compile its wrappers.
#include <stddef.h>
#include <stdint.h>
#include "protocol.h"
#include "attend.h"

struct snap_run_pages { uint64_t first; uint64_t nr_pages; };
struct snap_missing { int uffd; size_t nr_ranges; const struct snap_run_pages *ranges; };
struct snap_region { uint64_t start, end, categories; };
struct snap_regs;
