// What snap tells an attendant (attendant.c). Read by cffi's parser too: only plain #define of integers and plain structs.

#define SNAP_ATTEND_NONE 6              // no argument says where a piece begins
#define SNAP_ATTEND_MOST_PIECES 1024    // IOV_MAX
#define SNAP_ATTEND_MOST_BYTES 65536    // of the frames: two of them, with the largest vector state

struct snap_piece {
    uint64_t address;                   // of the bytes that are still to be transferred
    uint64_t length;
};

struct snap_attended {
    int32_t tid;
    uint32_t nr_pieces;
    uint64_t regs[27];                  // struct user_regs_struct: its own, with the result so far in rax
    uint64_t sigmask;                   // its own
    uint64_t parked[27];                // its registers while it waits for the attendant
    uint64_t restorer;                  // `mov $15, %eax; syscall` in its code, that many bytes
    uint64_t restorer_length;
    uint64_t frames_at;                 // where its fail-safe frames are
    uint32_t frames_length;             // their bytes follow this struct, then as many that were there before, then the pieces
    uint32_t result_at;                 // offset of rax in the frames
    uint64_t nr;                        // the call that transfers the rest
    uint64_t args[6];
    uint32_t address_arg;               // which of them a piece's address is; SNAP_ATTEND_NONE: none
    uint32_t length_arg;                // which its length
};
