/* POSIX shared memory and a named semaphore: shared with a child under their names, descriptors closed and open; the child maps one
 * read-only. What is in them is the point's, as private memory is. */
#include "selfcheck.h"
#include <semaphore.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

#define SIZE (5 * 4096 + 100)

struct shared {
    char text[64];
    atomic_int of_parent, of_child, told;
};

static char names[3][64];

static volatile struct shared *open_shared(const char *name, int *fd)
{
    *fd = MUST(shm_open(name, O_RDWR | O_CREAT | O_EXCL, 0640));
    MUST(ftruncate(*fd, SIZE));
    void *area = MUST(mmap(NULL, SIZE, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0));
    return area;
}

/* Answers by adding one: through memory that the parent has mapped writable, seeing it read-only too. */
static void child_main(volatile struct shared *area, const char *name, sem_t *go)
{
    int fd = MUST(shm_open(name, O_RDONLY, 0));
    const volatile struct shared *view = MUST(mmap(NULL, SIZE, PROT_READ, MAP_SHARED, fd, 0));
    const volatile struct shared *private = MUST(mmap(NULL, SIZE, PROT_READ, MAP_PRIVATE, fd, 0));
    close(fd);
    int mine = 0;
    area->told = -1;
    while (getppid() != 1) {
        while (sem_wait(go) != 0)
            ;
        if (view->of_child != mine || private->of_child != mine || strcmp((const char *)view->text, "kept") != 0)
            _exit(3);
        area->of_child = ++mine;
        area->told = area->of_parent;
    }
    _exit(4);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    for (int i = 0; i < 3; i++)
        snprintf(names[i], sizeof(names[i]), "/snapprog.%d.%d", (int)getpid(), i);
    int fd, other_fd;
    volatile struct shared *area = open_shared(names[0], &fd);
    close(fd);
    volatile struct shared *open_one = open_shared(names[1], &other_fd);
    MUST(fchmod(other_fd, 0604));
    sem_t *go = sem_open(names[2], O_CREAT | O_EXCL, 0600, 0);
    if (go == SEM_FAILED)
        check_die("sem_open");
    strcpy((char *)area->text, "kept");
    ((volatile char *)area)[SIZE - 1] = 'z';
    strcpy((char *)open_one->text, "open");
    pid_t child = MUST(fork());
    if (child == 0)
        child_main(area, names[0], go);
    while (!area->told)
        usleep(1000);
    int mine = 0;
    check_ready();
    /* Goes on counting all the time, so that what is there at the rollback is not what was there at the point. */
    while (!check_term) {
        area->of_parent = ++mine;
        sem_post(go);
        for (int tries = 0; area->told != mine && tries < 5000 && !check_failures; tries++)
            usleep(1000);
        CHECK(area->told == mine, "told %d of %d", area->told, mine);
        CHECK(area->of_child == mine, "the child counted %d of %d", area->of_child, mine);
        usleep(500);
        if (check_failures)
            break;
    }
    while (!check_term)
        usleep(1000);
    CHECK(strcmp((const char *)area->text, "kept") == 0 && ((volatile char *)area)[SIZE - 1] == 'z', "its text is lost");
    CHECK(strcmp((const char *)open_one->text, "open") == 0, "the other's text is lost");
    struct stat of_fd, of_path;
    char path[128];
    snprintf(path, sizeof(path), "/dev/shm%s", names[1]);
    CHECK(fstat(other_fd, &of_fd) == 0 && stat(path, &of_path) == 0 && of_fd.st_ino == of_path.st_ino, "not the named one");
    CHECK((of_path.st_mode & 07777) == 0604 && of_path.st_size == SIZE, "mode %o, size %ld", of_path.st_mode, (long)of_path.st_size);
    kill(child, SIGKILL);
    int status;
    MUST(waitpid(child, &status, 0));
    CHECK(WIFSIGNALED(status), "the child ended with %d", WEXITSTATUS(status));
    for (int i = 0; i < 2; i++)
        shm_unlink(names[i]);
    sem_unlink(names[2]);
    return check_done();
}
