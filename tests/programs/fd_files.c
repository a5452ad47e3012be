/* Regular files: shared offsets, append, close-on-exec, gaps in the numbers, a deleted file and a memfd with contents,
 * locks, a directory half read. */
#include "selfcheck.h"
#include <dirent.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/wait.h>

int main(int argc, char **argv)
{
    check_init(argc, argv);
    int plain = MUST(open("plain", O_RDWR | O_CREAT, 0600));
    MUST(write(plain, "0123456789", 10));
    MUST(lseek(plain, 4, SEEK_SET));
    int copy = MUST(fcntl(plain, F_DUPFD, 400));
    int other = MUST(open("plain", O_RDONLY | O_CLOEXEC));
    int append = MUST(open("log", O_WRONLY | O_CREAT | O_APPEND, 0600));
    MUST(write(append, "one\n", 4));
    MUST(flock(append, LOCK_EX));
    struct flock lock = {.l_type = F_WRLCK, .l_start = 5, .l_len = 10};
    MUST(fcntl(plain, F_SETLK, &lock));

    int deleted = MUST(open("deleted", O_RDWR | O_CREAT, 0600));
    MUST(write(deleted, "nobody else has this", 20));
    MUST(unlink("deleted"));
    int memfd = MUST(memfd_create("check", MFD_CLOEXEC));
    MUST(write(memfd, "in memory", 9));
    MUST(lseek(memfd, 3, SEEK_SET));
    int directory = MUST(open(".", O_RDONLY | O_DIRECTORY));
    int place = MUST(open("plain", O_PATH)), unfollowed = MUST(open("plain", O_PATH | O_NOFOLLOW));
    int folder = MUST(open(".", O_PATH | O_DIRECTORY));
    int place_flags = fcntl(place, F_GETFL), unfollowed_flags = fcntl(unfollowed, F_GETFL);
    int folder_flags = fcntl(folder, F_GETFL);
    check_ready();
    check_wait();

    char text[64] = "";
    CHECK(lseek(copy, 0, SEEK_CUR) == 4, "offset %ld", (long)lseek(copy, 0, SEEK_CUR));
    CHECK(read(plain, text, 2) == 2 && !memcmp(text, "45", 2), "read %s", text);
    CHECK(lseek(copy, 0, SEEK_CUR) == 6, "duplicates do not share the offset");
    CHECK(lseek(other, 0, SEEK_CUR) == 0, "another open file shares the offset");
    CHECK(fcntl(other, F_GETFD) == FD_CLOEXEC && fcntl(plain, F_GETFD) == 0, "close-on-exec");
    CHECK(fcntl(append, F_GETFL) & O_APPEND, "O_APPEND is gone");
    CHECK(write(append, "two\n", 4) == 4, "append");
    int again = open("log", O_RDONLY);
    CHECK(read(again, text, 64) == 8 && !memcmp(text, "one\ntwo\n", 8), "log");
    CHECK(flock(again, LOCK_EX | LOCK_NB) == -1 && errno == EWOULDBLOCK, "flock is gone");
    close(again);
    pid_t child = fork();
    if (child == 0) {
        struct flock wanted = {.l_type = F_WRLCK, .l_start = 7, .l_len = 1};
        _exit(fcntl(plain, F_GETLK, &wanted) == 0 && wanted.l_type == F_WRLCK && wanted.l_pid == getppid() ? 0 : 1);
    }
    int status = -1;
    CHECK(waitpid(child, &status, 0) == child && status == 0, "record lock: %#x", status);
    struct stat stat;
    CHECK(fstat(deleted, &stat) == 0 && stat.st_nlink == 0 && stat.st_size == 20, "deleted file");
    CHECK(pread(deleted, text, 64, 0) == 20 && !memcmp(text, "nobody else has this", 20), "deleted file's content");
    CHECK(lseek(deleted, 0, SEEK_CUR) == 20, "deleted file's offset");
    CHECK(read(memfd, text, 64) == 6 && !memcmp(text, "memory", 6), "memfd");
    CHECK(fcntl(memfd, F_GETFD) == FD_CLOEXEC, "memfd close-on-exec");
    CHECK(fstat(directory, &stat) == 0 && S_ISDIR(stat.st_mode), "directory");
    DIR *entries = fdopendir(directory);
    int nr = 0;
    while (readdir(entries))
        nr++;
    CHECK(nr >= 4, "%d directory entries", nr);
    CHECK(fcntl(place, F_GETFL) == place_flags, "O_PATH: %#o", fcntl(place, F_GETFL));
    CHECK(fcntl(unfollowed, F_GETFL) == unfollowed_flags, "O_NOFOLLOW: %#o", fcntl(unfollowed, F_GETFL));
    CHECK(fcntl(folder, F_GETFL) == folder_flags, "O_DIRECTORY: %#o", fcntl(folder, F_GETFL));
    return check_done();
}
