// What is asked of each of many ranges of an address space, in one go: a job may have tens of thousands of VMAs, and stands still
// meanwhile. Which pages they have, and registering them with a userfaultfd.
#include <errno.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>
#include <sys/ioctl.h>
#include "native.h"
#include "watch_cdef.h"

// <linux/userfaultfd.h> and <linux/fs.h>, which older headers have in part.
#define UFFDIO_REGISTER 0xc020aa00UL
#define MODE_WP 2
#define PAGEMAP_SCAN 0xc0606610UL
#define CHECK_WPASYNC 2
#define IS_WRITTEN 2
#define PAGE 4096UL

struct pm_scan {
    uint64_t size, flags, start, end, walk_end, vec, vec_len, max_pages, inverted, mask, anyof, returned;
};

static int reg(int uffd, uint64_t start, uint64_t end)
{
    struct { uint64_t start, length, mode, ioctls; } arg = {start, end - start, MODE_WP, 0};
    return ioctl(uffd, UFFDIO_REGISTER, &arg) < 0 ? errno : 0;
}

// Whether the VMA at `start` is registered with any: one page is asked about, nothing is changed. EPERM: it is not.
static int is_watched(int pagemap, uint64_t start)
{
    struct snap_region found;
    struct pm_scan arg = {
        .size = sizeof(arg), .flags = CHECK_WPASYNC, .start = start, .end = start + PAGE, .vec = (uint64_t)(uintptr_t)&found,
        .vec_len = 1, .mask = IS_WRITTEN, .returned = IS_WRITTEN,
    };
    return ioctl(pagemap, PAGEMAP_SCAN, &arg) >= 0;
}

// How each range, which is exactly a VMA, stands (SNAP_W_*). With a userfaultfd (else -1) they are registered with it, but for
// those that cannot be: errors[i] says why. Watched VMAs that follow each other without a hole take one call for all of them.
void snap_watch(int uffd, int pagemap, const struct snap_range *ranges, size_t nr, uint8_t *states, int32_t *errors)
{
    for (size_t i = 0; i < nr; i++) {
        states[i] = is_watched(pagemap, ranges[i].start) ? SNAP_W_WATCHED : 0;
        errors[i] = 0;
    }
    for (size_t i = 0, next; uffd >= 0 && i < nr; i = next) {
        for (next = i + 1; next < nr && ranges[next].start == ranges[next - 1].end && states[next] == states[i]; next++)
            ;
        int error = reg(uffd, ranges[i].start, ranges[next - 1].end);
        for (size_t k = i; k < next; k++) {
            errors[k] = error && next - i > 1 ? reg(uffd, ranges[k].start, ranges[k].end) : error;
            if (!errors[k])
                states[k] |= SNAP_W_OURS;
        }
    }
}

// Matching regions of each range, without side effects. Returns how many; scan->next is nr when that is all. Negative errno.
int64_t snap_scan_ranges(int pagemap, const struct snap_range *ranges, size_t nr, struct snap_scan *scan,
                         struct snap_region *out, size_t room)
{
    size_t n = 0;
    for (; scan->next < nr; scan->next++, scan->position = 0) {
        uint64_t end = ranges[scan->next].end;
        if (!scan->position)
            scan->position = ranges[scan->next].start;
        while (scan->position < end) {
            struct pm_scan arg = {
                .size = sizeof(arg), .start = scan->position, .end = end, .vec = (uint64_t)(uintptr_t)(out + n), .vec_len = room - n,
                .inverted = scan->inverted, .mask = scan->mask, .anyof = scan->any_of, .returned = scan->wanted,
            };
            if (n == room)
                return (int64_t)n;
            int got = ioctl(pagemap, PAGEMAP_SCAN, &arg);
            if (got < 0 && errno == EINTR)
                continue;
            if (got < 0)
                return -errno;
            n += (size_t)got;
            if (arg.walk_end <= scan->position)
                return -EIO;
            scan->position = arg.walk_end;
        }
    }
    return (int64_t)n;
}
