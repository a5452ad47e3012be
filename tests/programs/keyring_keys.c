// snap-test: unchecked
/* Keys in every keyring that ends with its job, which a point does not have; and a process without a session keyring, which must not have
 * got one from being looked at. Only taken, never rolled back (test_surroundings.py). */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/wait.h>

#define USER 54322
static struct {
    atomic_int ready, ending, before, after;
} *shared;

static long keyctl(long what, long one, long two, long three) { return syscall(SYS_keyctl, what, one, two, three, 0); }

/* Whoever has no session keyring finds the default one of whatever user it becomes. */
static int has_none(void)
{
    int status = 0;
    pid_t child = fork();
    if (child == 0) {
        syscall(SYS_setresuid, USER + 1, -1, -1);
        keyctl(0, -5, 0, 0);
        _exit(syscall(SYS_request_key, "keyring", "_uid_ses.54323", NULL, 0) > 0);
    }
    waitpid(child, &status, 0);
    return WEXITSTATUS(status);
}

static void add(const char *name, int keyring) { MUST(syscall(SYS_add_key, "user", name, "secret", 6, keyring)); }

int main(int argc, char **argv)
{
    check_init(argc, argv);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t child = MUST(fork());
    if (child == 0) {
        MUST(syscall(SYS_setresuid, USER, -1, -1));
        shared->before = has_none();
        shared->ready = 1;
        while (!shared->ending)
            usleep(1000);
        shared->after = has_none();
        _exit(0);
    }
    while (!shared->ready)
        usleep(1000);
    MUST(keyctl(1, 0, 0, 0));
    MUST(keyctl(0, -4, 0, 0));
    MUST(keyctl(8, -4, -3, 0)); /* is not lost */
    add("snap-session", -3);
    add("snap-process", -2);
    add("snap-process-2", -2);
    add("snap-thread", -1);
    check_ready();
    check_wait();
    shared->ending = 1;
    waitpid(child, NULL, 0);
    CHECK(shared->before == shared->after, "without a session keyring: %d, was %d", shared->after, shared->before);
    return check_done();
}
