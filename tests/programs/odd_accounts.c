/* What is easily forgotten: the login uid of the audit log, which sides of UDP sockets are shut down, the time of the last change of
 * a deleted file, two pidfds of one process that has ended, where memory comes from, what broken memory does. */
// snap-test: requires udp_diag
#include "selfcheck.h"
#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/wait.h>

static int open_udp(struct sockaddr_in *address)
{
    socklen_t length = sizeof(*address);
    *address = (struct sockaddr_in){.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    int fd = MUST(socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK, 0));
    MUST(bind(fd, (struct sockaddr *)address, length));
    MUST(getsockname(fd, (struct sockaddr *)address, &length));
    return fd;
}

static void login(char *text, size_t size)
{
    int fd = open("/proc/self/loginuid", O_RDONLY);
    ssize_t n = fd < 0 ? 0 : read(fd, text, size - 1);
    text[n > 0 ? n : 0] = 0;
    close(fd);
}

int main(int argc, char **argv)
{
    char login_before[32], login_now[32];
    check_init(argc, argv);
    signal(SIGPIPE, SIG_IGN);
    int fd = open("/proc/self/loginuid", O_WRONLY);
    if (fd >= 0) {
        ssize_t n = write(fd, "4711", 4); /* not allowed everywhere: then there is nothing to see */
        (void)n;
        close(fd);
    }
    login(login_before, sizeof(login_before));

    struct sockaddr_in there, here;
    int open_one = open_udp(&there), no_writing = open_udp(&here), no_reading = open_udp(&here);
    MUST(connect(no_writing, (struct sockaddr *)&there, sizeof(there)));
    MUST(connect(no_reading, (struct sockaddr *)&there, sizeof(there)));
    MUST(shutdown(no_writing, SHUT_WR));
    MUST(shutdown(no_reading, SHUT_RD));

    int deleted = MUST(open("deleted", O_RDWR | O_CREAT, 0600));
    MUST(write(deleted, "content", 7));
    const struct timespec times[2] = {{1000000000, 5}, {1000000000, 7}};
    MUST(futimens(deleted, times));
    MUST(unlink("deleted"));

    pid_t child = MUST(fork());
    if (child == 0)
        _exit(3);
    int first = (int)MUST(syscall(SYS_pidfd_open, child, 0)), second = (int)MUST(syscall(SYS_pidfd_open, child, O_NONBLOCK));
    MUST(waitpid(child, NULL, 0));
    struct stat one, other;
    fstat(first, &one);
    fstat(second, &other);
    int same = one.st_ino == other.st_ino;
    unsigned long nodes = 1, nodes_now = 0;
    int mode = -1, numa = syscall(SYS_set_mempolicy, 2 /* MPOL_BIND */, &nodes, 64) == 0;
    int mce = prctl(PR_MCE_KILL, PR_MCE_KILL_SET, PR_MCE_KILL_EARLY, 0, 0) == 0;
    check_ready();
    check_wait();

    if (numa) {
        unsigned long wide[16] = {0};
        CHECK(syscall(SYS_get_mempolicy, &mode, wide, 1024, 0, 0) == 0, "get_mempolicy: %d", errno);
        nodes_now = wide[0];
        CHECK(mode == 2 && nodes_now == 1, "memory policy %d of nodes %#lx", mode, nodes_now);
    }
    if (mce)
        CHECK(prctl(PR_MCE_KILL_GET, 0, 0, 0, 0) == PR_MCE_KILL_EARLY, "machine check policy %d", prctl(PR_MCE_KILL_GET, 0, 0, 0, 0));

    login(login_now, sizeof(login_now));
    CHECK(strcmp(login_before, login_now) == 0, "login uid %s, was %s", login_now, login_before);
    CHECK(send(no_writing, "x", 1, 0) == -1 && errno == EPIPE, "sent after shutdown: %d", errno);
    struct pollfd polled = {no_writing, POLLIN | POLLRDHUP, 0};
    poll(&polled, 1, 0);
    CHECK(polled.revents == 0, "not to be written to: %#x", polled.revents);
    CHECK(send(no_reading, "x", 1, 0) == 1, "not to be read from, but written to: %d", errno);
    polled.fd = no_reading;
    poll(&polled, 1, 0);
    CHECK(polled.revents & POLLRDHUP && !(polled.revents & POLLHUP), "not to be read from: %#x", polled.revents);
    CHECK(sendto(open_one, "x", 1, 0, (struct sockaddr *)&there, sizeof(there)) == 1, "the open one: %d", errno);
    struct stat info;
    CHECK(fstat(deleted, &info) == 0 && info.st_mtim.tv_sec == 1000000000 && info.st_mtim.tv_nsec == 7, "changed at %ld.%09ld",
          (long)info.st_mtim.tv_sec, info.st_mtim.tv_nsec);
    fstat(first, &one);
    fstat(second, &other);
    CHECK((one.st_ino == other.st_ino) == same, "pidfds of one process: %lu, %lu", (unsigned long)one.st_ino, (unsigned long)other.st_ino);
    polled = (struct pollfd){second, POLLIN, 0};
    poll(&polled, 1, 0);
    CHECK(polled.revents & POLLIN, "the process of a pidfd lives again");
    CHECK(fcntl(second, F_GETFL) & O_NONBLOCK, "flags of a pidfd");
    return check_done();
}
