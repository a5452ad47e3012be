/* The attendant: stays with one task until its system call has ended, so that the call is not seen to have been cut in two.
 *
 * A freeze interrupts system calls. One that had already transferred a part (write to a full pipe, recv with MSG_WAITALL) then
 * returns a short count, which it never does for a program without signal handlers. So the attendant has the task
 * transfer the rest by further calls, from the same instruction, and gives it its registers back with the sum as the result.
 *
 * Snap leaves the task parked: it sleeps in poll(2) for some seconds, all signals blocked, and would leave through its fail-safe frame
 * (PROTOCOL.md) with the short count. From that poll the attendant takes it over. It gives the task back in the same way, when
 * SIGTERM tells it to: the next snap wants to trace it. A signal that the task has a handler for, or would be stopped or killed by,
 * ends the call with what is transferred so far, as the kernel does.
 *
 * Stdin: a struct snap_attended (attend.h) and what follows it. Stdout: /proc/PID/mem of the task, writable.
 *
 * A second process, the guard, does nothing until the first ends without having said that it is done; then it takes over. Both
 * must be killed at once for the task to see the count of the last piece alone.
 */

#include <stdint.h>
#include <linux/ptrace.h>
#include <sys/user.h>

#include "attend.h"
#include "freestanding.h"

#define SYS_MMAP 9
#define SYS_NANOSLEEP 35
#define SYS_RT_SIGACTION 13
#define SYS_RT_SIGPROCMASK 14
#define SYS_PREAD 17
#define SYS_PWRITE 18
#define SYS_PIPE 22
#define SYS_WAIT4 61
#define SYS_PTRACE 101
#define SYS_RT_SIGTIMEDWAIT 128
#define SYS_SETPRIORITY 141
#define SYS_OPEN 2

#define STDIN 0
#define MEM 1
#define WNOHANG 1
#define WALL 0x40000000
#define SIGTERM 15
#define SIGCHLD 17
#define SIGCONT 18
#define SIGTRAP 5
#define SIGURG 23
#define SIGWINCH 28
#define BIT(signo) (1ULL << ((signo) - 1))
#define STOPS (BIT(19) | BIT(20) | BIT(21) | BIT(22))
#define IGNORED_BY_DEFAULT (BIT(SIGCHLD) | BIT(SIGCONT) | BIT(SIGURG) | BIT(SIGWINCH))
#define SYSCALL_STOP (SIGTRAP | 0x80)
#define MOST_ERRNO 4095
#define EINTR 4
#define ERESTARTSYS 512
#define ERESTART_RESTARTBLOCK 516
#define SYSCALL_LENGTH 2
#define EPERM_RESULT (-1L)
#define SEIZE_PAUSE_NS 50000
#define GUARD_TRIES 200000 /* 20 s: a busy machine lets a killed process wait, too */
#define NOT_IN_SYSCALL (~0UL)
#define SHARED_ANONYMOUS 0x21
#define READ_WRITE 3

enum phase {
	PARKED,  /* it sleeps in poll, or is in our hands there */
	CALLING, /* it was sent into the call, or is about to be */
	OVER,    /* it has its own registers */
};

/* What the guard must know, in memory that both have. */
struct progress {
	volatile enum phase phase;
	volatile unsigned int piece;
	volatile uint64_t done; /* bytes of that piece */
	volatile uint64_t total;
};

typedef struct user_regs_struct registers;

/* attend.h, which Python reads, has them as plain words. */
union words {
	uint64_t words[27];
	registers regs;
};

_Static_assert(sizeof(union words) == 27 * 8, "user_regs_struct has 27 words");

static struct snap_attended task;
static char frames[SNAP_ATTEND_MOST_BYTES], saved[SNAP_ATTEND_MOST_BYTES], found[SNAP_ATTEND_MOST_BYTES];
static struct snap_piece pieces[SNAP_ATTEND_MOST_PIECES];
static struct progress *progress;
static int giving_back;

static long call6(long number, long one, long two, long three, long four, long five, long six)
{
	register long result __asm__("rax") = number;
	register long r10 __asm__("r10") = four;
	register long r8 __asm__("r8") = five;
	register long r9 __asm__("r9") = six;

	__asm__ volatile("syscall"
			 : "+r"(result)
			 : "D"(one), "S"(two), "d"(three), "r"(r10), "r"(r8), "r"(r9)
			 : "rcx", "r11", "memory");
	return result;
}

static long trace(long request, long address, const void *data)
{
	return call4(SYS_PTRACE, request, task.tid, address, (long)data);
}

static int get(void *into, unsigned long size_bytes)
{
	char *at = into;

	while (size_bytes > 0) {
		long got = call3(SYS_READ, STDIN, (long)at, (long)size_bytes);

		if (got == EINTR_RESULT)
			continue;
		if (got <= 0)
			return 0;
		at += got;
		size_bytes -= (unsigned long)got;
	}
	return 1;
}

static int put_memory(const char *bytes)
{
	return call4(SYS_PWRITE, MEM, (long)bytes, task.frames_length, (long)task.frames_at) == (long)task.frames_length;
}

/* -- its registers ---------------------------------------------------------------------------------------------- */

static registers from_words(const uint64_t *words)
{
	union words result;

	for (int i = 0; i < 27; i++)
		result.words[i] = words[i];
	return result.regs;
}

static registers own_registers(void)
{
	registers own = from_words(task.regs);

	own.rax = progress->total;
	own.orig_rax = NOT_IN_SYSCALL;
	return own;
}

static void give_own_registers(void)
{
	registers own = own_registers();

	trace(PTRACE_SETREGS, 0, &own);
}

static registers calling_registers(void)
{
	registers regs = own_registers();
	uint64_t args[6];
	const struct snap_piece *piece = pieces + progress->piece;

	for (int i = 0; i < 6; i++)
		args[i] = task.args[i];
	if (task.address_arg < 6)
		args[task.address_arg] = piece->address + progress->done;
	args[task.length_arg] = piece->length - progress->done;
	regs.rdi = args[0];
	regs.rsi = args[1];
	regs.rdx = args[2];
	regs.r10 = args[3];
	regs.r8 = args[4];
	regs.r9 = args[5];
	regs.rax = task.nr;
	regs.rip -= SYSCALL_LENGTH;
	return regs;
}

/* Whether it stands where it was parked, and has not left through its frame. */
static int is_parked(const registers *regs)
{
	registers parked = from_words(task.parked);

	if (regs->rsp == parked.rsp) {
		if (regs->rip != parked.rip && regs->rip != parked.rip + SYSCALL_LENGTH)
			return 0;
	} else if (regs->rsp != parked.rsp + 8 || regs->rip - task.restorer > task.restorer_length) {
		return 0;
	}
	if (call4(SYS_PREAD, MEM, (long)found, task.frames_length, (long)task.frames_at) != (long)task.frames_length)
		return 0;
	for (unsigned int i = 0; i < task.frames_length; i++)
		if (found[i] != frames[i])
			return 0;
	return 1;
}

/* Whether it is in the call, or just out of it: nothing else has these registers. */
static int is_calling(const registers *regs)
{
	registers calling = calling_registers();

	return regs->rsp == calling.rsp && regs->rdi == calling.rdi && regs->rsi == calling.rsi && regs->rdx == calling.rdx &&
	       regs->r10 == calling.r10 && regs->r8 == calling.r8 && regs->r9 == calling.r9 && regs->rbx == calling.rbx &&
	       regs->rbp == calling.rbp && (regs->rip == calling.rip || regs->rip == calling.rip + SYSCALL_LENGTH);
}

/* -- its signals ------------------------------------------------------------------------------------------------ */

static uint64_t status_word(const char *text, long length, const char *name)
{
	uint64_t word = 0;

	for (long at = 0; at + 24 <= length; at++) {
		if ((at > 0 && text[at - 1] != '\n'))
			continue;
		int same = 1;
		for (int i = 0; name[i]; i++)
			same = same && text[at + i] == name[i];
		if (!same)
			continue;
		for (at += 8; at < length && text[at] != '\n'; at++)
			word = word * 16 + (uint64_t)(text[at] <= '9' ? text[at] - '0' : text[at] - 'a' + 10);
		break;
	}
	return word;
}

/* Its signals as /proc/TID/status shows them: pending ones that end a call, and those that would if they came. */
static uint64_t signals(int pending_only)
{
	static char text[8192];
	char path[32] = "/proc/";
	char digits[12];
	int at = 6, n = 0, tid = task.tid;
	long length = 0, got, fd;
	uint64_t ends;

	do
		digits[n++] = (char)('0' + tid % 10);
	while ((tid /= 10) > 0);
	while (n > 0)
		path[at++] = digits[--n];
	for (const char *rest = "/status"; *rest; rest++)
		path[at++] = *rest;
	path[at] = 0;
	fd = call3(SYS_OPEN, (long)path, 0, 0);
	if (fd < 0)
		return pending_only ? 0 : ~0ULL;
	while (length < (long)sizeof(text) && (got = call3(SYS_READ, fd, (long)text + length, (long)sizeof(text) - length)) > 0)
		length += got;
	call3(SYS_CLOSE, fd, 0, 0);
	ends = ~(IGNORED_BY_DEFAULT & ~status_word(text, length, "SigCgt:\t")) & ~status_word(text, length, "SigIgn:\t");
	if (pending_only)
		ends &= (status_word(text, length, "SigPnd:\t") | status_word(text, length, "ShdPnd:\t")) & ~task.sigmask;
	return ends;
}

/* -- its stops -------------------------------------------------------------------------------------------------- */

/* Its next stop; 0: it is gone. */
static int next_stop(void)
{
	uint64_t awaited = BIT(SIGCHLD) | BIT(SIGTERM);
	int status = 0;

	for (;;) {
		long got = call4(SYS_WAIT4, task.tid, (long)&status, WALL | WNOHANG, 0);

		if (got < 0 || (got > 0 && (status & 0xff) != 0x7f))
			return 0;
		if (got > 0)
			return status;
		if (call4(SYS_RT_SIGTIMEDWAIT, (long)&awaited, 0, 0, 8) == SIGTERM && !giving_back) {
			giving_back = 1;
			trace(PTRACE_INTERRUPT, 0, 0);
		}
	}
}

/* Give it its own registers, with what is transferred so far, and let it go. */
static void let_go(long signo)
{
	give_own_registers();
	progress->phase = OVER;
	trace(PTRACE_DETACH, 0, (void *)signo);
}

static void park(void)
{
	uint64_t all = ~0ULL;

	give_own_registers();
	progress->phase = OVER;
	*(uint64_t *)(frames + task.result_at) = progress->total;
	if (put_memory(frames)) {
		trace(PTRACE_SETREGS, 0, task.parked);
		trace(PTRACE_SETSIGMASK, 8, &all);
	}
	trace(PTRACE_DETACH, 0, 0);
}

static void send(void)
{
	registers regs = calling_registers();

	progress->phase = CALLING;
	trace(PTRACE_SETREGS, 0, &regs);
	trace(PTRACE_SYSCALL, 0, 0);
}

/* From the poll into its own registers. At every step it goes on rightly if we end. */
static void unpark(void)
{
	give_own_registers();
	trace(PTRACE_SETSIGMASK, 8, &task.sigmask);
	put_memory(saved);
}

/* Note what a call has returned. Whether there is more to do. */
static int note(long result)
{
	const struct snap_piece *piece = pieces + progress->piece;

	if (result == -EINTR || (result <= -ERESTARTSYS && result >= -ERESTART_RESTARTBLOCK))
		return 1;
	if (result <= 0)
		return 0; /* an end of file, or an error: the next call will see it */
	progress->total += (uint64_t)result;
	progress->done += (uint64_t)result;
	if (progress->done >= piece->length) {
		progress->piece++;
		progress->done = 0;
	}
	return progress->piece < task.nr_pieces;
}

/* A call has returned: all is done, or a signal wants to be heard, or the next one. */
static int returned(long result)
{
	if (!note(result) || signals(1))
		let_go(0);
	else if (giving_back)
		park();
	else {
		send();
		return 1;
	}
	return 0;
}

/* Whether the first stop finds it where we may take it over; it then is on its way into the call. */
static int take_over(int is_group_stop)
{
	registers regs;

	if (trace(PTRACE_GETREGS, 0, &regs) < 0)
		return 0;
	if (progress->phase == PARKED && is_parked(&regs)) {
		if (giving_back) {
			trace(PTRACE_DETACH, 0, 0);
			return 0;
		}
		unpark();
		if (!is_group_stop) {
			send();
			return 1;
		}
		let_go(0);
	} else if (progress->phase == CALLING && is_calling(&regs)) {
		int inside = (long)regs.orig_rax == (long)task.nr;

		if (inside || regs.rip == calling_registers().rip + SYSCALL_LENGTH) {
			if (!is_group_stop)
				return returned((long)regs.rax);
			note((long)regs.rax);
		}
		let_go(0);
	} else {
		trace(PTRACE_DETACH, 0, 0);
	}
	return 0;
}

/* A dying process closes its descriptors before it lets its tracees go: the guard may come too early. */
static int seize(int tries)
{
	static const long pause[2] = {0, SEIZE_PAUSE_NS};
	long result;

	while ((result = trace(PTRACE_SEIZE, 0, (void *)PTRACE_O_TRACESYSGOOD)) == EPERM_RESULT && --tries > 0)
		call3(SYS_NANOSLEEP, (long)pause, 0, 0);
	return result == 0;
}

static void attend(int tries)
{
	int in_call = 0, begun = 0, status;

	if (progress->phase == OVER || !seize(tries))
		return;
	trace(PTRACE_INTERRUPT, 0, 0);
	while ((status = next_stop()) != 0) {
		int signo = status >> 8 & 0xff, event = status >> 16;
		int group_stop = event == PTRACE_EVENT_STOP && (STOPS & BIT(signo)) != 0;

		if (!begun) {
			if (event != PTRACE_EVENT_STOP) {
				/* SIGSTOP, which cannot be blocked; or, for the guard, any other. */
				trace(PTRACE_INTERRUPT, 0, 0);
				trace(PTRACE_CONT, 0, (void *)(long)signo);
				continue;
			}
			if (!take_over(group_stop))
				return;
			begun = 1;
			in_call = 0;
		} else if (group_stop) {
			let_go(0);
			return;
		} else if (event == PTRACE_EVENT_STOP) {
			if (giving_back) {
				park();
				return;
			}
			trace(PTRACE_SYSCALL, 0, 0);
		} else if (signo == SYSCALL_STOP) {
			registers regs;

			in_call = !in_call;
			if (in_call) {
				trace(PTRACE_SYSCALL, 0, 0);
				continue;
			}
			if (trace(PTRACE_GETREGS, 0, &regs) < 0 || !returned((long)regs.rax))
				return;
		} else if (signals(0) & BIT(signo)) {
			let_go(signo);
			return;
		} else {
			trace(PTRACE_SYSCALL, 0, (void *)(long)signo); /* it is ignored */
		}
	}
}

__attribute__((used)) _Noreturn void attendant_main(void)
{
	static const uint64_t default_action[4];
	uint64_t blocked = BIT(SIGCHLD) | BIT(SIGTERM);
	int ends[2];
	char done = 'k';

	call3(SYS_SETPRIORITY, 0, 0, 0); /* snap is in a hurry, we are not */
	call4(SYS_RT_SIGACTION, SIGCHLD, (long)default_action, 0, 8);
	call4(SYS_RT_SIGPROCMASK, 2, (long)&blocked, 0, 8);
	if (!get(&task, sizeof(task)) || task.nr_pieces > SNAP_ATTEND_MOST_PIECES || task.nr_pieces == 0 ||
	    task.frames_length > SNAP_ATTEND_MOST_BYTES || task.frames_length < 8 || task.result_at > task.frames_length - 8 || task.length_arg > 5 ||
	    !get(frames, task.frames_length) || !get(saved, task.frames_length) ||
	    !get(pieces, task.nr_pieces * sizeof(pieces[0])))
		leave(2);
	if (call3(SYS_FORK, 0, 0, 0) != 0)
		leave(0); /* snap waits for this one only */
	progress = (void *)call6(SYS_MMAP, 0, 4096, READ_WRITE, SHARED_ANONYMOUS, -1, 0);
	if ((unsigned long)progress >= (unsigned long)-MOST_ERRNO || call3(SYS_PIPE, (long)ends, 0, 0) < 0)
		leave(2);
	progress->total = from_words(task.regs).rax;
	if (call3(SYS_FORK, 0, 0, 0) == 0) {
		long got;

		call3(SYS_CLOSE, ends[1], 0, 0);
		do
			got = call3(SYS_READ, ends[0], (long)&done, 1);
		while (got == EINTR_RESULT);
		if (got == 0)
			attend(GUARD_TRIES);
		leave(0);
	}
	call3(SYS_CLOSE, ends[0], 0, 0);
	attend(1);
	call3(SYS_WRITE, ends[1], (long)&done, 1);
	leave(0);
}

START_WITH(attendant_main)
