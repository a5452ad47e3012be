/* Two processes with one address space: named, refused, left alone. */
// snap-test: refused is shared with process
#include "selfcheck.h"
#include <sched.h>
#include <sys/mman.h>
#include <sys/wait.h>

static int child(void *unused)
{
    (void)unused;
    for (;;)
        pause();
    return 0;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    char *stack = mmap(NULL, 65536, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (stack == MAP_FAILED)
        check_die("mmap");
    pid_t pid = MUST(clone(child, stack + 65536, CLONE_VM | SIGCHLD, NULL));
    check_ready();
    check_wait();
    CHECK(waitpid(pid, NULL, WNOHANG) == 0, "the child has ended");
    MUST(kill(pid, SIGKILL));
    CHECK(waitpid(pid, NULL, 0) == pid, "the child is gone");
    return check_done();
}
