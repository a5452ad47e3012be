// A thread whose tid is below its process's pid, as after the pids have wrapped around. Says the tid on stdout.
#define _GNU_SOURCE
#include <linux/sched.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>

static char stack[16384] __attribute__((aligned(16)));

static long clone_thread(struct clone_args *args)
{
    long result;
    // The child has another stack: it never returns from here.
    __asm__ volatile("syscall\n"
                     "test %%rax, %%rax\n"
                     "jnz 2f\n"
                     "1: movl %[pause], %%eax\n"
                     "syscall\n"
                     "jmp 1b\n"
                     "2:\n"
                     : "=a"(result)
                     : "a"(SYS_clone3), "D"(args), "S"(sizeof(*args)), [pause] "i"(SYS_pause)
                     : "rcx", "r11", "memory");
    return result;
}

int main(void)
{
    int tid = getpid();
    long made = -1;
    while (made < 0 && --tid > 1) {
        struct clone_args args = {
            .flags = CLONE_VM | CLONE_FS | CLONE_FILES | CLONE_SIGHAND | CLONE_THREAD | CLONE_SYSVSEM,
            .stack = (uintptr_t)stack,
            .stack_size = sizeof(stack),
            .set_tid = (uintptr_t)&tid,
            .set_tid_size = 1,
        };
        made = clone_thread(&args);
    }
    printf("%ld\n", made);
    fflush(stdout);
    for (;;)
        pause();
}
