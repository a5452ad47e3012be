/* Pipes: contents, capacity, packets, ends that are gone, a FIFO, a pipe between parent and child. */
// snap-test: children
#include "selfcheck.h"
#include <sys/ioctl.h>
#include <sys/stat.h>
#include <sys/wait.h>

int main(int argc, char **argv)
{
    check_init(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    int full[2], packets[2], readless[2], writerless[2], talk[2], answer[2];
    MUST(pipe2(full, O_NONBLOCK));
    MUST(fcntl(full[1], F_SETPIPE_SZ, 1 << 18));
    static char block[200000];
    for (size_t i = 0; i < sizeof(block); i++)
        block[i] = (char)(i * 7 + i / 251);
    MUST(write(full[1], block, sizeof(block)));
    MUST(pipe2(packets, O_DIRECT));
    MUST(write(packets[1], "first", 5));
    MUST(write(packets[1], "second packet", 13));
    /* Packets between ordinary bytes, copied ones too; the flag is gone from the end by the time of the point. */
    int mixed[2], source[2];
    MUST(pipe2(mixed, O_NONBLOCK));
    MUST(pipe(source));
    MUST(write(source[1], "ab", 2));
    MUST(tee(source[0], mixed[1], 2, 0)); /* not written: a packet would be merged into the same page */
    char aside[2];
    MUST(read(source[0], aside, 2));
    MUST(fcntl(mixed[1], F_SETFL, O_DIRECT | O_NONBLOCK));
    MUST(write(mixed[1], "packet", 6));
    MUST(write(mixed[1], "p", 1));
    MUST(write(source[1], "copied.", 7));
    MUST(tee(source[0], mixed[1], 7, 0));
    MUST(write(mixed[1], "last", 4));
    MUST(fcntl(mixed[1], F_SETFL, O_NONBLOCK));
    MUST(pipe(readless));
    MUST(write(readless[1], "nobody reads", 12));
    MUST(close(readless[0]));
    MUST(pipe(writerless));
    MUST(write(writerless[1], "the rest", 8));
    MUST(close(writerless[1]));
    MUST(mkfifo("fifo", 0600));
    int fifo_read = MUST(open("fifo", O_RDONLY | O_NONBLOCK));
    int fifo_write = MUST(open("fifo", O_WRONLY));
    MUST(write(fifo_write, "through a fifo", 14));
    MUST(pipe(talk));
    MUST(pipe(answer));
    pid_t child = MUST(fork());
    if (child == 0) {
        close(talk[1]);
        close(answer[0]);
        char byte;
        while (read(talk[0], &byte, 1) == 1) {
            byte++;
            if (write(answer[1], &byte, 1) != 1)
                _exit(1);
        }
        _exit(5);
    }
    MUST(close(talk[0]));
    MUST(close(answer[1]));
    check_ready();
    check_wait();

    static char back[sizeof(block) + 1];
    ssize_t got = 0, n;
    while ((n = read(full[0], back + got, sizeof(back) - (size_t)got)) > 0)
        got += n;
    CHECK(got == sizeof(block) && !memcmp(back, block, sizeof(block)), "%ld bytes in the pipe", (long)got);
    CHECK(fcntl(full[1], F_GETPIPE_SZ) == 1 << 18, "capacity %d", fcntl(full[1], F_GETPIPE_SZ));
    CHECK(fcntl(full[0], F_GETFL) == O_NONBLOCK, "flags %#o", fcntl(full[0], F_GETFL));
    CHECK(read(packets[0], back, 100) == 5 && !memcmp(back, "first", 5), "first packet");
    CHECK(read(packets[0], back, 100) == 13 && !memcmp(back, "second packet", 13), "second packet");
    CHECK(read(mixed[0], back, 100) == 8 && !memcmp(back, "abpacket", 8), "bytes, then a packet");
    CHECK(read(mixed[0], back, 100) == 1 && back[0] == 'p', "a packet of one byte");
    CHECK(read(mixed[0], back, 100) == 11 && !memcmp(back, "copied.last", 11), "copied bytes, then a packet");
    MUST(write(mixed[1], "on", 2));
    MUST(write(mixed[1], "ward", 4));
    CHECK(read(mixed[0], back, 100) == 6 && !memcmp(back, "onward", 6), "bytes again");
    char path[64];
    snprintf(path, sizeof(path), "/proc/self/fd/%d", readless[1]);
    int late = open(path, O_RDONLY | O_NONBLOCK);
    CHECK(read(late, back, 100) == 12 && !memcmp(back, "nobody reads", 12), "what waits for a reader");
    MUST(close(late));
    CHECK(write(readless[1], "x", 1) == -1 && errno == EPIPE, "a pipe without readers");
    CHECK(read(writerless[0], back, 100) == 8 && !memcmp(back, "the rest", 8), "what a writer left");
    CHECK(read(writerless[0], back, 100) == 0, "end of file");
    CHECK(read(fifo_read, back, 100) == 14 && !memcmp(back, "through a fifo", 14), "fifo");
    CHECK(write(fifo_write, "y", 1) == 1 && read(fifo_read, back, 100) == 1, "fifo again");
    CHECK(write(talk[1], "a", 1) == 1 && read(answer[0], back, 1) == 1 && back[0] == 'b', "the child answers");
    close(talk[1]);
    int status = 0;
    CHECK(waitpid(child, &status, 0) == child && WIFEXITED(status) && WEXITSTATUS(status) == 5, "child %#x", status);
    return check_done();
}
