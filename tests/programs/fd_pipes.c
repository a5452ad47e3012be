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
    MUST(pipe(readless));
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
