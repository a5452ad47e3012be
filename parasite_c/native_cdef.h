struct snap_regs;
struct snap_run_pages { uint64_t first; uint64_t nr_pages; };
struct snap_missing { int uffd; size_t nr_ranges; const struct snap_run_pages *ranges; };
struct snap_region { uint64_t start; uint64_t end; uint64_t categories; };

int64_t snap_read_runs(int pid, int mem_fd, int pagemap_fd, const struct snap_run_pages *runs, size_t nr_runs,
                       char *buffer, uint64_t room, uint64_t *bad, size_t max_bad);
int64_t snap_write_runs(int pid, int mem_fd, const struct snap_missing *missing, const struct snap_run_pages *runs,
                        size_t nr_runs, const char *buffer, uint64_t size, uint64_t *bad, size_t max_bad);
int64_t snap_pagemap_scan(int fd, uint64_t *start, uint64_t end, uint64_t flags, uint64_t inverted, uint64_t mask,
                          uint64_t anyof, uint64_t return_mask, struct snap_region *out, size_t max_out);
int snap_spawn_stub(int exe_fd, int pid, int go_read, int go_write);

size_t snap_xstate_used(const void *xstate, size_t size);
size_t snap_frame_size(size_t xstate_used);
size_t snap_frame_result_at(void);
size_t snap_put_frame(void *out, uint64_t address, const struct snap_regs *regs, uint64_t sigmask,
                      uint64_t restorer, const void *xstate, size_t xstate_used);
