// The one source of what snap and its parasite say to each other (PROTOCOL.md explains it). Read by
// three compilers: the freestanding blob's, the cffi extension's, and cffi's own parser, which
// understands only plain #define of integers and plain structs: keep it that simple.

#define SNAP_SENTINEL 0x534e4150        // no such system call: ENOSYS, harmless when nobody listens
#define SNAP_CODE_SIZE 4096             // one page of code; the build refuses a bigger blob
#define SNAP_MAGIC_SIZE 16              // bytes at the start of the code page by which leftovers are known

#define SNAP_E_REF 0x1                  // << k: argument k is the index of the entry whose result it takes
#define SNAP_E_LOAD 0x40                // << k: argument k is the address of an int32 to take
#define SNAP_E_STOP 0x1000              // stop the batch when this entry fails with an errno not in ok[]
#define SNAP_E_UNDO 0x2000              // run only when snap died: what an earlier entry left behind
#define SNAP_E_CLONE 0x4000             // the child goes on at entry `child`
#define SNAP_E_END 0x8000               // last entry of its branch

#define SNAP_B_LEAVE 0x1                // announce the end by rt_sigreturn itself (seccomp'ed target)
#define SNAP_B_SIGNAL 0x2               // announce it by a signal to itself; without either: the sentinel call
#define SNAP_NOT_ENDED 0xffffffff       // stopped_at while the batch runs

#define SNAP_NO_CHILD 0xffffffff
#define SNAP_MAX_OK 4

struct snap_entry {
    uint64_t nr;
    uint64_t args[6];
    int64_t result;
    uint32_t flags;
    uint32_t child;
    uint16_t ok[4];
};

struct snap_batch {
    uint64_t leave_sp;                  // where the fail-safe frames wait; 0: exit (restore stubs)
    uint32_t flags;
    uint32_t nr_entries;
    uint32_t stopped_at;                // out: index of the entry that failed, or nr_entries
    int32_t sig;                        // for SNAP_B_SIGNAL: tgkill(pid, tid, sig)
    int32_t pid;
    int32_t tid;
};
