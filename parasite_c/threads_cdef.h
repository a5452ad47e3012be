// Many threads of one process in one go: what is known of each, and a batch run by each in turn.
#define SNAP_T_REGS 1
#define SNAP_T_MASK 2
#define SNAP_T_RSEQ 3
#define SNAP_T_SECTION 4
#define SNAP_T_XSTATE 5
#define SNAP_T_STAT 6
#define SNAP_T_STATUS 7
#define SNAP_T_ROBUST 8
#define SNAP_T_SCHEDULING 9

#define SNAP_OWN_FILES 1
#define SNAP_OWN_FS 2

#define SNAP_HAS_SEGMENTS 1
#define SNAP_HAS_PORTS 2

#define SNAP_V_FRAMES 0
#define SNAP_V_REDIRECTED 1
#define SNAP_V_BLOCKED 2
#define SNAP_V_WRITTEN 3
#define SNAP_V_STARTED 4
#define SNAP_V_RAN 5
#define SNAP_V_LEAVING 6
#define SNAP_V_UNBLOCKED 7
#define SNAP_V_PARKED 8

#define SNAP_FRAMES_MOST 65536

struct snap_thread {
    int32_t tid;
    int32_t error;                      // errno of the first thing that could not be read; 0
    int32_t failed;                     // which: SNAP_T_*
    uint32_t suspect;                   // it may stand in what a snap that was killed has left behind
    uint64_t regs[27];
    uint64_t sigmask;
    uint64_t rseq_pointer;
    uint32_t rseq_size;
    uint32_t rseq_signature;
    uint32_t rseq_flags;
    int32_t io_priority;
    uint64_t rseq_section;              // what its rseq area points to: the critical section that it may be in
    uint64_t dispatch;                  // PR_SYS_DISPATCH_*
    uint64_t robust_list;
    uint64_t robust_length;
    uint8_t scheduling[56];             // struct sched_attr; the two clamps at its end are 0 where the kernel has none
    uint32_t stat_at;                   // offsets in `room`; a length of 0: not read
    uint32_t stat_length;
    uint32_t status_at;
    uint32_t status_length;
    uint32_t affinity_at;
    uint32_t affinity_length;
    uint32_t xstate_at;
    uint32_t xstate_length;
    uint32_t own;                       // what it does not share with its process's first thread: SNAP_OWN_*
    uint32_t special;                   // SNAP_HAS_*: what cannot be dumped, and only ptrace shows
};

struct snap_visit {
    int32_t tid;
    int32_t sig;                        // announces the batch's end, see snap_batch
    int32_t inner_pid;
    int32_t inner_tid;
    int32_t blocked;                    // the thread blocks `sig`: one from somebody else stays pending
    int32_t pad;
    uint64_t own[27];                   // its registers, put back as they are
    uint64_t resume[27];                // those that the frame returns to: an interrupted call is issued again
    uint64_t mask;
    uint64_t xstate_at;                 // offset in `xstates`
    uint64_t xstate_used;
};

struct snap_visits {
    int32_t mem_fd;
    int32_t at;                         // out: how many visits are done
    int32_t stop_signal;                // out: what it stopped with instead of the end of its batch
    int32_t gone;                       // out: it ended
    int32_t lost;                       // out: it has not come back
    uint32_t limit_ms;                  // how long each may take
    uint64_t place;                     // of the frames: magic, frame 1, frame 2, magic
    uint64_t room;
    uint64_t second;                    // offset of frame 2
    uint64_t area;
    uint64_t area_size;
    uint64_t entries;                   // where the batch goes, and its data
    uint64_t data;
    uint64_t nr_bytes;                  // of the batch
    uint64_t nr_data;
    uint64_t syscall_ret;
    uint64_t sigreturn;
    uint64_t nr_munmap;
};

int snap_read_threads(int pid, int mem_fd, struct snap_thread *threads, size_t nr, char *room, size_t size,
                      const char *code_magic, const char *frame_magic, uint64_t second);
void snap_share(int kind, const int32_t *tids, size_t nr, uint32_t *first, uint32_t *order);
int64_t snap_read_files(const char *paths, char *room, size_t size, uint32_t *lengths, size_t nr);
int snap_visit_threads(struct snap_visits *v, const struct snap_visit *visits, size_t nr, const char *xstates,
                       const char *magic, size_t magic_size, const char *batch, const char *data, char *out,
                       int (*passed)(int step));
