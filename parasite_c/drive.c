// Driving: a stopped task runs until it has done what it was sent to do, and stands still again.
//
// Owns the ptrace stops of a batch and how long they are waited for. A call may not come back (a file system whose server is
// gone): the wait then ends, the task is still inside, and only its fail-safe frame can bring it out, once snap lets it go.
// Errors come back as negative errno.
#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <signal.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/ptrace.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/user.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>
#include "native.h"
#include "drive_cdef.h"

#define NR_RT_SIGRETURN 15
#define NS_PER_MS 1000000LL
#define NS_PER_S 1000000000LL
#define PATIENCE_MS 1000        // so much longer for the task to come back when a signal wants us
#define TICK_MS 100
#define SETSIGMASK 0x420b

#ifndef PTRACE_EVENT_STOP
#define PTRACE_EVENT_STOP 128
#endif

// -- waiting with a limit -----------------------------------------------------------------------------------------
//
// waitpid(2) has no time limit. A timer of this thread's own interrupts it, by a signal whose default is to be ignored, so that
// a late one does no harm; it ticks on, because the first may come just before the wait begins.

#define TICK SIGURG

static __thread int timer_made;
static __thread int timer_number;       // the kernel's timer_t
static __thread pid_t timer_process;    // a child has no timers

static void ignore(int sig)
{
    (void)sig;
}

static int make_timer(void)
{
    struct sigaction old, handler = {.sa_handler = ignore};     // no SA_RESTART
    struct { union sigval value; int signo, notify, tid, pad[11]; } event = {
        .signo = TICK, .notify = 4 /* SIGEV_THREAD_ID */, .tid = (int)syscall(SYS_gettid),
    };
    sigset_t tick;

    if (timer_made && timer_process == getpid())
        return 0;
    if (sigaction(TICK, NULL, &old) < 0)
        return -errno;
    if (!(old.sa_flags & SA_SIGINFO) && (old.sa_handler == SIG_DFL || old.sa_handler == SIG_IGN))
        if (sigaction(TICK, &handler, NULL) < 0)
            return -errno;
    // Whoever started us may have it blocked.
    sigemptyset(&tick);
    sigaddset(&tick, TICK);
    pthread_sigmask(SIG_UNBLOCK, &tick, NULL);
    if (syscall(SYS_timer_create, CLOCK_MONOTONIC, &event, &timer_number) < 0)
        return -errno;
    timer_made = 1;
    timer_process = getpid();
    return 0;
}

static int64_t now_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * NS_PER_S + now.tv_nsec;
}

// Ticks from the deadline on; 0 ends them.
static int set_timer(int64_t deadline_ns)
{
    struct itimerspec when = {0};

    if (deadline_ns) {
        int error = make_timer();
        if (error)
            return error;
        when.it_value.tv_sec = deadline_ns / NS_PER_S;
        when.it_value.tv_nsec = deadline_ns % NS_PER_S;
        when.it_interval.tv_nsec = TICK_MS * NS_PER_MS;
    }
    if (syscall(SYS_timer_settime, timer_number, TIMER_ABSTIME, &when, NULL) < 0)
        return -errno;
    return 0;
}

struct limit {
    int64_t deadline_ns;                // 0: none
};

static int begin(struct limit *limit, uint32_t limit_ms)
{
    limit->deadline_ns = limit_ms ? now_ns() + limit_ms * NS_PER_MS : 0;
    return limit_ms ? set_timer(limit->deadline_ns) : 0;
}

static void end(const struct limit *limit)
{
    if (limit->deadline_ns)
        set_timer(0);
}

// The next stop of a task, or its end; -ETIMEDOUT.
static int wait_for(int tid, struct limit *limit, int *status)
{
    for (;;) {
        *status = 0;
        if (waitpid(tid, status, __WALL) >= 0)
            return 0;
        if (errno == ECHILD)
            return 0;                   // reaped by another thread of ours: it is gone
        if (errno != EINTR)
            return -errno;
        int64_t now = now_ns(), soon = now + PATIENCE_MS * NS_PER_MS;
        if (limit->deadline_ns && now >= limit->deadline_ns)
            return -ETIMEDOUT;
        // Not our tick, so somebody wants us: Ctrl-C, mostly.
        if (!limit->deadline_ns || soon < limit->deadline_ns) {
            limit->deadline_ns = soon;
            int error = set_timer(soon);
            if (error)
                return error;
        }
    }
}

// -- until it is done ---------------------------------------------------------------------------------------------

// On to its next stop. 1: it is gone, and `d` says so.
static int go_on(int request, int tid, int sig, struct limit *limit, struct snap_drive *d)
{
    if (ptrace(request, tid, 0, (void *)(long)sig) < 0 && errno != ESRCH)   // dying: the wait says how
        return -errno;
    int error = wait_for(tid, limit, &d->status);
    if (error)
        return error;
    if (WIFSTOPPED(d->status))
        return 0;
    d->outcome = SNAP_DRIVE_GONE;
    return 1;
}

// A stop that is not the awaited one. Returns the signal to go on with, or -1: a fault, and `d` says so.
static int pass_by(int tid, struct snap_drive *d)
{
    int event = d->status >> 16, stop = WSTOPSIG(d->status);

    if (event == PTRACE_EVENT_STOP)     // an interrupt, or a group-stop that the kernel puts back when we detach
        return 0;
    if (event) {
        unsigned long message = 0;
        if (ptrace(PTRACE_GETEVENTMSG, tid, 0, &message) == 0)
            d->new_tid = (int)message;
        return 0;
    }
    if (stop == SIGSEGV || stop == SIGBUS || stop == SIGILL || stop == SIGFPE || stop == SIGSYS || stop == SIGTRAP) {
        d->outcome = SNAP_DRIVE_FAULT;
        return -1;
    }
    return stop;                        // everything that can be blocked is: this is SIGSTOP
}

static int drive_until(int tid, uint64_t until, struct limit *limit, struct snap_drive *d)
{
    int in_call = 0, matched = 0, sig = 0, error;

    while (sig >= 0) {
        if ((error = go_on(PTRACE_SYSCALL, tid, sig, limit, d)))
            return error > 0 ? 0 : error;
        int stop = WSTOPSIG(d->status);
        if (d->status >> 16 || (stop != (SIGTRAP | 0x80) && stop != SIGTRAP)) {
            sig = pass_by(tid, d);
            continue;
        }
        sig = 0;
        in_call = !in_call;
        if (in_call) {
            errno = 0;
            long nr = ptrace(PTRACE_PEEKUSER, tid, offsetof(struct user_regs_struct, orig_rax), 0);
            if ((uint64_t)nr == until) {
                matched = 1;
            } else if (nr == NR_RT_SIGRETURN && until == SNAP_SENTINEL) {
                // SNAP_B_LEAVE: the way out is the announcement. Call it off; it was not to happen yet.
                if (ptrace(PTRACE_POKEUSER, tid, offsetof(struct user_regs_struct, orig_rax), -1L) < 0)
                    return -errno;
                matched = 1;
            }
        } else if (matched) {
            d->outcome = SNAP_DRIVE_DONE;
            return 0;
        }
    }
    return 0;
}

// A signal that came from somebody else, and that the task itself has blocked, is pending again as it would be without us. At a stop for
// `sentinel`: the kernel queues anew what is blocked when it is to be delivered, and traps before the task runs on.
static int put_back(int tid, int sentinel, siginfo_t *foreign, struct limit *limit, struct snap_drive *d)
{
    int sig = sentinel, error;

    if (ptrace(PTRACE_SETSIGINFO, tid, 0, foreign) < 0)
        return -errno;
    do {
        if (ptrace(PTRACE_INTERRUPT, tid, 0, 0) < 0)
            return -errno;
        if ((error = go_on(PTRACE_CONT, tid, sig, limit, d)))
            return error > 0 ? 0 : error;
    } while (d->status >> 16 != PTRACE_EVENT_STOP && (sig = pass_by(tid, d)) >= 0);
    return 0;
}

static int set_mask(int tid, uint64_t mask)
{
    return ptrace(SETSIGMASK, tid, (void *)sizeof(mask), &mask) < 0 ? -errno : 0;
}

static int drive_signal(int tid, int sentinel, int blocked, uint64_t ended, struct limit *limit, struct snap_drive *d)
{
    siginfo_t foreign = {0};
    int sig = 0, error;

    // For no longer than the batch: what comes at any other time waits as the task wants it to.
    if (blocked && (error = set_mask(tid, ~(1UL << (sentinel - 1)))))
        return error;
    while (sig >= 0) {
        if ((error = go_on(PTRACE_CONT, tid, sig, limit, d)))
            return error > 0 ? 0 : error;
        if (d->status >> 16 || WSTOPSIG(d->status) != sentinel) {
            sig = pass_by(tid, d);
            continue;
        }
        sig = 0;
        errno = 0;
        long word = ptrace(PTRACE_PEEKDATA, tid, ended, 0);
        if (errno)
            return -errno;
        if ((uint32_t)word != SNAP_NOT_ENDED) {
            if (blocked && (error = set_mask(tid, ~0UL)))
                return error;
            if (foreign.si_signo && (error = put_back(tid, sentinel, &foreign, limit, d)))
                return error;
            if (d->outcome == SNAP_DRIVE_RUNNING)
                d->outcome = SNAP_DRIVE_DONE;
            return 0;
        }
        // One of a number is pending at most.
        if (blocked && !foreign.si_signo && ptrace(PTRACE_GETSIGINFO, tid, 0, &foreign) < 0)
            return -errno;
    }
    return 0;
}

static int finished(const struct limit *limit, struct snap_drive *d, int error)
{
    end(limit);
    if (error && error != -ETIMEDOUT)
        d->outcome = SNAP_DRIVE_ERROR;
    return error;
}

// Let a stopped task run until it leaves system call `until` (the sentinel, or one call made through
// a gadget). Counts on being called at a stop that is not a syscall entry. -ETIMEDOUT: it has not come back after
// limit_ms (0: no limit), or after a second when a signal came for us; it runs on, and `outcome` says so.
int snap_drive_until(int tid, uint64_t until, uint32_t limit_ms, struct snap_drive *d)
{
    struct limit limit;

    d->new_tid = 0;
    int error = begin(&limit, limit_ms);
    if (error)
        return error;
    d->outcome = SNAP_DRIVE_RUNNING;
    return finished(&limit, d, drive_until(tid, until, &limit, d));
}

// The same for a batch that announces its end by signal `sig`: no stop for each call. `ended` is the address
// of its stopped_at, which tells our signal from one that somebody else sent (which the task ignores; or, with `blocked`, keeps).
int snap_drive_signal(int tid, int sentinel, int blocked, uint64_t ended, uint32_t limit_ms, struct snap_drive *d)
{
    struct limit limit;

    d->new_tid = 0;
    int error = begin(&limit, limit_ms);
    if (error)
        return error;
    d->outcome = SNAP_DRIVE_RUNNING;
    return finished(&limit, d, drive_signal(tid, sentinel, blocked, ended, &limit, d));
}
