/* Locks of every kind and who has them: flock(2) by a parent and by a child on descriptions that both have, fcntl(2) of each, OFD
 * locks. /proc/locks says the same before and after. */
#include "selfcheck.h"
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define NR 6
#define LINE 512
static const char *const names[NR] = {"parent's", "child's", "read", "posix", "ofd", "leased"};
static struct {
    char before[16 * LINE], after[16 * LINE];
    atomic_int ready;
} *shared;

static int by_text(const void *one, const void *other) { return strcmp(one, other); }

/* The locks of our files, without the leading number: kind, mode, pid, inode, range. Sorted: the kernel's order is that of CPUs. */
static void look(char *text, const int *fds)
{
    static char found[16][LINE];
    char line[LINE / 2], wanted[NR][32];
    size_t nr = 0;
    for (int i = 0; i < NR; i++) {
        char path[64];
        snprintf(path, sizeof(path), "/proc/self/fdinfo/%d", fds[i]);
        FILE *info = fopen(path, "r");
        while (info && fgets(line, sizeof(line), info))
            if (sscanf(line, "ino: %31s", wanted[i]) == 1)
                break;
        fclose(info);
    }
    for (int i = 0; i < NR; i++) {
        FILE *locks = fopen("/proc/locks", "r");
        while (fgets(line, sizeof(line), locks)) {
            char *rest = strchr(line, ' ');
            char place[512];
            snprintf(place, sizeof(place), ":%s ", wanted[i]);
            if (rest && strstr(rest, place) && nr < 16)
                snprintf(found[nr++], LINE, "%s:%s", names[i], rest);
        }
        fclose(locks);
    }
    qsort(found, nr, LINE, by_text);
    for (size_t i = 0; i < nr; i++)
        text = stpcpy(text, found[i]);
}

int main(int argc, char **argv)
{
    int fds[NR];
    check_init(argc, argv);
    shared = mmap(NULL, sizeof(*shared), PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
    for (int i = 0; i < NR; i++)
        fds[i] = MUST(open(names[i], O_RDWR | O_CREAT, 0600));
    MUST(flock(fds[0], LOCK_EX));
    struct flock lock = {.l_type = F_RDLCK, .l_start = 100, .l_len = 0}, ofd = {.l_type = F_WRLCK, .l_start = 3, .l_len = 4};
    MUST(fcntl(fds[3], F_SETLK, &lock));
    MUST(fcntl(fds[4], F_OFD_SETLK, &ofd));
    signal(SIGIO, SIG_IGN);
    MUST(fcntl(fds[5], F_SETLEASE, F_WRLCK));
    pid_t child = MUST(fork());
    if (child == 0) {
        struct flock mine = {.l_type = F_WRLCK, .l_start = 7, .l_len = 1};
        MUST(flock(fds[1], LOCK_EX));
        MUST(flock(fds[2], LOCK_SH));
        MUST(fcntl(fds[3], F_SETLK, &mine));
        atomic_store(&shared->ready, 1);
        for (;;)
            pause();
    }
    while (!atomic_load(&shared->ready))
        usleep(1000);
    look(shared->before, fds);
    check_ready();
    check_wait();
    look(shared->after, fds);
    CHECK(strcmp(shared->before, shared->after) == 0, "locks were\n%sand are\n%s", shared->before, shared->after);
    CHECK(fcntl(fds[5], F_GETLEASE) == F_WRLCK && fcntl(fds[5], F_GETOWN) == getpid(), "lease %d of %d", fcntl(fds[5], F_GETLEASE),
          fcntl(fds[5], F_GETOWN));
    CHECK(fcntl(fds[5], F_SETLEASE, F_UNLCK) == 0, "the lease cannot be given up: %d", errno);
    kill(child, SIGKILL);
    CHECK(waitpid(child, NULL, 0) == child, "the child is gone");
    return check_done();
}
