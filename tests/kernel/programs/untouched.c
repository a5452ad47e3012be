// A job that notices whatever is done to it: vector registers, general registers, the red zone, the
// signal mask, the alternate stack, interrupted calls. Counts up in a shared file while all is well;
// says what is wrong on stderr and exits 1. Modes: spin, sleep, sigsuspend, ppoll, threads, read.
#define _GNU_SOURCE
#include "progress.h"
#include <errno.h>
#include <fcntl.h>
#include <immintrin.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

static char altstack[65536];
static volatile sig_atomic_t alarms;
static int use_avx;

static void bad(const char *what)
{
    fprintf(stderr, "untouched: %s\n", what);
    _exit(1);
}

static void on_alarm(int sig)
{
    (void)sig;
    char here;
    if (&here < altstack || &here >= altstack + sizeof(altstack))
        bad("a handler ran off the alternate stack");
    alarms++;
}

// 200,000 rounds in registers only, with a value below rsp; any foreign write shows.
static int registers_hold(uint64_t seed)
{
    uint64_t ok, r8 = seed, r9 = ~seed, rb = seed * 3;
    __asm__ volatile("movq %[r8], -8(%%rsp)\n"
                     "movq %[r9], -128(%%rsp)\n"
                     "movq %[r8], %%r8\n movq %[r9], %%r9\n movq %[rb], %%r12\n"
                     "movq %%r8, %%xmm3\n movq %%r9, %%xmm15\n"
                     "movl $200000, %%ecx\n"
                     "1: cmpq -8(%%rsp), %%r8\n jne 2f\n"
                     "cmpq -128(%%rsp), %%r9\n jne 2f\n"
                     "movq %%xmm3, %%rax\n cmpq %%rax, %%r8\n jne 2f\n"
                     "movq %%xmm15, %%rax\n cmpq %%rax, %%r9\n jne 2f\n"
                     "cmpq %[rb], %%r12\n jne 2f\n"
                     "decl %%ecx\n jnz 1b\n movl $1, %%eax\n jmp 3f\n"
                     "2: xorl %%eax, %%eax\n 3:\n"
                     : "=&a"(ok)
                     : [r8] "r"(r8), [r9] "r"(r9), [rb] "r"(rb)
                     : "rcx", "r8", "r9", "r12", "xmm3", "xmm15", "memory", "cc");
    return (int)ok;
}

// The upper halves of ymm registers: lost when a signal frame restores x87 and SSE only.
__attribute__((target("avx2"))) static int upper_halves_hold(uint64_t seed)
{
    uint64_t in[4] = {seed, seed + 1, seed + 2, seed + 3}, ok;
    __asm__ volatile("vmovdqu (%[in]), %%ymm5\n vmovdqu (%[in]), %%ymm6\n"
                     "movl $200000, %%ecx\n"
                     "1: vpcmpeqq %%ymm5, %%ymm6, %%ymm7\n vpmovmskb %%ymm7, %%eax\n cmpl $-1, %%eax\n jne 2f\n"
                     "vpcmpeqq (%[in]), %%ymm5, %%ymm7\n vpmovmskb %%ymm7, %%eax\n cmpl $-1, %%eax\n jne 2f\n"
                     "decl %%ecx\n jnz 1b\n movl $1, %%eax\n jmp 3f\n 2: xorl %%eax, %%eax\n 3: vzeroupper\n"
                     : "=&a"(ok)
                     : [in] "r"(in)
                     : "rcx", "xmm5", "xmm6", "xmm7", "memory", "cc");
    return (int)ok;
}

static void check_task(void)
{
    sigset_t mask, want;
    stack_t alt;
    sigprocmask(SIG_SETMASK, NULL, &mask);
    sigemptyset(&want);
    sigaddset(&want, SIGUSR2);
    if (memcmp(&mask, &want, 8))
        bad("the signal mask changed");
    sigaltstack(NULL, &alt);
    if (alt.ss_sp != altstack || alt.ss_flags & SS_DISABLE)
        bad("the alternate stack changed");
}

static void *spinner(void *arg)
{
    uint64_t n = (uint64_t)(uintptr_t)arg;
    for (;;) {
        if (!registers_hold(n))
            bad("general registers, xmm or the red zone changed (thread)");
        progress[n]++;
        struct timespec ts = {0, 200000};
        if (nanosleep(&ts, NULL) && errno != EINTR)
            bad("nanosleep failed (thread)");
    }
    return NULL;
}

int main(int argc, char **argv)
{
    if (argc < 3)
        return 2;
    open_progress(argv[1]);
    use_avx = __builtin_cpu_supports("avx2");

    stack_t alt = {.ss_sp = altstack, .ss_size = sizeof(altstack)};
    sigaltstack(&alt, NULL);
    struct sigaction act = {.sa_handler = on_alarm, .sa_flags = SA_ONSTACK | SA_RESTART};
    sigaction(SIGALRM, &act, NULL);
    sigset_t block, none;
    sigemptyset(&block);
    sigemptyset(&none);
    sigaddset(&block, SIGUSR2);
    sigprocmask(SIG_SETMASK, &block, NULL);

    const char *mode = argv[2];
    int pipes[2];
    if (pipe(pipes))
        return 2;
    if (!strcmp(mode, "threads"))
        for (uint64_t i = 1; i < 4; i++) {
            pthread_t thread;
            pthread_create(&thread, NULL, spinner, (void *)(uintptr_t)i);
        }
    for (uint64_t n = 1;; n++) {
        check_task();
        if (!strcmp(mode, "spin") || !strcmp(mode, "threads")) {
            if (!registers_hold(n * 0x9e3779b97f4a7c15))
                bad("general registers, xmm or the red zone changed");
            if (use_avx && !upper_halves_hold(n))
                bad("upper halves of ymm changed");
        } else if (!strcmp(mode, "sleep")) {
            struct timespec ts = {0, 20 * 1000 * 1000}, begin, end;
            clock_gettime(CLOCK_MONOTONIC, &begin);
            if (nanosleep(&ts, NULL))
                bad("nanosleep was interrupted");
            clock_gettime(CLOCK_MONOTONIC, &end);
            if ((end.tv_sec - begin.tv_sec) * 1000000000L + end.tv_nsec - begin.tv_nsec < 20 * 1000 * 1000)
                bad("nanosleep came back early");
        } else if (!strcmp(mode, "sigsuspend")) {
            struct itimerspec its = {{0, 0}, {0, 10 * 1000 * 1000}};
            timer_t timer;
            int before = alarms;
            struct sigevent ev = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM};
            sigset_t wait_mask = none, with_alarm = block;
            sigaddset(&with_alarm, SIGALRM);
            sigprocmask(SIG_SETMASK, &with_alarm, NULL);
            timer_create(CLOCK_MONOTONIC, &ev, &timer);
            timer_settime(timer, 0, &its, NULL);
            if (sigsuspend(&wait_mask) != -1 || errno != EINTR || alarms != before + 1)
                bad("sigsuspend came back without its signal");
            timer_delete(timer);
            sigset_t now;
            sigprocmask(SIG_SETMASK, NULL, &now);
            if (memcmp(&now, &with_alarm, 8))
                bad("sigsuspend did not put the mask back");
            sigprocmask(SIG_SETMASK, &block, NULL);
        } else if (!strcmp(mode, "ppoll")) {
            struct timespec ts = {0, 15 * 1000 * 1000};
            struct pollfd pfd = {pipes[0], POLLIN, 0};
            if (ppoll(&pfd, 1, &ts, &none) != 0)
                bad("ppoll was interrupted");
        } else {
            return 2;
        }
        progress[0]++;
    }
}
