/* Signal actions, masks, pending signals (of the process and of a thread, standard and real-time, with their siginfo),
 * the alternate stack. */
#include "selfcheck.h"
#include <pthread.h>

static char stack[1 << 16];
static volatile sig_atomic_t on_stack, usr1_value;
static int rt_values[8];
static volatile sig_atomic_t nr_rt;
static atomic_int thread_ready, thread_go;
static volatile sig_atomic_t thread_got;
static siginfo_t usr1_info;

static void on_usr1(int sig, siginfo_t *info, void *context)
{
    (void)sig;
    (void)context;
    char here;
    on_stack = &here >= stack && &here < stack + sizeof(stack);
    usr1_value = info->si_value.sival_int;
    usr1_info = *info;
}
static void on_rt(int sig, siginfo_t *info, void *context)
{
    (void)sig;
    (void)context;
    if (nr_rt < 8)
        rt_values[nr_rt] = info->si_value.sival_int;
    nr_rt++;
}
static void on_thread_signal(int sig) { thread_got = sig; }

static void *thread_main(void *unused)
{
    (void)unused;
    sigset_t set, pending;
    sigfillset(&set);
    pthread_sigmask(SIG_SETMASK, &set, NULL);
    pthread_kill(pthread_self(), SIGUSR2);
    atomic_store(&thread_ready, 1);
    while (!atomic_load(&thread_go))
        usleep(1000);
    sigpending(&pending);
    CHECK(sigismember(&pending, SIGUSR2), "the thread's own pending SIGUSR2 is lost");
    sigset_t now;
    pthread_sigmask(SIG_SETMASK, NULL, &now);
    for (int sig = 1; sig < 32; sig++)
        if (sig != SIGKILL && sig != SIGSTOP)
            CHECK(sigismember(&now, sig), "signal %d is not blocked in the thread any more", sig);
    sigemptyset(&set);
    sigaddset(&set, SIGUSR2);
    pthread_sigmask(SIG_UNBLOCK, &set, NULL);
    CHECK(thread_got == SIGUSR2, "SIGUSR2 did not reach the thread");
    return NULL;
}

int main(int argc, char **argv)
{
    check_init(argc, argv);
    stack_t alternate = {.ss_sp = stack, .ss_size = sizeof(stack)};
    MUST(sigaltstack(&alternate, NULL));
    struct sigaction action = {.sa_sigaction = on_usr1, .sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART};
    sigaddset(&action.sa_mask, SIGHUP);
    MUST(sigaction(SIGUSR1, &action, NULL));
    struct sigaction rt = {.sa_sigaction = on_rt, .sa_flags = SA_SIGINFO};
    MUST(sigaction(SIGRTMIN + 3, &rt, NULL));
    struct sigaction second = {.sa_handler = on_thread_signal, .sa_flags = SA_NODEFER};
    MUST(sigaction(SIGUSR2, &second, NULL));
    struct sigaction ignore = {.sa_handler = SIG_IGN};
    MUST(sigaction(SIGPIPE, &ignore, NULL));

    sigset_t blocked, old;
    sigemptyset(&blocked);
    sigaddset(&blocked, SIGUSR1);
    sigaddset(&blocked, SIGRTMIN + 3);
    sigaddset(&blocked, SIGWINCH);
    MUST(sigprocmask(SIG_BLOCK, &blocked, &old));
    pthread_t thread;
    pthread_create(&thread, NULL, thread_main, NULL);
    while (!atomic_load(&thread_ready))
        usleep(1000);
    MUST(sigqueue(getpid(), SIGUSR1, (union sigval){.sival_int = 4711}));
    for (int i = 0; i < 5; i++)
        MUST(sigqueue(getpid(), SIGRTMIN + 3, (union sigval){.sival_int = 100 + i}));
    check_ready();
    check_wait();

    struct sigaction now;
    sigaction(SIGUSR1, NULL, &now);
    CHECK(now.sa_sigaction == on_usr1, "the handler of SIGUSR1 changed");
    CHECK((now.sa_flags & (SA_SIGINFO | SA_ONSTACK | SA_RESTART)) == (SA_SIGINFO | SA_ONSTACK | SA_RESTART), "flags %#x",
          now.sa_flags);
    CHECK(sigismember(&now.sa_mask, SIGHUP) == 1, "the mask of the action is lost");
    sigaction(SIGPIPE, NULL, &now);
    CHECK(now.sa_handler == SIG_IGN, "SIGPIPE is not ignored any more");
    sigaction(SIGUSR2, NULL, &now);
    CHECK(now.sa_flags & SA_NODEFER, "SA_NODEFER is lost");
    sigset_t mask, pending;
    sigprocmask(SIG_SETMASK, NULL, &mask);
    for (int sig = 1; sig <= SIGRTMAX; sig++)
        CHECK(sigismember(&mask, sig) == sigismember(&blocked, sig), "signal %d: blocked %d", sig, sigismember(&mask, sig));
    sigpending(&pending);
    CHECK(sigismember(&pending, SIGUSR1), "pending SIGUSR1 is lost");
    stack_t alternate_now;
    sigaltstack(NULL, &alternate_now);
    CHECK(alternate_now.ss_sp == stack && alternate_now.ss_size == sizeof(stack) && alternate_now.ss_flags == 0,
          "the alternate stack is %p, %zu", alternate_now.ss_sp, alternate_now.ss_size);
    MUST(sigprocmask(SIG_SETMASK, &old, NULL));
    CHECK(usr1_value == 4711, "SIGUSR1 carried %d", (int)usr1_value);
    CHECK(usr1_info.si_code == SI_QUEUE && usr1_info.si_pid == getpid() && usr1_info.si_uid == getuid(),
          "siginfo: code %d, pid %d", usr1_info.si_code, usr1_info.si_pid);
    CHECK(on_stack, "the handler did not run on the alternate stack");
    CHECK(nr_rt == 5, "%d real-time signals of 5", (int)nr_rt);
    for (int i = 0; i < 5 && i < nr_rt; i++)
        CHECK(rt_values[i] == 100 + i, "real-time signal %d carried %d", i, rt_values[i]);
    atomic_store(&thread_go, 1);
    pthread_join(thread, NULL);
    return check_done();
}
