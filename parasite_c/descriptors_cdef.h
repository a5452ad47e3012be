// What /proc shows of many descriptors of one task, in one go.
struct snap_descriptor {
    int32_t fd;
    int32_t error;                      // errno of what could not be read; ENOENT: it is closed
    uint64_t dev;
    uint64_t ino;
    uint64_t rdev;
    int64_t size;
    int64_t mtime_ns;
    int64_t ctime_ns;
    int64_t atime_ns;
    uint32_t mode;
    uint32_t nlink;
    uint32_t uid;
    uint32_t gid;
    uint64_t link_at;                   // where in `room` the text of the link is, and of fdinfo
    uint64_t info_at;
    uint32_t link_length;
    uint32_t info_length;
    uint32_t unasked;                   // its link lies below one of `apart`: nothing is known of dev to gid
};

int snap_see(int pid, struct snap_descriptor *found, size_t nr, char *room, size_t size, const char *const *apart);
int snap_kcmp(int one_pid, int two_pid, int type, uint64_t one, uint64_t two);
