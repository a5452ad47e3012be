// How a task was driven (drive.c).
enum { SNAP_DRIVE_DONE, SNAP_DRIVE_GONE, SNAP_DRIVE_FAULT, SNAP_DRIVE_RUNNING, SNAP_DRIVE_ERROR };

struct snap_drive {
    int outcome;
    int status;                         // of its last stop, as waitpid(2) gives it
    int new_tid;                        // the task that it made, where a ptrace event tells
};

int snap_drive_until(int tid, uint64_t until, uint32_t limit_ms, struct snap_drive *d);
int snap_drive_signal(int tid, int sentinel, int blocked, uint64_t ended, uint32_t limit_ms, struct snap_drive *d);
