/* Threads that do not share with their process: descriptors of their own with a pipe's content, a lock and other files under the same
 * numbers; a working directory and umask of their own; and threads that share those with each other. */
// snap-test: requires pidfd_thread
#include "selfcheck.h"
#include <linux/kcmp.h>
#include <pthread.h>
#include <sched.h>
#include <sys/file.h>
#include <sys/stat.h>

#define NR 8
#define FD 77
enum { LEADER, COMMON, FILES, FILES_TOO, FS, FS_TOO, BOTH, CLOSED };

static pid_t tids[NR];
static atomic_int nr_ready, ending, nr_done;
static int saw_fd[NR], read_char[NR];
static mode_t saw_umask[NR];
static char saw_cwd[NR][256];
static pthread_t below[NR];

static void put(int number, char content)
{
    int ends[2];
    MUST(pipe2(ends, O_NONBLOCK));
    MUST(write(ends[1], &content, 1));
    MUST(dup2(ends[0], number));
    MUST(close(ends[0]));
}

static void *thread_main(void *argument)
{
    long index = (long)argument;
    char content = 0, path[64];
    tids[index] = check_gettid();
    if (index == FILES || index == BOTH || index == CLOSED)
        MUST(unshare(CLONE_FILES));
    if (index == FS || index == BOTH)
        MUST(unshare(CLONE_FS));
    if (index == FILES || index == BOTH)
        put(FD, (char)('a' + index));
    if (index == FILES) {
        int fd = MUST(open("locked", O_RDWR | O_CREAT, 0600));
        struct flock lock = {.l_type = F_WRLCK, .l_start = 10, .l_len = 5};
        MUST(fcntl(fd, F_SETLK, &lock));
    }
    if (index == CLOSED)
        MUST(syscall(SYS_close_range, 0, ~0U, 0));
    if (index == FS || index == BOTH) {
        snprintf(path, sizeof(path), "of-%ld", index);
        MUST(mkdir(path, 0700));
        MUST(chdir(path));
        umask((mode_t)(index * 010));
    }
    if (index == FILES || index == FS)
        pthread_create(&below[index + 1], NULL, thread_main, (void *)(index + 1));
    atomic_fetch_add(&nr_ready, 1);
    while (!atomic_load(&ending))
        usleep(1000);
    saw_fd[index] = fcntl(FD, F_GETFD) >= 0;
    /* Those that share find what the first has left. */
    if (index == FILES_TOO)
        while (atomic_load(&nr_done) == 0)
            usleep(1000);
    if ((index == COMMON || index == FILES || index == BOTH) && read(FD, &content, 1) == 1)
        read_char[index] = content;
    if (index == FILES_TOO)
        saw_fd[index] = fcntl(FD + 1, F_GETFD) >= 0;
    if (index == FILES) {
        dup2(FD, FD + 1);
        atomic_fetch_add(&nr_done, 1);
    }
    saw_umask[index] = check_umask();
    if (getcwd(saw_cwd[index], sizeof(saw_cwd[index])) == NULL)
        saw_cwd[index][0] = 0;
    if (index == FILES || index == FS)
        pthread_join(below[index + 1], NULL);
    return NULL;
}

static void compare(char *same)
{
    for (int kind = 0; kind < 2; kind++)
        for (int i = 0; i < NR; i++)
            for (int j = 0; j < NR; j++)
                *same++ = (char)(MUST(syscall(SYS_kcmp, tids[i], tids[j], kind ? KCMP_FS : KCMP_FILES, 0, 0)) == 0);
}

int main(int argc, char **argv)
{
    static char before[2 * NR * NR], after[2 * NR * NR];
    pthread_t threads[NR];
    check_init(argc, argv);
    put(FD, 'L');
    umask(022);
    tids[LEADER] = getpid();
    for (long i = COMMON; i < NR; i++)
        if (i != FILES_TOO && i != FS_TOO)
            pthread_create(&threads[i], NULL, thread_main, (void *)i);
    while (atomic_load(&nr_ready) != NR - 1)
        usleep(1000);
    compare(before);
    check_ready();
    check_wait();

    compare(after);
    for (int i = 0; i < 2 * NR * NR; i++)
        CHECK(before[i] == after[i], "%s of %d and %d: shared %d, now %d", i < NR * NR ? "descriptors" : "directories", i / NR % NR,
              i % NR, before[i], after[i]);
    int fd = open("locked", O_RDWR);
    struct flock lock = {.l_type = F_WRLCK, .l_start = 0, .l_len = 100};
    CHECK(fcntl(fd, F_GETLK, &lock) == 0 && lock.l_type == F_WRLCK && lock.l_start == 10 && lock.l_len == 5, "the lock: %d, %ld",
          lock.l_type, (long)lock.l_start);
    CHECK(lock.l_pid == getpid(), "the lock is of %d", lock.l_pid);
    atomic_store(&ending, 1);
    for (int i = COMMON; i < NR; i++)
        if (i != FILES_TOO && i != FS_TOO)
            pthread_join(threads[i], NULL);
    char content = 0;
    CHECK(read_char[COMMON] == 'L', "the common thread read %d", read_char[COMMON]);
    CHECK(read(FD, &content, 1) == -1 && errno == EAGAIN, "the pipe was not read");
    CHECK(read_char[FILES] == 'a' + FILES && read_char[BOTH] == 'a' + BOTH, "own pipes: %d, %d", read_char[FILES], read_char[BOTH]);
    CHECK(saw_fd[FILES_TOO], "the second one does not see the first one's descriptor");
    CHECK(!saw_fd[CLOSED], "a descriptor that was closed is there");
    CHECK(fcntl(FD + 1, F_GETFD) == -1, "a descriptor of another table is here");
    for (int i = COMMON; i < NR; i++) {
        char expected[4400];
        int own = i == FS_TOO ? FS : i;
        if (own == FS || own == BOTH)
            snprintf(expected, sizeof(expected), "%s/of-%d", check_directory, own);
        else
            snprintf(expected, sizeof(expected), "%s", check_directory);
        CHECK(strcmp(saw_cwd[i], expected) == 0, "thread %d is in %s", i, saw_cwd[i]);
        mode_t mask = own == FS || own == BOTH ? (mode_t)(own * 010) : 022;
        CHECK(saw_umask[i] == mask, "thread %d has umask %o", i, saw_umask[i]);
    }
    return check_done();
}
