/* What the small programs that stay beside snap share (keeper.c, finisher.c, bystander.c, watchdog.c): no libc, no heap, no signals beyond the
 * default ones, so that one of them costs a few pages. */

#ifndef SNAP_FREESTANDING_H
#define SNAP_FREESTANDING_H

#define SYS_READ 0
#define SYS_WRITE 1
#define SYS_CLOSE 3
#define SYS_POLL 7
#define SYS_PREAD64 17
#define SYS_SENDTO 44
#define SYS_FORK 57
#define SYS_EXIT 60
#define SYS_KILL 62
#define SYS_RENAME 82
#define SYS_UNLINK 87
#define SYS_SETGROUPS 116
#define SYS_SETRESUID 117
#define SYS_SETRESGID 119
#define SYS_CAPSET 126
#define SYS_SETPRIORITY 141
#define SYS_PRCTL 157
#define SYS_CLOCK_GETTIME 228
#define SYS_PIDFD_SEND_SIGNAL 424
#define SYS_PIDFD_OPEN 434

#define ESRCH_RESULT (-3L)
#define EINTR_RESULT (-4L)
#define MSG_NOSIGNAL 0x4000

static inline long call4(long number, long one, long two, long three, long four)
{
	register long result __asm__("rax") = number;
	register long r10 __asm__("r10") = four;
	register long r8 __asm__("r8") = 0;
	register long r9 __asm__("r9") = 0;

	__asm__ volatile("syscall"
			 : "+r"(result)
			 : "D"(one), "S"(two), "d"(three), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static inline long call3(long number, long one, long two, long three)
{
	return call4(number, one, two, three, 0);
}

static inline _Noreturn void leave(long status)
{
	for (;;)
		call3(SYS_EXIT, status, 0, 0);
}

/* The kernel enters with the stack as argc, argv: `function` gets it, aligned for calls. */
#define START_WITH(function)                                                                                           \
	__asm__(".globl _start\n"                                                                                      \
		"_start:\n"                                                                                            \
		"	xor %ebp, %ebp\n"                                                                              \
		"	mov %rsp, %rdi\n"                                                                              \
		"	and $-16, %rsp\n"                                                                              \
		"	call " #function "\n"                                                                          \
		"	hlt\n");

#endif
