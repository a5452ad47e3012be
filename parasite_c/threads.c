// Many threads of one process, all of them stopped and traced by us: what Python would need a dozen calls for each
// to find out, and one batch that each of them runs in turn. In the frozen window that is what a thread costs.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <sys/user.h>
#include <unistd.h>
#include "native.h"
#include "drive_cdef.h"
#include "threads_cdef.h"

#define PAGE 4096UL
#define WORD 8
#define ALIGN 64
#define GETSIGMASK 0x420a
#define SETSIGMASK 0x420b
#define GET_RSEQ 0x420f
#define GET_DISPATCH 0x4211
#define XSTATE 0x202
#define IOPERM 0x201                    // NT_386_IOPERM
#define GET_THREAD_AREA 25
#define TLS_FIRST 12                    // GDT_ENTRY_TLS_MIN of x86-64
#define TLS_ENTRIES 3
#define TLS_EMPTY 0x28                  // of user_desc: read_exec_only, seg_not_present
#define EFLAGS 0x202                    // interrupts on, direction and trap flags clear
#define RSEQ_SECTION 8                  // offset of rseq_cs in struct rseq
#define KCMP_FILES 2
#define KCMP_FS 3

_Static_assert(sizeof(struct user_regs_struct) == 216, "27 words");

size_t snap_frame_size(size_t xstate_used);
size_t snap_put_frame(void *out, uint64_t address, const struct snap_regs *regs, uint64_t sigmask,
                      uint64_t restorer, const void *xstate, size_t xstate_used);

// The whole file, or as much as fits. Negative errno when it cannot be read.
static int64_t slurp(const char *path, char *out, size_t size)
{
    size_t n = 0;
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return -errno;
    while (n < size) {
        ssize_t got = read(fd, out + n, size - n);
        if (got < 0 && errno == EINTR)
            continue;
        if (got < 0) {
            int error = errno;
            close(fd);
            return -error;
        }
        if (got == 0)
            break;
        n += (size_t)got;
    }
    close(fd);
    return (int64_t)n;
}

// Files one after the other into `room`; paths end with a zero byte each. lengths[i]: how much there is of it, or
// 0xffffffff where it could not be read. Returns all that was read, or -ENOSPC when it does not fit.
int64_t snap_read_files(const char *paths, char *room, size_t size, uint32_t *lengths, size_t nr)
{
    size_t used = 0;
    for (size_t i = 0; i < nr; i++, paths += strlen(paths) + 1) {
        int64_t got = slurp(paths, room + used, size - used);
        lengths[i] = got < 0 ? 0xffffffffU : (uint32_t)got;
        if (got > 0)
            used += (size_t)got;
        if (used >= size)
            return -ENOSPC;
    }
    return (int64_t)used;
}

// Whether a frame of ours may be where the task would take one: at rsp, or a word below it.
static int suspect(const struct user_regs_struct *regs, int mem_fd, const char *code_magic, const char *frame_magic,
                   uint64_t second)
{
    const uint64_t before[2] = {ALIGN, second};
    char found[SNAP_MAGIC_SIZE];

    if (pread(mem_fd, found, sizeof(found), (off_t)(regs->rip & -PAGE)) == (ssize_t)sizeof(found) &&
        !memcmp(found, code_magic, sizeof(found)))
        return 1;
    for (uint64_t passed = 0; passed <= WORD; passed += WORD)
        for (int k = 0; k < 2; k++) {
            uint64_t frame = regs->rsp - passed;
            if (frame % ALIGN == 0 &&
                pread(mem_fd, found, sizeof(found), (off_t)(frame - before[k])) == (ssize_t)sizeof(found) &&
                !memcmp(found, frame_magic, sizeof(found)))
                return 1;
        }
    return 0;
}

// SNAP_HAS_*: entries of the GDT (set_thread_area(2), by the 32-bit system call) and a bitmap of I/O ports (ioperm(2)).
static uint32_t special(int tid)
{
    uint32_t area[4], found = 0;
    char bitmap[8192];
    struct iovec iov = {bitmap, sizeof(bitmap)};
    for (long entry = TLS_FIRST; entry < TLS_FIRST + TLS_ENTRIES; entry++)
        if (ptrace(GET_THREAD_AREA, tid, (void *)entry, area) == 0 && (area[1] || area[2] || area[3] != TLS_EMPTY))
            found |= SNAP_HAS_SEGMENTS;
    if (ptrace(PTRACE_GETREGSET, tid, (void *)IOPERM, &iov) == 0 && iov.iov_len)
        found |= SNAP_HAS_PORTS;
    return found;
}

struct room {
    char *start;
    size_t size, used;
};

static void note(struct room *room, int64_t got, uint32_t *at, uint32_t *length)
{
    *at = (uint32_t)room->used;
    *length = got > 0 ? (uint32_t)got : 0;
    room->used += *length;
    room->used = (room->used + 63) & ~(size_t)63;
    if (room->used > room->size)
        room->used = room->size;
}

static int read_one(int pid, int mem_fd, struct snap_thread *t, struct room *room, const char *code_magic,
                    const char *frame_magic, uint64_t second)
{
    struct { uint64_t pointer; uint32_t size, signature, flags, pad; } rseq = {0};
    uint64_t dispatch[4] = {0};
    struct user_regs_struct *regs = (struct user_regs_struct *)t->regs;
    struct iovec iov;
    char path[64];
    int64_t got;

    t->failed = SNAP_T_REGS;
    if (ptrace(PTRACE_GETREGS, t->tid, 0, regs) < 0)
        return errno;
    t->failed = SNAP_T_MASK;
    if (ptrace(GETSIGMASK, t->tid, (void *)WORD, &t->sigmask) < 0)
        return errno;
    t->failed = SNAP_T_RSEQ;
    if (ptrace(GET_RSEQ, t->tid, (void *)sizeof(rseq), &rseq) < 0)
        return errno;
    t->rseq_pointer = rseq.pointer;
    t->rseq_size = rseq.size;
    t->rseq_signature = rseq.signature;
    t->rseq_flags = rseq.flags;
    if (rseq.pointer && rseq.size >= RSEQ_SECTION + WORD) {
        t->failed = SNAP_T_SECTION;
        if (pread(mem_fd, &t->rseq_section, WORD, (off_t)(rseq.pointer + RSEQ_SECTION)) != WORD)
            return errno ? errno : EIO;
    }
    if (ptrace(GET_DISPATCH, t->tid, (void *)sizeof(dispatch), dispatch) < 0) {
        if (errno == ESRCH)
            return errno;
        dispatch[0] = 0;                // this kernel cannot say
    }
    t->dispatch = dispatch[0];
    t->special = special(t->tid);
    t->suspect = (uint32_t)suspect(regs, mem_fd, code_magic, frame_magic, second);

    t->failed = SNAP_T_XSTATE;
    iov.iov_base = room->start + room->used;
    iov.iov_len = room->size - room->used;
    if (ptrace(PTRACE_GETREGSET, t->tid, (void *)XSTATE, &iov) < 0)
        return errno;
    if (iov.iov_len == room->size - room->used)
        return ENOSPC;
    note(room, (int64_t)iov.iov_len, &t->xstate_at, &t->xstate_length);

    t->failed = SNAP_T_STAT;
    snprintf(path, sizeof(path), "/proc/%d/task/%d/stat", pid, t->tid);
    got = slurp(path, room->start + room->used, room->size - room->used);
    if (got < 0)
        return (int)-got;
    note(room, got, &t->stat_at, &t->stat_length);
    t->failed = SNAP_T_STATUS;
    strcat(path, "us");
    got = slurp(path, room->start + room->used, room->size - room->used);
    if (got < 0)
        return (int)-got;
    note(room, got, &t->status_at, &t->status_length);

    t->failed = SNAP_T_ROBUST;
    if (syscall(SYS_get_robust_list, t->tid, &t->robust_list, &t->robust_length) < 0)
        return errno;
    t->failed = SNAP_T_SCHEDULING;
    if (syscall(SYS_sched_getattr, t->tid, t->scheduling, sizeof(t->scheduling), 0) < 0)
        return errno;
    got = syscall(SYS_sched_getaffinity, t->tid, room->size - room->used, room->start + room->used);
    if (got < 0)
        return errno;
    note(room, got, &t->affinity_at, &t->affinity_length);
    got = syscall(SYS_ioprio_get, 1 /* IOPRIO_WHO_PROCESS */, t->tid);
    t->io_priority = got < 0 ? 0 : (int32_t)got;
    t->own = 0;
    if (t->tid != pid) {
        // A kernel without kcmp(2) was refused before.
        if (syscall(SYS_kcmp, pid, t->tid, KCMP_FILES, 0, 0) > 0)
            t->own |= SNAP_OWN_FILES;
        if (syscall(SYS_kcmp, pid, t->tid, KCMP_FS, 0, 0) > 0)
            t->own |= SNAP_OWN_FS;
    }
    t->failed = 0;
    return room->used < room->size ? 0 : ENOSPC;
}

// Which tasks have the same object (kcmp(2), `kind`): first[i] is the lowest j of those that share with i, i itself for one
// that shares with nobody, or cannot be compared. `order` is room for nr numbers. Zombies have nothing, and are equal in
// that: they are the caller's to leave out. The kernel's order is total, so that n tasks cost n log n comparisons.
void snap_share(int kind, const int32_t *tids, size_t nr, uint32_t *first, uint32_t *order)
{
    size_t known = 0;
    for (size_t i = 0; i < nr; i++) {
        size_t low = 0, high = known;
        first[i] = (uint32_t)i;
        while (low < high) {
            size_t middle = (low + high) / 2;
            long way = syscall(SYS_kcmp, tids[i], tids[order[middle]], kind, 0, 0);
            if (way < 0 || way == 3)
                break;
            if (way == 0) {
                first[i] = order[middle];
                break;
            }
            if (way == 1)
                high = middle;
            else
                low = middle + 1;
        }
        if (low < high || syscall(SYS_kcmp, tids[i], tids[i], kind, 0, 0) != 0)
            continue;
        memmove(order + low + 1, order + low, (known - low) * sizeof(*order));
        order[low] = (uint32_t)i;
        known++;
    }
}

// What there is to know of stopped threads without running anything in them. An error is noted with the thread that it
// is of, and the others are read; ENOSPC in one of them: `room` is too small for all.
int snap_read_threads(int pid, int mem_fd, struct snap_thread *threads, size_t nr, char *start, size_t size,
                      const char *code_magic, const char *frame_magic, uint64_t second)
{
    struct room room = {start, size & ~(size_t)63, 0};
    int worst = 0;
    for (size_t i = 0; i < nr; i++) {
        errno = 0;
        threads[i].error = read_one(pid, mem_fd, &threads[i], &room, code_magic, frame_magic, second);
        if (threads[i].error && worst != ENOSPC)
            worst = threads[i].error;
    }
    return worst;
}

// -- visits -----------------------------------------------------------------------------------------------------------

static int put(int mem_fd, uint64_t at, const void *data, size_t size)
{
    return pwrite(mem_fd, data, size, (off_t)at) == (ssize_t)size ? 0 : errno ? errno : EIO;
}

static int set_regs(int tid, const void *regs)
{
    return ptrace(PTRACE_SETREGS, tid, 0, regs) < 0 ? errno : 0;
}

static int set_mask(int tid, uint64_t mask)
{
    return ptrace(SETSIGMASK, tid, (void *)WORD, &mask) < 0 ? errno : 0;
}

// Leave through the frame as soon as it runs.
static int aim(const struct snap_visits *v, const struct snap_visit *one)
{
    struct user_regs_struct regs;
    memcpy(&regs, one->own, sizeof(regs));
    regs.rip = v->sigreturn;
    regs.rsp = v->place + ALIGN + WORD; // as after the `ret` that took the restorer's address from there
    regs.orig_rax = (unsigned long)-1;
    return set_regs(one->tid, &regs);
}

static int passes(int (*passed)(int), int step)
{
    return passed && passed(step) ? ECANCELED : 0;
}

static int write_frames(const struct snap_visits *v, const struct snap_visit *one, const char *xstates,
                        const char *magic, size_t magic_size)
{
    char out[SNAP_FRAMES_MOST];
    struct user_regs_struct first;
    if (v->room > sizeof(out) || v->second + snap_frame_size(one->xstate_used) > v->room)
        return ENOSPC;
    memset(out, 0, v->room);
    memcpy(out, magic, magic_size);
    if (v->room - v->second - snap_frame_size(one->xstate_used) >= magic_size)
        memcpy(out + v->room - magic_size, magic, magic_size);
    memcpy(&first, one->resume, sizeof(first));
    first.rsp = v->place + v->second;
    first.rip = v->syscall_ret;
    first.rax = v->nr_munmap;
    first.rdi = v->area;
    first.rsi = v->area_size;
    snap_put_frame(out + ALIGN, v->place + ALIGN, (const struct snap_regs *)&first, ~0UL, v->sigreturn, 0, 0);
    snap_put_frame(out + v->second, v->place + v->second, (const struct snap_regs *)one->resume, one->mask,
                   v->sigreturn, xstates + one->xstate_at, one->xstate_used);
    return put(v->mem_fd, v->place, out, v->room);
}

static int run(struct snap_visits *v, const struct snap_visit *one, const char *batch, const char *data, char *out,
               int (*passed)(int))
{
    struct snap_batch head;
    struct user_regs_struct regs;
    struct snap_drive drive = {0};
    int error;

    memcpy(&head, batch, sizeof(head));
    head.leave_sp = v->place + ALIGN;
    head.flags = SNAP_B_SIGNAL;
    head.stopped_at = SNAP_NOT_ENDED;
    head.sig = one->sig;
    head.pid = one->inner_pid;
    head.tid = one->inner_tid;
    if ((error = put(v->mem_fd, v->data, data, v->nr_data)) ||
        (error = put(v->mem_fd, v->entries + sizeof(head), batch + sizeof(head), v->nr_bytes - sizeof(head))) ||
        (error = put(v->mem_fd, v->entries, &head, sizeof(head))) || (error = passes(passed, SNAP_V_WRITTEN)))
        return error;
    memcpy(&regs, one->own, sizeof(regs));
    regs.rip = v->area;
    regs.rdi = v->entries;
    regs.rsp = v->area + v->area_size;
    regs.rax = 0;
    regs.orig_rax = (unsigned long)-1;
    regs.eflags = EFLAGS;
    if ((error = set_regs(one->tid, &regs)) || (error = passes(passed, SNAP_V_STARTED)))
        return error;
    error = -snap_drive_signal(one->tid, one->sig, one->blocked, v->entries + offsetof(struct snap_batch, stopped_at), v->limit_ms,
                               &drive);
    v->lost = drive.outcome == SNAP_DRIVE_RUNNING;
    if (error)
        return error;
    if (drive.outcome == SNAP_DRIVE_GONE) {
        v->gone = 1;
        return ESRCH;
    }
    if (drive.outcome != SNAP_DRIVE_DONE) {
        v->stop_signal = (drive.status >> 8) & 0x7f;
        return EFAULT;
    }
    if ((error = passes(passed, SNAP_V_RAN)))
        return error;
    errno = 0;
    if (pread(v->mem_fd, out, v->nr_bytes, (off_t)v->entries) != (ssize_t)v->nr_bytes ||
        pread(v->mem_fd, out + v->nr_bytes, v->nr_data, (off_t)v->data) != (ssize_t)v->nr_data)
        return errno ? errno : EIO;
    return 0;
}

// Each thread in turn goes into the parasite, runs the batch and is given its registers and mask back, by the steps
// of PROTOCOL.md ("The way in and out"), in whose middle nobody else is inside. Whatever fails, the one that is
// inside is led out before this returns its errno; but one that is lost, which nobody can reach, stays.
int snap_visit_threads(struct snap_visits *v, const struct snap_visit *visits, size_t nr, const char *xstates,
                       const char *magic, size_t magic_size, const char *batch, const char *data, char *out,
                       int (*passed)(int))
{
    v->gone = v->lost = v->stop_signal = 0;
    for (v->at = 0; (size_t)v->at < nr; v->at++, out += v->nr_bytes + v->nr_data) {
        const struct snap_visit *one = &visits[v->at];
        int error, late;

        errno = 0;
        if ((error = write_frames(v, one, xstates, magic, magic_size)) || (error = passes(passed, SNAP_V_FRAMES)))
            return error;
        // A mask that sigsuspend and its like have set for a while must end before the registers change (infection.py).
        if ((error = set_mask(one->tid, one->mask)) || (error = aim(v, one)))
            return error;
        if (!(error = passes(passed, SNAP_V_REDIRECTED)) &&
            !(error = set_mask(one->tid, ~(1UL << (one->sig - 1)))) && !(error = passes(passed, SNAP_V_BLOCKED)))
            error = run(v, one, batch, data, out, passed);
        if (v->gone || v->lost)
            return error;
        if ((late = aim(v, one)) || (late = passes(error ? 0 : passed, SNAP_V_LEAVING)))
            error = error ? error : late;
        if ((late = set_mask(one->tid, one->mask)) || (late = passes(error ? 0 : passed, SNAP_V_UNBLOCKED)))
            error = error ? error : late;
        if ((late = set_regs(one->tid, one->own)) || (late = passes(error ? 0 : passed, SNAP_V_PARKED)))
            error = error ? error : late;
        if (error)
            return error;
    }
    return 0;
}
