// The loops that are too hot for Python: runs of pages, PAGEMAP_SCAN, and the birth of a restore stub
// (between fork and exec nothing but system calls may happen).
// No state of its own; errors come back as negative errno.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/wait.h>
#include <linux/sched.h>
#include <linux/userfaultfd.h>
#include <unistd.h>

#define PAGE 4096UL

// -- pages of another process ---------------------------------------------------------------------

struct snap_run_pages {
    uint64_t first;
    uint64_t nr_pages;
};

#define MAX_IOV 256

// Where missing pages can be put in place: a userfaultfd, and the ranges (ascending, disjoint, each inside one mapping)
// that it is registered for.
struct snap_missing {
    int uffd;
    size_t nr_ranges;
    const struct snap_run_pages *ranges;
};

// How many of the pages from `page` on, at most `nr_pages`, are of one kind: inside one range (*inside), or before the next.
static uint64_t same_kind(const struct snap_missing *missing, uint64_t page, uint64_t nr_pages, int *inside)
{
    size_t low = 0, high = missing->nr_ranges;

    while (low < high) {                // the first range that ends behind the page
        size_t middle = low + (high - low) / 2;
        if (missing->ranges[middle].first + missing->ranges[middle].nr_pages > page)
            high = middle;
        else
            low = middle + 1;
    }
    *inside = low < missing->nr_ranges && missing->ranges[low].first <= page;
    if (low == missing->nr_ranges)
        return nr_pages;
    uint64_t border = missing->ranges[low].first + (*inside ? missing->ranges[low].nr_pages : 0);
    return border - page < nr_pages ? border - page : nr_pages;
}

// Put pages in place: no fault, and no zeroing before the copy. Returns how many are there now: fewer when the next one is
// there already (EEXIST), or cannot be; -ENOMEM.
static int64_t place_pages(int uffd, uint64_t first, uint64_t nr_pages, const char *data)
{
    uint64_t done = 0;

    while (done < nr_pages) {
        struct uffdio_copy copy = {
            .dst = (first + done) * PAGE,
            .src = (uintptr_t)data + done * PAGE,
            .len = (nr_pages - done) * PAGE,
            .mode = UFFDIO_COPY_MODE_DONTWAKE,
        };
        if (ioctl(uffd, UFFDIO_COPY, &copy) == 0)
            return (int64_t)nr_pages;
        int error = errno;
        if (copy.copy > 0)              // a part of it
            done += (uint64_t)copy.copy / PAGE;
        else if (error == ENOMEM)
            return -ENOMEM;
        else if (error != EAGAIN)
            break;
    }
    return (int64_t)done;
}

// Whether the runs have no more than `most` pages in all.
static int runs_fit(const struct snap_run_pages *runs, size_t nr_runs, uint64_t most)
{
    for (size_t i = 0; i < nr_runs; i++) {
        if (runs[i].nr_pages > most)
            return 0;
        most -= runs[i].nr_pages;
    }
    return 1;
}

#define PIECE 256UL                     // pages that are read at once
#define LOOK_FROM 16UL                  // with fewer pages, looking at them before reading would not pay
#define SPAN 1024UL                     // over so much of the address space at most
#define EXCLUSIVE (1ULL << 56)          // pagemap: mapped here and nowhere else

// Read pages with process_vm_readv, which takes half as long as /proc/PID/mem, but pins them: of a page that is shared
// copy-on-write that would make a copy for the job. So only as far as every page is its own. Begins `skip` pages into runs[0];
// returns how many pages were read.
static uint64_t read_own_pages(int pid, int pagemap_fd, const struct snap_run_pages *runs, size_t nr_runs, uint64_t skip,
                               char *buffer)
{
    uint64_t entries[SPAN], first = runs[0].first + skip, end = first, nr_pages = 0, own = 0;
    struct iovec remote[PIECE], local;
    size_t n = 0;

    for (; n < nr_runs && n < PIECE && nr_pages < PIECE; n++, skip = 0) {
        uint64_t start = runs[n].first + skip, count = runs[n].nr_pages - skip;
        if (start < end || start >= first + SPAN)
            break;
        if (count > PIECE - nr_pages)
            count = PIECE - nr_pages;
        if (count > first + SPAN - start)
            count = first + SPAN - start;
        remote[n].iov_base = (void *)(start * PAGE);
        remote[n].iov_len = count * PAGE;
        nr_pages += count;
        end = start + count;
    }
    ssize_t size = (ssize_t)((end - first) * sizeof(uint64_t));
    if (pagemap_fd < 0 || nr_pages < LOOK_FROM || pread(pagemap_fd, entries, (size_t)size, (off_t)(first * 8)) != size)
        return 0;
    for (size_t i = 0; i < n; i++) {
        uint64_t start = (uint64_t)remote[i].iov_base / PAGE - first, count = remote[i].iov_len / PAGE, j = 0;
        while (j < count && (entries[start + j] & EXCLUSIVE))
            j++;
        own += j;
        if (j < count) {
            remote[i].iov_len = j * PAGE;
            n = j ? i + 1 : i;
        }
    }
    if (own < LOOK_FROM)
        return 0;
    local.iov_base = buffer;
    local.iov_len = own * PAGE;
    ssize_t got = process_vm_readv(pid, &local, 1, remote, n, 0);
    return got > 0 ? (uint64_t)got / PAGE : 0;
}

// Read runs of pages, in order, into `buffer`, which has room for `room` pages. Pages that cannot be reached are zeroed and
// their numbers put into bad[]; returns their number, or -errno when the process itself cannot be reached (-EOVERFLOW: there are
// more pages than room). mem_fd, pagemap_fd: its files in /proc, the second -1 if there is none.
int64_t snap_read_runs(int pid, int mem_fd, int pagemap_fd, const struct snap_run_pages *runs, size_t nr_runs,
                       char *buffer, uint64_t room, uint64_t *bad, size_t max_bad)
{
    size_t nr_bad = 0, i = 0;
    uint64_t skip = 0;                  // pages of runs[i] that are done
    uint64_t by_pid = 0;                // a page that was read by the pid's number

    if (!runs_fit(runs, nr_runs, room))
        return -EOVERFLOW;
    while (i < nr_runs) {
        uint64_t page = runs[i].first + skip, left = runs[i].nr_pages - skip;
        uint64_t done = left ? read_own_pages(pid, pagemap_fd, runs + i, nr_runs - i, skip, buffer) : 0;

        if (done) {
            by_pid = page;
        } else if (left) {
            ssize_t got = pread(mem_fd, buffer, (left < PIECE ? left : PIECE) * PAGE, (off_t)(page * PAGE));
            if (got < 0 && errno == EINTR)      // 0 says nothing about errno, which may be an old one
                continue;
            if (got == 0)
                return -ESRCH;          // the file's way to say that this address space is no more
            done = got > 0 ? (uint64_t)got / PAGE : 0;
            if (!done) {
                memset(buffer, 0, PAGE);
                if (nr_bad < max_bad)
                    bad[nr_bad] = page;
                nr_bad++;
                done = 1;
            }
        }
        buffer += done * PAGE;
        skip += done;
        while (i < nr_runs && skip >= runs[i].nr_pages)
            skip -= runs[i++].nr_pages;
    }
    // A pid may have become another's meanwhile. The file has not: is its address space alive still, then it was this one's.
    char byte;
    if (by_pid && pread(mem_fd, &byte, 1, (off_t)(by_pid * PAGE)) == 0)
        return -ESRCH;
    return (int64_t)nr_bad;
}

// Write runs of pages, in order, from `buffer`, which has `size` pages; pages that cannot be written go into bad[] as above.
// mem_fd also passes protections. missing: NULL, or where to put pages in place.
int64_t snap_write_runs(int pid, int mem_fd, const struct snap_missing *missing, const struct snap_run_pages *runs,
                        size_t nr_runs, const char *buffer, uint64_t size, uint64_t *bad, size_t max_bad)
{
    struct iovec remote[MAX_IOV], local;
    size_t nr_bad = 0, i = 0;
    uint64_t skip = 0;                  // pages of runs[i] that are done

    if (!runs_fit(runs, nr_runs, size))
        return -EOVERFLOW;
    while (i < nr_runs) {
        size_t n = 0, left, most = MAX_IOV;
        uint64_t limit = 4096, pages = 0;
        if (missing && skip < runs[i].nr_pages) {
            int inside;
            uint64_t here = same_kind(missing, runs[i].first + skip, runs[i].nr_pages - skip, &inside);
            int64_t placed = inside ? place_pages(missing->uffd, runs[i].first + skip, here, buffer) : 0;
            if (placed < 0)
                return placed;
            if (placed) {
                buffer += (uint64_t)placed * PAGE;
                skip += (uint64_t)placed;
                if (skip == runs[i].nr_pages) {
                    skip = 0;
                    i++;
                }
                continue;
            }
            most = 1;
            limit = inside ? 1 : here;  // the next may be its again
        }
        for (size_t j = i; j < nr_runs && n < most && pages < limit; j++, n++) {
            uint64_t from = j == i ? skip : 0, count = runs[j].nr_pages - from;
            if (count > limit - pages && most == 1)
                count = limit - pages;
            remote[n].iov_base = (void *)((runs[j].first + from) * PAGE);
            remote[n].iov_len = count * PAGE;
            pages += count;
        }
        local.iov_base = (void *)buffer;
        local.iov_len = pages * PAGE;
        ssize_t moved = process_vm_writev(pid, &local, 1, remote, n, 0);
        if (moved < 0 && errno == ESRCH)
            return -ESRCH;
        left = moved > 0 ? (size_t)moved / PAGE : 0;
        buffer += left * PAGE;
        while (left) {                  // step over what was moved
            uint64_t here = runs[i].nr_pages - skip;
            if (left < here) {
                skip += left;
                break;
            }
            left -= here;
            skip = 0;
            i++;
        }
        if (moved >= 0 && (uint64_t)moved == pages * PAGE)
            continue;
        // The next page stopped us: it goes through the file, then the fast way is tried again.
        while (i < nr_runs && skip < runs[i].nr_pages) {
            uint64_t page = runs[i].first + skip;
            ssize_t put = pwrite(mem_fd, buffer, PAGE, (off_t)(page * PAGE));
            if (put < 0 && errno == EINTR)      // 0 says nothing about errno, which may be an old one
                continue;
            if (put == 0)
                return -ESRCH;          // the file's way to say that this address space is no more
            if (put != (ssize_t)PAGE) {
                if (nr_bad < max_bad)
                    bad[nr_bad] = page;
                nr_bad++;
            }
            buffer += PAGE;
            skip++;
            break;
        }
        if (i < nr_runs && skip == runs[i].nr_pages) {
            skip = 0;
            i++;
        }
    }
    return (int64_t)nr_bad;
}

// -- PAGEMAP_SCAN (Linux 6.7; headers may be older than the kernel) ---------------------------------------

struct snap_region {                    // struct page_region
    uint64_t start, end, categories;
};

struct snap_pm_scan {                   // struct pm_scan_arg
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, category_inverted, category_mask,
        category_anyof_mask, return_mask;
};
_Static_assert(sizeof(struct snap_pm_scan) == 96, "pm_scan_arg has 12 words");
#define SNAP_PAGEMAP_SCAN _IOWR('f', 16, struct snap_pm_scan)

// Scan [*start, end) until done or `out` is full; *start moves to where it stopped. Returns nr of regions.
int64_t snap_pagemap_scan(int fd, uint64_t *start, uint64_t end, uint64_t flags, uint64_t inverted, uint64_t mask,
                          uint64_t anyof, uint64_t return_mask, struct snap_region *out, size_t max_out)
{
    size_t n = 0;
    while (*start < end && n < max_out) {
        struct snap_pm_scan arg = {
            .size = sizeof(arg), .flags = flags, .start = *start, .end = end,
            .vec = (uint64_t)(uintptr_t)(out + n), .vec_len = max_out - n,
            .category_inverted = inverted, .category_mask = mask, .category_anyof_mask = anyof,
            .return_mask = return_mask,
        };
        int got = ioctl(fd, SNAP_PAGEMAP_SCAN, &arg);
        if (got < 0) {
            if (errno == EINTR)
                continue;
            return -errno;
        }
        n += (size_t)got;
        if (arg.walk_end <= *start)
            break;
        *start = arg.walk_end;
    }
    return (int64_t)n;
}

// -- the first stub -------------------------------------------------------------------------------------

static void birth(int exe_fd, int go_fd)
{
    static char name[] = "snap-stub";
    static char *argv[] = {name, NULL}, *envp[] = {NULL};
    struct { void *handler; unsigned long flags; void *restorer; uint64_t mask; } dfl = {0};
    uint64_t none = 0;
    char byte;

    // Blocks until snap has seized us; when snap is dead it reads nothing and nothing is left of us.
    while (1) {
        ssize_t got = read(go_fd, &byte, 1);
        if (got == 1)
            break;
        if (got == 0 || errno != EINTR)
            _exit(1);
    }
    for (int s = 1; s <= 64; s++)
        syscall(SYS_rt_sigaction, s, &dfl, NULL, 8);
    syscall(SYS_rt_sigprocmask, SIG_SETMASK, &none, NULL, 8);
    syscall(SYS_close_range, 0, ~0U, 4 /* CLOSE_RANGE_CLOEXEC */);
    syscall(SYS_execveat, exe_fd, "", argv, envp, AT_EMPTY_PATH);
    _exit(127);
}

// Make process `pid` (0: any), reparented to the nearest subreaper or init. It waits for a byte on go_fd[0]
// and then becomes the program exe_fd. Returns its pid or -errno.
int snap_spawn_stub(int exe_fd, int pid, int go_read, int go_write)
{
    int answer[2], result = -EIO, status;
    struct clone_args args = {.exit_signal = SIGCHLD};
    int want[1] = {pid};

    if (pid) {
        args.set_tid = (uint64_t)(uintptr_t)want;
        args.set_tid_size = 1;
    }
    if (pipe2(answer, O_CLOEXEC) < 0)
        return -errno;
    int middle = (int)syscall(SYS_fork);
    if (middle < 0) {
        result = -errno;
        close(answer[0]);
        close(answer[1]);
        return result;
    }
    if (middle == 0) {
        close(go_write);
        int child = (int)syscall(SYS_clone3, &args, sizeof(args));
        if (child == 0) {
            close(answer[0]);
            close(answer[1]);
            birth(exe_fd, go_read);
        }
        int said = child < 0 ? -errno : child;
        ssize_t ignored = write(answer[1], &said, sizeof(said));
        (void)ignored;
        _exit(0);
    }
    close(answer[1]);
    ssize_t got;
    do {
        got = read(answer[0], &result, sizeof(result));
    } while (got < 0 && errno == EINTR);
    if (got != (ssize_t)sizeof(result))
        result = -EIO;
    close(answer[0]);
    while (waitpid(middle, &status, __WALL) < 0 && errno == EINTR)
        ;
    return result;
}
