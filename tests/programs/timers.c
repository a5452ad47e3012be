/* The three interval timers, armed and disarmed, and POSIX timers: ids with a gap, clocks, intervals, notification by signal, by
 * thread id and by none; those that fire in between do fire. A child has the same signal actions and no timer. */
// snap-test: children
#include "selfcheck.h"
#include <sys/time.h>
#include <sys/wait.h>

#ifndef sigev_notify_thread_id
#define sigev_notify_thread_id _sigev_un._tid
#endif

static volatile sig_atomic_t nr_alarms, nr_ticks, tick_value;
static void on_alarm(int sig)
{
    (void)sig;
    nr_alarms++;
}
static void on_tick(int sig, siginfo_t *info, void *context)
{
    (void)sig;
    (void)context;
    nr_ticks++;
    tick_value = info->si_value.sival_int;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    struct sigaction alarm_action = {.sa_handler = on_alarm, .sa_flags = SA_RESTART};
    MUST(sigaction(SIGALRM, &alarm_action, NULL));
    struct sigaction tick_action = {.sa_sigaction = on_tick, .sa_flags = SA_SIGINFO | SA_RESTART};
    MUST(sigaction(SIGRTMIN + 1, &tick_action, NULL));

    struct itimerval real = {{0, 50000}, {0, 50000}}, virtual_time = {{7, 0}, {1000, 0}}, prof = {{9, 250000}, {2000, 0}};
    MUST(setitimer(ITIMER_REAL, &real, NULL));
    MUST(setitimer(ITIMER_VIRTUAL, &virtual_time, NULL));
    MUST(setitimer(ITIMER_PROF, &prof, NULL));

    timer_t gone, ticking, one_shot, disarmed, by_thread;
    struct sigevent event = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 1, .sigev_value.sival_int = 77};
    MUST(timer_create(CLOCK_MONOTONIC, &event, &gone));
    MUST(timer_create(CLOCK_MONOTONIC, &event, &ticking));
    struct sigevent none = {.sigev_notify = SIGEV_NONE};
    MUST(timer_create(CLOCK_REALTIME, &none, &one_shot));
    MUST(timer_create(CLOCK_BOOTTIME, &none, &disarmed));
    struct sigevent thread_event = {.sigev_notify = SIGEV_THREAD_ID, .sigev_signo = SIGRTMIN + 2};
    thread_event.sigev_notify_thread_id = check_gettid();
    MUST(timer_create(CLOCK_MONOTONIC, &thread_event, &by_thread));
    MUST(timer_delete(gone)); /* a gap in the ids */
    struct itimerspec tick = {{0, 40000000}, {0, 40000000}}, once = {{0, 0}, {3000, 0}}, later = {{11, 0}, {4000, 0}};
    MUST(timer_settime(ticking, 0, &tick, NULL));
    MUST(timer_settime(one_shot, 0, &once, NULL));
    MUST(timer_settime(by_thread, 0, &later, NULL));
    /* A child inherits the signal actions, but no timer. */
    pid_t child = MUST(fork());
    if (child == 0) {
        for (;;)
            pause();
    }
    check_ready();
    check_wait();

    int alarms_before = nr_alarms, ticks_before = nr_ticks;
    for (double end = check_now(CLOCK_MONOTONIC) + 5; check_now(CLOCK_MONOTONIC) < end;) {
        if (nr_alarms > alarms_before + 3 && nr_ticks > ticks_before + 3)
            break;
        usleep(1000);
    }
    CHECK(nr_alarms > alarms_before + 3, "ITIMER_REAL is dead: %d alarms", (int)nr_alarms);
    CHECK(nr_ticks > ticks_before + 3, "the POSIX timer is dead: %d ticks", (int)nr_ticks);
    CHECK(tick_value == 77, "the POSIX timer carries %d", (int)tick_value);
    struct itimerval now;
    getitimer(ITIMER_REAL, &now);
    CHECK(now.it_interval.tv_usec == 50000, "ITIMER_REAL has an interval of %ld", now.it_interval.tv_usec);
    getitimer(ITIMER_VIRTUAL, &now);
    CHECK(now.it_interval.tv_sec == 7 && now.it_value.tv_sec >= 900 && now.it_value.tv_sec <= 1000,
          "ITIMER_VIRTUAL is %ld, %ld", now.it_interval.tv_sec, now.it_value.tv_sec);
    getitimer(ITIMER_PROF, &now);
    CHECK(now.it_interval.tv_sec == 9 && now.it_interval.tv_usec == 250000 && now.it_value.tv_sec >= 1900 &&
              now.it_value.tv_sec <= 2000,
          "ITIMER_PROF is %ld, %ld", now.it_interval.tv_sec, now.it_value.tv_sec);
    struct itimerspec spec;
    CHECK(timer_gettime(ticking, &spec) == 0 && spec.it_interval.tv_nsec == 40000000, "the ticking timer's interval");
    CHECK(timer_gettime(one_shot, &spec) == 0 && spec.it_value.tv_sec > 2800 && spec.it_value.tv_sec <= 3000,
          "the one-shot timer has %ld s left", spec.it_value.tv_sec);
    CHECK(timer_gettime(disarmed, &spec) == 0 && spec.it_value.tv_sec == 0 && spec.it_value.tv_nsec == 0,
          "the disarmed timer runs");
    CHECK(timer_gettime(by_thread, &spec) == 0 && spec.it_interval.tv_sec == 11 && spec.it_value.tv_sec > 3800,
          "the timer of a thread has %ld s left", spec.it_value.tv_sec);
    CHECK(timer_gettime(gone, &spec) != 0, "the deleted timer is back");
    timer_t next;
    CHECK(timer_create(CLOCK_MONOTONIC, &none, &next) == 0, "no timer can be made any more");
    CHECK(next != ticking && next != one_shot && next != disarmed && next != by_thread, "an id is given twice");
    CHECK((long)next > (long)by_thread, "the next id is %ld, below %ld", (long)next, (long)by_thread);
    CHECK(kill(child, SIGKILL) == 0 && waitpid(child, NULL, 0) == child, "the child");
    return check_done();
}
