/* A job that is busy with everything that a snap that is killed could spoil: vector registers, a memory pattern, a pipe between two
 * threads, timers, sleeps, descriptors; in two processes. Each activity counts in a shared file ("progress") as long as it finds
 * everything as it must be. */
#include "selfcheck.h"
#include <immintrin.h>
#include <math.h>
#include <pthread.h>
#include <sys/mman.h>
#include <sys/wait.h>

enum { FLOATS, VECTORS, MEMORY, PIPE, TIMER, SLEEP, NR_ACTIVITIES };
#define NR_PAGES 64
#define NR_STEPS 50000
#define PAUSE_US 1000 /* 200 takes on a machine with few cores must not take long */

static struct {
    atomic_ulong progress[2][NR_ACTIVITIES];
    atomic_int ending;
} *shared;
static int side, ends[2];
static atomic_int failed, alarms;

static void count(int activity)
{
    atomic_fetch_add(&shared->progress[side][activity], 1);
}

static int over(void)
{
    return atomic_load(&shared->ending);
}

static void spoilt(const char *what)
{
    CHECK(0, "process %d: %s", side, what);
    atomic_store(&failed, 1);
}

/* The logistic map is chaotic: one bit that is lost at any time shows in the result. */
static __attribute__((noinline)) double orbit(double x, int steps)
{
    for (int i = 0; i < steps; i++)
        x = 3.9999 * x * (1 - x);
    return x;
}

static void *floats(void *unused)
{
    (void)unused;
    const double expected = orbit(0.3141592, NR_STEPS);
    while (!over()) {
        if (orbit(0.3141592, NR_STEPS) != expected || fabs(sin(1.0) * sin(1.0) + cos(1.0) * cos(1.0) - 1) > 1e-12)
            spoilt("floating point");
        count(FLOATS);
        usleep(PAUSE_US);
    }
    return NULL;
}

__attribute__((target("avx2"))) static int vectors_hold(uint64_t seed)
{
    uint64_t in[4] = {seed, seed + 1, seed + 2, seed + 3}, ok;
    __asm__ volatile("vmovdqu (%[in]), %%ymm5\n vmovdqu (%[in]), %%ymm15\n"
                     "movq %[seed], -128(%%rsp)\n"
                     "movl $100000, %%ecx\n"
                     "1: vpcmpeqq %%ymm5, %%ymm15, %%ymm7\n vpmovmskb %%ymm7, %%eax\n cmpl $-1, %%eax\n jne 2f\n"
                     "cmpq %[seed], -128(%%rsp)\n jne 2f\n"
                     "decl %%ecx\n jnz 1b\n movl $1, %%eax\n jmp 3f\n 2: xorl %%eax, %%eax\n 3: vzeroupper\n"
                     : "=&a"(ok)
                     : [in] "r"(in), [seed] "r"(seed)
                     : "rcx", "xmm5", "xmm7", "xmm15", "memory", "cc");
    return (int)ok;
}

static void *vectors(void *unused)
{
    (void)unused;
    for (uint64_t seed = 1; !over(); seed++) {
        if (__builtin_cpu_supports("avx2") && !vectors_hold(seed * 0x9e3779b97f4a7c15u))
            spoilt("vector registers or the red zone");
        count(VECTORS);
        usleep(PAUSE_US);
    }
    return NULL;
}

static void *memory(void *unused)
{
    (void)unused;
    uint64_t(*pages)[512] = mmap(NULL, NR_PAGES * 4096, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    uint64_t written[NR_PAGES] = {0}, random = 1;
    for (uint64_t sequence = 1; !over(); sequence++) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        int at = (int)(random >> 40) % NR_PAGES;
        for (int i = 0; i < 512; i++)
            if (written[at] && pages[at][i] != written[at] * 31 + (uint64_t)i)
                spoilt("a page is not what was written to it");
        written[at] = sequence;
        for (int i = 0; i < 512; i++)
            pages[at][i] = sequence * 31 + (uint64_t)i;
        count(MEMORY);
        if (sequence % 16 == 0)
            usleep(PAUSE_US);
    }
    return NULL;
}

static void *writer(void *unused)
{
    (void)unused;
    for (uint64_t n = 0; !over(); n++) {
        if (write(ends[1], &n, sizeof(n)) != sizeof(n))
            spoilt("a write to the pipe failed");
        usleep(PAUSE_US);
    }
    close(ends[1]);
    return NULL;
}

static void *reader(void *unused)
{
    (void)unused;
    uint64_t n, expected = 0;
    ssize_t got;
    while ((got = read(ends[0], &n, sizeof(n))) > 0) {
        if (got != sizeof(n) || n != expected++)
            spoilt("the pipe lost or repeated something");
        count(PIPE);
    }
    if (got < 0)
        spoilt("a read from the pipe failed");
    return NULL;
}

static void *sleeper(void *unused)
{
    (void)unused;
    const struct timespec nap = {0, 3000000};
    while (!over()) {
        double begin = check_now(CLOCK_MONOTONIC);
        if (nanosleep(&nap, NULL) != 0)
            spoilt("a sleep was interrupted");
        if (check_now(CLOCK_MONOTONIC) - begin < 0.003)
            spoilt("a sleep ended early");
        struct pollfd nothing = {ends[0], 0, 0};
        if (poll(&nothing, 0, 3) != 0)
            spoilt("a poll was interrupted");
        count(SLEEP);
    }
    return NULL;
}

static void on_alarm(int sig, siginfo_t *info, void *context)
{
    (void)sig;
    (void)context;
    if (info->si_value.sival_int != 4711)
        spoilt("a timer's value changed");
    atomic_fetch_add(&alarms, 1);
    count(TIMER);
}

static void run(void)
{
    void *(*const mains[])(void *) = {floats, vectors, memory, writer, reader, sleeper};
    pthread_t threads[sizeof(mains) / sizeof(mains[0])];
    sigset_t handled;
    MUST(pipe2(ends, O_CLOEXEC));
    /* For the main thread alone: any other one whose call a handler interrupts would take that for snap's doing. */
    sigemptyset(&handled);
    sigaddset(&handled, SIGALRM);
    sigaddset(&handled, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &handled, NULL);
    for (size_t i = 0; i < sizeof(mains) / sizeof(mains[0]); i++)
        pthread_create(&threads[i], NULL, mains[i], NULL);
    pthread_sigmask(SIG_UNBLOCK, &handled, NULL);
    struct sigaction action = {.sa_sigaction = on_alarm, .sa_flags = SA_SIGINFO | SA_RESTART};
    MUST(sigaction(SIGALRM, &action, NULL));
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGALRM, .sigev_value.sival_int = 4711};
    struct itimerspec period = {{0, 5000000}, {0, 5000000}}, now;
    timer_t timer;
    MUST(timer_create(CLOCK_MONOTONIC, &event, &timer));
    MUST(timer_settime(timer, 0, &period, NULL));
    for (int i = 0; i < NR_ACTIVITIES; i++)
        while (!atomic_load(&shared->progress[side][i]))
            usleep(500);
    if (side == 0)
        check_ready();
    check_wait();
    MUST(timer_gettime(timer, &now));
    CHECK(now.it_interval.tv_nsec == period.it_interval.tv_nsec, "the timer's interval changed");
    timer_delete(timer);
    atomic_store(&shared->ending, 1);
    for (size_t i = 0; i < sizeof(mains) / sizeof(mains[0]); i++)
        pthread_join(threads[i], NULL);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    int fd = MUST(open("progress", O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    MUST(ftruncate(fd, 4096));
    shared = mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    close(fd);
    pid_t child = MUST(fork());
    side = child == 0;
    if (side == 0)
        while (!atomic_load(&shared->progress[1][TIMER]))
            usleep(500);
    run();
    if (side == 1)
        _exit(atomic_load(&failed));
    int status;
    kill(child, SIGTERM);
    CHECK(waitpid(child, &status, 0) == child && status == 0, "the child: status %#x", status);
    return check_done();
}
