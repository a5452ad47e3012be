/* What confines a process, or a thread of it, and comes back: see checkpoint/confinement.md. */
#include "selfcheck.h"

#include <pthread.h>
#include <sched.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/stat.h>

#ifndef PR_SET_MDWE
#define PR_SET_MDWE 65
#define PR_GET_MDWE 66
#define PR_MDWE_REFUSE_EXEC_GAIN 1
#endif
#define NR_MSEAL 462
#define PAGE 4096

static pthread_barrier_t prepared, over;
static struct stat wanted;

/* One thread is confined, the others are not. */
static void *confined(void *unused)
{
    struct stat root;
    int mode = 0;

    (void)unused;
    if (mkdir("root", 0755) || stat("root", &wanted) || unshare(CLONE_FS) || chroot("root"))
        check_die("chroot");
    if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) || prctl(PR_SET_TSC, PR_TSC_SIGSEGV, 0, 0, 0) || prctl(PR_CAPBSET_DROP, 12, 0, 0, 0))
        check_die("confine a thread");
    pthread_barrier_wait(&prepared);
    pthread_barrier_wait(&over);
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1, "the thread may gain privileges again");
    CHECK(prctl(PR_GET_TSC, &mode, 0, 0, 0) == 0 && mode == PR_TSC_SIGSEGV, "the thread may read the time stamp counter");
    CHECK(stat("/", &root) == 0 && root.st_ino == wanted.st_ino && root.st_dev == wanted.st_dev, "its root is another");
    CHECK(prctl(PR_CAPBSET_READ, 12, 0, 0, 0) == 0, "the thread's bounding set has grown");
    return NULL;
}

int main(int argc, char **argv)
{
    pthread_t thread;
    int mode = 0;

    check_init(argc, argv);
    pthread_barrier_init(&prepared, NULL, 2);
    pthread_barrier_init(&over, NULL, 2);
    if (pthread_create(&thread, NULL, confined, NULL))
        check_die("pthread_create");
    pthread_barrier_wait(&prepared);
    char *pages = mmap(NULL, 2 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (pages == MAP_FAILED)
        check_die("mmap");
    int seals = syscall(NR_MSEAL, pages, PAGE, 0) == 0; /* Linux 6.10 */
    int mdwe = prctl(PR_SET_MDWE, PR_MDWE_REFUSE_EXEC_GAIN, 0, 0, 0) == 0; /* Linux 6.3 */
    int memory = memfd_create("sealed", MFD_ALLOW_SEALING);
    if (memory < 0 || ftruncate(memory, PAGE) || fcntl(memory, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_WRITE))
        check_die("seal a memfd");
    if (prctl(PR_SET_DUMPABLE, 0, 0, 0, 0))
        check_die("PR_SET_DUMPABLE");
    check_ready();
    check_wait();
    CHECK(!seals || munmap(pages, PAGE) == -1, "a sealed mapping can be unmapped");
    CHECK(!mdwe || prctl(PR_GET_MDWE, 0, 0, 0, 0) == PR_MDWE_REFUSE_EXEC_GAIN, "memory may gain PROT_EXEC");
    CHECK(!mdwe || mprotect(pages + PAGE, PAGE, PROT_READ | PROT_EXEC) == -1, "memory has gained PROT_EXEC");
    CHECK(write(memory, "x", 1) == -1 && errno == EPERM, "a sealed memfd can be written to");
    CHECK(prctl(PR_GET_DUMPABLE, 0, 0, 0, 0) == 0, "its memory is its user's to look at");
    CHECK(prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 0, "all threads have what one had asked for");
    CHECK(prctl(PR_GET_TSC, &mode, 0, 0, 0) == 0 && mode == PR_TSC_ENABLE, "all threads have what one had asked for");
    pthread_barrier_wait(&over);
    pthread_join(thread, NULL);
    return check_done();
}
