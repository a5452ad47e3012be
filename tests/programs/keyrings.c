/* Session keyrings: one process has none of its own, but its user's default one; another has one of its own in which its user's is
 * linked, and says where request_key(2) is to put keys. Both are of a user that nobody else here is. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/wait.h>

#define USER 54321
#define DEFAULT_NAME "_uid_ses.54321"

static struct {
    atomic_int ready, ending;
    int found[2], linked, destination;
} *shared;

static long keyctl(long what, long one, long two, long three) { return syscall(SYS_keyctl, what, one, two, three, 0); }
static int finds_default(void) { return syscall(SYS_request_key, "keyring", DEFAULT_NAME, NULL, 0) > 0; }

static int has_user_keyring(void)
{
    int keys[64], user = (int)keyctl(0, -4, 0, 0);
    long size = keyctl(11, -3, (long)keys, sizeof(keys));
    for (long at = 0; at < size / 4 && at < 64; at++)
        if (keys[at] == user)
            return 1;
    return 0;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    if (keyctl(0, -4, 0, 0) < 0) { /* a kernel without keys, or a container that may not ask */
        check_ready();
        check_wait();
        return check_done();
    }
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    pid_t children[2];
    for (int i = 0; i < 2; i++) {
        children[i] = MUST(fork());
        if (children[i])
            continue;
        MUST(setresuid(USER, USER, USER));
        MUST(keyctl(0, -5, 0, 0)); /* its default keyrings exist */
        MUST(keyctl(1, i ? 0 : (long)DEFAULT_NAME, 0, 0));
        if (i) {
            MUST(keyctl(8, -4, -3, 0));
            MUST(keyctl(14, 4, 0, 0)); /* KEYCTL_SET_REQKEY_KEYRING: the user's */
        }
        if (finds_default() != !i)
            check_die("session keyring of child %d", i);
        atomic_fetch_add(&shared->ready, 1);
        while (!atomic_load(&shared->ending))
            usleep(1000);
        shared->found[i] = finds_default();
        if (i) {
            shared->linked = has_user_keyring();
            shared->destination = (int)keyctl(14, -1, 0, 0);
        }
        _exit(0);
    }
    while (atomic_load(&shared->ready) != 2)
        usleep(1000);
    check_ready();
    check_wait();
    atomic_store(&shared->ending, 1);
    for (int i = 0; i < 2; i++)
        CHECK(waitpid(children[i], NULL, 0) == children[i], "child %d is gone", i);
    CHECK(shared->found[0], "its session keyring is not its user's default one");
    CHECK(!shared->found[1], "its session keyring is not its own");
    CHECK(shared->linked, "its user's keyring is not in its session keyring");
    CHECK(shared->destination == 4, "keys go to %d", shared->destination);
    return check_done();
}
