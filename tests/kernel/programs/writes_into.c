/* A child that writes into its parent by process_vm_writev(2), out of a mapping whose pages come from a slow file: the kernel has looked the
 * parent's pages up, and copies into them page by page as its own come in.
 *
 *     writes_into FILE DIRECTORY */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/uio.h>

enum { PAGE = 4096, PAGES = 4096, AT_ONCE = 12 };

int main(int argc, char **argv)
{
    if (argc != 3)
        check_die("usage: writes_into FILE DIRECTORY");
    check_init(2, (char *[]){argv[0], argv[2], NULL});
    char *arena = mmap(NULL, (size_t)PAGES * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (arena == MAP_FAILED)
        check_die("mmap");
    memset(arena, 1, (size_t)PAGES * PAGE);
    pid_t parent = getpid();
    if (MUST(fork()) == 0) {
        prctl(PR_SET_PDEATHSIG, SIGKILL);
        int fd = MUST(open(argv[1], O_RDONLY | O_CLOEXEC));
        size_t size = (size_t)AT_ONCE * PAGE;
        char *from = mmap(NULL, size, PROT_READ, MAP_PRIVATE, fd, 0);
        if (from == MAP_FAILED)
            check_die("mmap of the file");
        madvise(from, size, MADV_RANDOM);
        unsigned seed = 9;
        for (;;) {
            madvise(from, size, MADV_DONTNEED);
            posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
            struct iovec here = {from, size};
            struct iovec there = {arena + (size_t)rand_r(&seed) % (PAGES - AT_ONCE) * PAGE, size};
            if (process_vm_writev(parent, &here, 1, &there, 1, 0) != (ssize_t)size)
                check_die("process_vm_writev");
        }
    }
    check_ready();
    check_wait();
    return check_done();
}
