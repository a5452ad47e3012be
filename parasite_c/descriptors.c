// What /proc shows of many descriptors of one task: a server has thousands, and stands still while they are read.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>
#include "descriptors_cdef.h"

#define NS_PER_S 1000000000LL

static int64_t ns(struct timespec when)
{
    return when.tv_sec * NS_PER_S + when.tv_nsec;
}

// The whole of an open file, which is closed. Bytes read, or a negative errno.
static int64_t drain(int fd, char *out, size_t size)
{
    size_t n = 0;
    int64_t result = 0;

    while (n < size) {
        ssize_t got = read(fd, out + n, size - n);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0)
            result = -errno;
        if (got <= 0)
            break;
        n += (size_t)got;
    }
    close(fd);
    return result ? result : (int64_t)n;
}

// Whether a path is one of these, or below it.
static int lies_below(const char *path, size_t length, const char *const *places)
{
    for (; *places; places++) {
        size_t n = strlen(*places);
        if (length >= n && memcmp(path, *places, n) == 0 && (length == n || path[n] == '/'))
            return 1;
    }
    return 0;
}

static int see(int links, int infos, struct snap_descriptor *d, char *room, size_t size, size_t *used,
               const char *const *apart)
{
    struct stat st = {0};
    char name[16];
    int64_t got;
    int fd;

    snprintf(name, sizeof(name), "%d", d->fd);
    got = readlinkat(links, name, room + *used, size - *used);
    if (got < 0)
        return errno;
    if (*used + (size_t)got == size)
        return ENOSPC;
    d->unasked = (uint32_t)lies_below(room + *used, (size_t)got, apart);
    if (!d->unasked && fstatat(links, name, &st, 0) < 0)
        return errno;
    d->link_at = *used;
    d->link_length = (uint32_t)got;
    *used += (size_t)got;
    d->dev = st.st_dev;
    d->ino = st.st_ino;
    d->rdev = st.st_rdev;
    d->size = st.st_size;
    d->mtime_ns = ns(st.st_mtim);
    d->ctime_ns = ns(st.st_ctim);
    d->atime_ns = ns(st.st_atim);
    d->mode = st.st_mode;
    d->nlink = (uint32_t)st.st_nlink;
    d->uid = st.st_uid;
    d->gid = st.st_gid;
    if ((fd = openat(infos, name, O_RDONLY | O_CLOEXEC)) < 0)
        return errno;
    if ((got = drain(fd, room + *used, size - *used)) < 0)
        return (int)-got;
    if (*used + (size_t)got == size)
        return ENOSPC;
    d->info_at = *used;
    d->info_length = (uint32_t)got;
    *used += (size_t)got;
    return 0;
}

// Link, status and fdinfo of each descriptor; an error is noted with the one that it is of. Returns ENOSPC when `room` is too
// small for all, or what kept the directories from being opened; else 0. The status of what lies below a path of `apart`, which ends with
// NULL, is not asked for: its file server may keep a caller waiting for ever.
int snap_see(int pid, struct snap_descriptor *found, size_t nr, char *room, size_t size, const char *const *apart)
{
    char path[48];
    size_t used = 0;
    int links, infos = -1, error = 0;

    snprintf(path, sizeof(path), "/proc/%d/fd", pid);
    links = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    snprintf(path, sizeof(path), "/proc/%d/fdinfo", pid);
    if (links < 0 || (infos = open(path, O_RDONLY | O_DIRECTORY | O_CLOEXEC)) < 0)
        error = errno;
    for (size_t i = 0; !error && i < nr; i++) {
        found[i].error = see(links, infos, &found[i], room, size, &used, apart);
        if (found[i].error == ENOSPC)
            error = ENOSPC;
    }
    if (links >= 0)
        close(links);
    if (infos >= 0)
        close(infos);
    return error;
}

// kcmp(2): its answer, or a negative errno. `two` is a number, or the address of a struct kcmp_epoll_slot.
int snap_kcmp(int one_pid, int two_pid, int type, uint64_t one, uint64_t two)
{
    long found = syscall(SYS_kcmp, one_pid, two_pid, type, one, two);
    return found < 0 ? -errno : (int)found;
}
