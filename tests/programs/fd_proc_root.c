/* The directory /proc itself, as ps and top have it open. */
#include "selfcheck.h"
#include <dirent.h>
#include <sys/stat.h>

int main(int argc, char **argv)
{
    struct stat then, now;
    struct dirent *entry;
    int nr_processes = 0;
    check_init(argc, argv);
    int fd = MUST(open("/proc", O_RDONLY | O_DIRECTORY | O_CLOEXEC));
    fstat(fd, &then);
    check_ready();
    check_wait();
    MUST(fstat(fd, &now));
    CHECK(S_ISDIR(now.st_mode) && now.st_dev == then.st_dev && now.st_ino == then.st_ino, "another directory");
    CHECK(fcntl(fd, F_GETFD) == FD_CLOEXEC, "close-on-exec is %d", fcntl(fd, F_GETFD));
    DIR *proc = fdopendir(fd);
    while ((entry = readdir(proc)) != NULL)
        nr_processes += entry->d_name[0] >= '1' && entry->d_name[0] <= '9';
    CHECK(nr_processes > 1, "%d processes in it", nr_processes);
    closedir(proc);
    return check_done();
}
