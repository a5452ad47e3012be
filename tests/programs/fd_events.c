/* eventfd, timerfd, signalfd, epoll (also of a number that was closed), pidfd of a child. */
// snap-test: children
#include "selfcheck.h"
#include <poll.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/signalfd.h>
#include <sys/timerfd.h>
#include <sys/wait.h>

int main(int argc, char **argv)
{
    check_init(argc, argv);
    int counter = MUST(eventfd(7, EFD_NONBLOCK));
    int semaphore = MUST(eventfd(3, EFD_SEMAPHORE | EFD_CLOEXEC));
    int timer = MUST(timerfd_create(CLOCK_MONOTONIC, 0));
    struct itimerspec spec = {.it_value.tv_sec = 1000, .it_interval.tv_sec = 2};
    MUST(timerfd_settime(timer, 0, &spec, NULL));
    int fired = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    struct itimerspec soon = {.it_value.tv_nsec = 1};
    MUST(timerfd_settime(fired, 0, &soon, NULL));
    struct pollfd wait = {fired, POLLIN, 0};
    MUST(poll(&wait, 1, 1000));
    int periodic = MUST(timerfd_create(CLOCK_MONOTONIC, TFD_NONBLOCK));
    struct itimerspec often = {.it_value.tv_nsec = 2000000, .it_interval.tv_nsec = 2000000};
    MUST(timerfd_settime(periodic, 0, &often, NULL));
    double periodic_since = check_now(CLOCK_MONOTONIC);
    usleep(100000);
    double periodic_seen = check_now(CLOCK_MONOTONIC);
    int unarmed = MUST(timerfd_create(CLOCK_MONOTONIC, 0));
    struct itimerspec only_interval = {.it_interval.tv_sec = 17};
    MUST(timerfd_settime(unarmed, 0, &only_interval, NULL));
    sigset_t mask;
    sigemptyset(&mask);
    sigaddset(&mask, SIGUSR1);
    MUST(sigprocmask(SIG_BLOCK, &mask, NULL));
    int signals = MUST(signalfd(-1, &mask, SFD_NONBLOCK));
    MUST(raise(SIGUSR1));

    int instance = MUST(epoll_create1(EPOLL_CLOEXEC));
    struct epoll_event event = {.events = EPOLLIN, .data.u64 = 0x1122334455667788};
    MUST(epoll_ctl(instance, EPOLL_CTL_ADD, counter, &event));
    int ends[2];
    MUST(pipe(ends));
    event.data.u64 = 99;
    MUST(epoll_ctl(instance, EPOLL_CTL_ADD, ends[0], &event));
    int moved = MUST(dup(ends[0]));
    MUST(close(ends[0]));
    pid_t child = MUST(fork());
    if (child == 0) {
        pause();
        _exit(0);
    }
    int pidfd = (int)MUST(syscall(SYS_pidfd_open, child, 0));
    check_ready();
    check_wait();

    uint64_t value = 0;
    struct epoll_event found[4];
    int nr = epoll_wait(instance, found, 4, 0);
    CHECK(nr == 1 && found[0].data.u64 == 0x1122334455667788, "epoll: %d events", nr);
    CHECK(write(ends[1], "x", 1) == 1, "pipe");
    nr = epoll_wait(instance, found, 4, 0);
    CHECK(nr == 2 && (found[0].data.u64 == 99 || found[1].data.u64 == 99), "epoll: %d events", nr);
    CHECK(fcntl(moved, F_GETFD) == 0, "moved");
    CHECK(epoll_ctl(instance, EPOLL_CTL_DEL, counter, NULL) == 0, "the entry has another number");
    CHECK(read(counter, &value, 8) == 8 && value == 7, "eventfd %lu", (unsigned long)value);
    CHECK(read(counter, &value, 8) == -1 && errno == EAGAIN, "eventfd blocks not");
    CHECK(read(semaphore, &value, 8) == 8 && value == 1, "semaphore %lu", (unsigned long)value);
    struct itimerspec now;
    CHECK(timerfd_gettime(timer, &now) == 0 && now.it_value.tv_sec > 900 && now.it_value.tv_sec <= 1000, "timer %ld",
          (long)now.it_value.tv_sec);
    CHECK(now.it_interval.tv_sec == 2, "interval");
    CHECK(read(fired, &value, 8) == 8 && value == 1, "expirations that were not read: %lu", (unsigned long)value);
    /* At least as many as were due before the point. */
    uint64_t due = (uint64_t)((periodic_seen - periodic_since) / 0.002) - 1;
    CHECK(read(periodic, &value, 8) == 8 && value >= due, "%lu of %lu expirations", (unsigned long)value,
          (unsigned long)due);
    CHECK(timerfd_gettime(unarmed, &now) == 0 && now.it_interval.tv_sec == 17 && now.it_value.tv_sec == 0,
          "the interval of a timer that is not armed: %ld", (long)now.it_interval.tv_sec);
    struct signalfd_siginfo info;
    CHECK(read(signals, &info, sizeof(info)) == sizeof(info) && info.ssi_signo == SIGUSR1, "signalfd");
    struct pollfd alive = {pidfd, POLLIN, 0};
    CHECK(poll(&alive, 1, 0) == 0, "the child ended");
    CHECK(syscall(SYS_pidfd_send_signal, pidfd, SIGKILL, NULL, 0) == 0, "signal by pidfd");
    CHECK(poll(&alive, 1, 5000) == 1, "pidfd does not tell the end");
    CHECK(waitpid(child, NULL, 0) == child, "child");
    return check_done();
}
