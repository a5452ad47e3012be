/* Locks that only a mapping holds any more: files that were opened, locked, mapped and closed, as Java has its counters in /tmp. Whoever
 * opens the file anew must find it locked. And a child that maps one of them, too, and lives on when its parent has unmapped it. */
#include "selfcheck.h"
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/wait.h>

#define NR 4
static char names[NR][128] = {"exclusive", "shared", "description", ""};

static int is_locked(int i)
{
    struct flock lock = {.l_type = F_WRLCK, .l_start = 10, .l_len = 5};
    int fd = open(names[i], O_RDWR);
    if (fd < 0)
        return -1;
    int found = i == 2 ? fcntl(fd, F_OFD_GETLK, &lock) == 0 && lock.l_type == F_RDLCK && lock.l_start == 12 && lock.l_len == 2
                       : flock(fd, LOCK_EX | LOCK_NB) < 0 && errno == EWOULDBLOCK;
    if (i == 1 && flock(fd, LOCK_SH | LOCK_NB) < 0)
        found = -2;
    close(fd);
    return found;
}

int main(int argc, char **argv)
{
    void *places[NR];
    check_init(argc, argv);
    snprintf(names[3], sizeof(names[3]), "/dev/shm/snap-test-locked-%d", (int)getpid());
    for (int i = 0; i < NR; i++) {
        struct flock lock = {.l_type = F_RDLCK, .l_start = 12, .l_len = 2};
        int fd = MUST(open(names[i], O_RDWR | O_CREAT, 0600));
        MUST(ftruncate(fd, 4096));
        MUST(i == 2 ? fcntl(fd, F_OFD_SETLK, &lock) : flock(fd, (i == 1 ? LOCK_SH : LOCK_EX) | LOCK_NB));
        places[i] = mmap(NULL, 4096, PROT_READ | PROT_WRITE, i == 1 ? MAP_PRIVATE : MAP_SHARED, fd, 0);
        if (places[i] == MAP_FAILED)
            check_die("mmap %d", i);
        MUST(close(fd));
        if (is_locked(i) != 1)
            check_die("file %d is not locked", i);
    }
    pid_t child = MUST(fork());
    if (child == 0)
        for (;;)
            pause();
    munmap(places[0], 4096);
    check_ready();
    check_wait();
    for (int i = 0; i < NR; i++)
        CHECK(is_locked(i) == 1, "file %d: %d", i, is_locked(i));
    kill(child, SIGKILL);
    CHECK(waitpid(child, NULL, 0) == child, "the child is gone");
    CHECK(is_locked(0) == 0, "the first is locked by nobody's mapping");
    CHECK(is_locked(3) == 1, "the last is not locked by the parent");
    unlink(names[3]);
    return check_done();
}
