/*
 * Self-checking programs: each prepares some state of its own, says that it is ready, waits for SIGTERM and then checks
 * that the state is still what it was. In between it may be taken, killed and rolled back; it must not notice.
 *
 *     int main(int argc, char **argv)
 *     {
 *         check_init(argc, argv);      // argv[1]: the directory of this run, which becomes the working directory
 *         ... prepare ...
 *         check_ready();               // the file "ready" appears, with the pid
 *         check_wait();                // until SIGTERM
 *         CHECK(value == 42, "value is %d", value);
 *         return check_done();         // the file "out" appears; its last line is PASS or FAIL: reasons
 *     }
 *
 * Lines of a program that begin with "// snap-test:" are read by tests/roundtrip:
 *     // snap-test: requires FEATURE...      skipped without them
 *     // snap-test: refused TEXT             take must refuse it, saying TEXT, and the program still passes
 *     // snap-test: children                 not only the root's state: all tasks of the tree are waited for
 */
#ifndef SELFCHECK_H
#define SELFCHECK_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <time.h>
#include <unistd.h>

static volatile sig_atomic_t check_term;
static atomic_int check_failures;
static char check_text[4096];
static char check_directory[4096];

__attribute__((unused)) static void check_on_term(int sig)
{
    (void)sig;
    check_term = 1;
}

__attribute__((unused, noreturn, format(printf, 1, 2))) static void check_die(const char *format, ...)
{
    va_list args;
    va_start(args, format);
    fprintf(stderr, "cannot prepare: ");
    vfprintf(stderr, format, args);
    fprintf(stderr, ": %s\n", strerror(errno));
    va_end(args);
    _exit(99);
}

__attribute__((unused, format(printf, 2, 3))) static void check_fail(const char *where, const char *format, ...)
{
    char line[512];
    va_list args;
    va_start(args, format);
    vsnprintf(line, sizeof(line), format, args);
    va_end(args);
    fprintf(stderr, "%s: %s\n", where, line);
    if (atomic_fetch_add(&check_failures, 1) < 8) {
        size_t used = strlen(check_text);
        snprintf(check_text + used, sizeof(check_text) - used, " %s;", line);
    }
}

#define CHECK_STR2(x) #x
#define CHECK_STR(x) CHECK_STR2(x)
#define CHECK(condition, ...)                                                                                          \
    do {                                                                                                               \
        if (!(condition))                                                                                              \
            check_fail(__FILE__ ":" CHECK_STR(__LINE__), __VA_ARGS__);                                                 \
    } while (0)
/* While preparing: a call that must not fail. */
#define MUST(expression)                                                                                               \
    ({                                                                                                                 \
        __typeof__(expression) must_result = (expression);                                                             \
        if (must_result == (__typeof__(expression))-1)                                                                 \
            check_die("%s", #expression);                                                                              \
        must_result;                                                                                                   \
    })

__attribute__((unused)) static void check_put(const char *name, const char *text)
{
    char temporary[4200], target[4200];
    snprintf(temporary, sizeof(temporary), "%s/.%s.%d", check_directory, name, (int)getpid());
    snprintf(target, sizeof(target), "%s/%s", check_directory, name);
    int fd = MUST(open(temporary, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666));
    MUST(write(fd, text, strlen(text)));
    MUST(close(fd));
    MUST(rename(temporary, target));
}

__attribute__((unused)) static void check_init(int argc, char **argv)
{
    if (argc < 2 || chdir(argv[1]) != 0)
        check_die("usage: %s DIRECTORY", argv[0]);
    snprintf(check_directory, sizeof(check_directory), "%s", argv[1]);
    struct sigaction action = {.sa_handler = check_on_term};
    MUST(sigaction(SIGTERM, &action, NULL));
}

__attribute__((unused)) static void check_ready(void)
{
    char text[32];
    snprintf(text, sizeof(text), "%d\n", (int)getpid());
    check_put("ready", text);
}

/* Until SIGTERM; any other signal handler may run meanwhile. */
__attribute__((unused)) static void check_wait(void)
{
    sigset_t term, old, during;
    sigemptyset(&term);
    sigaddset(&term, SIGTERM);
    sigprocmask(SIG_BLOCK, &term, &old);
    during = old;
    sigdelset(&during, SIGTERM);
    /* A process-directed SIGTERM may be taken by another thread, which wakes nobody here: look now and then. */
    const struct timespec beat = {0, 200000000};
    while (!check_term)
        ppoll(NULL, 0, &beat, &during);
    sigprocmask(SIG_SETMASK, &old, NULL);
}

__attribute__((unused)) static int check_done(void)
{
    int failures = atomic_load(&check_failures);
    char text[5000];
    if (failures == 0)
        snprintf(text, sizeof(text), "PASS\n");
    else
        snprintf(text, sizeof(text), "FAIL:%s %d in all\n", check_text, failures);
    check_put("out", text);
    return failures != 0;
}

__attribute__((unused)) static double check_now(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return (double)now.tv_sec + (double)now.tv_nsec * 1e-9;
}

/* The umask of the calling thread, only read: whoever shares it would see umask(0) while it is being asked that way. */
__attribute__((unused)) static mode_t check_umask(void)
{
    char line[256];
    unsigned mask = ~0U;
    FILE *status = fopen("/proc/thread-self/status", "re");
    while (status != NULL && mask == ~0U && fgets(line, sizeof(line), status) != NULL)
        sscanf(line, "Umask: %o", &mask);
    if (status != NULL)
        fclose(status);
    return (mode_t)mask;
}

__attribute__((unused)) static pid_t check_gettid(void)
{
    return (pid_t)syscall(SYS_gettid);
}

#endif
