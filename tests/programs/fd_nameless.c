/* What has lost its name: FIFOs, directories, a working directory, links, one of several hard links, a memfd to execute, /proc. */
#include "selfcheck.h"
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <sys/wait.h>

static char script[] = "#!/bin/true";

static int runs(int fd)
{
    int status = -1;
    pid_t child = fork();
    if (child == 0) {
        char *arguments[] = {"true", NULL}, *nothing[] = {NULL};
        syscall(SYS_execveat, fd, "", arguments, nothing, AT_EMPTY_PATH);
        _exit(errno);
    }
    waitpid(child, &status, 0);
    return status;
}

static int deleted(int fd, mode_t type)
{
    struct stat info;
    return fstat(fd, &info) == 0 && (info.st_mode & S_IFMT) == type && info.st_nlink == 0 &&
           (info.st_mode & 07777) == (type == S_IFLNK ? 0777 : 0750);
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    umask(0);
    MUST(mkfifo("fifo", 0750));
    int fifo = MUST(open("fifo", O_RDWR)), reader = MUST(open("fifo", O_RDONLY)), place = MUST(open("fifo", O_PATH));
    MUST(write(fifo, "kept", 4));
    MUST(unlink("fifo"));
    MUST(mkdir("outer", 0750));
    MUST(mkdir("outer/inner", 0750));
    int inner = MUST(open("outer/inner", O_RDONLY | O_DIRECTORY));
    MUST(rmdir("outer/inner"));
    MUST(rmdir("outer"));
    MUST(symlink("somewhere", "link"));
    int link_fd = MUST(open("link", O_PATH | O_NOFOLLOW));
    MUST(unlink("link"));
    MUST(mknod("zero", S_IFCHR | 0750, makedev(1, 5)));
    int zero = MUST(open("zero", O_RDONLY));
    MUST(unlink("zero"));
    int file = MUST(open("first", O_RDWR | O_CREAT, 0600));
    MUST(link("first", "second"));
    MUST(unlink("first"));
    MUST(write(file, "text", 4));
    int memfd = MUST(memfd_create("script", 0));
    MUST(write(memfd, script, strlen(script)));
    MUST(runs(memfd));
    int maps = MUST(open("/proc/self/maps", O_RDONLY)), status = MUST(open("/proc/self/status", O_RDONLY));
    int score = MUST(open("/proc/self/oom_score_adj", O_RDWR)), self = MUST(open("/proc/self", O_RDONLY | O_DIRECTORY));
    int net = MUST(open("/proc/self/ns/net", O_RDONLY)), init = MUST(open("/proc/1/stat", O_RDONLY));
    pid_t child = MUST(fork());
    if (child == 0)
        _exit(0);
    char path[64], text[4096];
    snprintf(path, sizeof(path), "/proc/%d/stat", (int)child);
    int dead = MUST(open(path, O_RDONLY));
    MUST(waitpid(child, NULL, 0));
    MUST(mkdir("here", 0750));
    MUST(chdir("here"));
    MUST(rmdir("../here"));
    struct stat before, now;
    MUST(stat("..", &before));
    check_ready();
    check_wait();

    CHECK(deleted(fifo, S_IFIFO) && deleted(reader, S_IFIFO) && deleted(place, S_IFIFO), "the FIFO");
    struct stat one, other;
    CHECK(fstat(fifo, &one) == 0 && fstat(place, &other) == 0 && one.st_ino == other.st_ino, "two FIFOs");
    CHECK(read(reader, text, sizeof(text)) == 4 && !memcmp(text, "kept", 4), "bytes in the FIFO");
    CHECK(write(fifo, "more", 4) == 4 && read(reader, text, sizeof(text)) == 4, "the FIFO goes on");
    CHECK(deleted(inner, S_IFDIR), "the directory");
    CHECK(openat(inner, "new", O_CREAT | O_WRONLY, 0600) == -1 && errno == ENOENT, "a file in a deleted directory");
    CHECK(deleted(link_fd, S_IFLNK) && readlinkat(link_fd, "", text, sizeof(text)) == 9 && !memcmp(text, "somewhere", 9), "the link");
    CHECK(deleted(zero, S_IFCHR) && read(zero, text, 4) == 4 && !memcmp(text, "\0\0\0", 4), "the device");
    CHECK(pwrite(file, "T", 1, 0) == 1 && fstat(file, &one) == 0 && stat("../second", &other) == 0 && one.st_ino == other.st_ino,
          "the other hard link");
    CHECK(lseek(file, 0, SEEK_CUR) == 4, "offset");
    int outcome = runs(memfd);
    CHECK(outcome == 0, "executing the memfd: %#x", outcome);
    ssize_t length = read(maps, text, sizeof(text) - 1);
    CHECK(length > 0 && memchr(text, '-', (size_t)length), "/proc/self/maps");
    length = read(status, text, sizeof(text) - 1);
    text[length > 0 ? length : 0] = 0;
    snprintf(path, sizeof(path), "\nPid:\t%d\n", (int)getpid());
    CHECK(strstr(text, path), "/proc/self/status");
    CHECK(write(score, "100", 3) == 3, "oom_score_adj: %s", strerror(errno));
    CHECK(fstatat(self, "cmdline", &one, 0) == 0, "/proc/self: %s", strerror(errno));
    CHECK(fstat(net, &one) == 0 && stat("/proc/self/ns/net", &other) == 0 && one.st_ino == other.st_ino, "/proc/self/ns/net");
    CHECK(read(init, text, sizeof(text)) > 2 && !memcmp(text, "1 ", 2), "/proc/1/stat");
    CHECK(read(dead, text, sizeof(text)) == -1 && errno == ESRCH, "/proc of a dead process: %s", strerror(errno));
    CHECK(getcwd(text, sizeof(text)) == NULL && errno == ENOENT, "working directory: %s", text);
    CHECK(stat("..", &now) == 0 && now.st_ino == before.st_ino, "the way out of the working directory");
    return check_done();
}
