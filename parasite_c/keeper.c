/* The keeper: holds the descriptors that keep dirty-page tracking of a job alive between two takes.
 *
 * A userfaultfd's write protection lasts as long as any descriptor of it is open anywhere; the job must not be
 * bothered with it and snap ends after each take. This process keeps them, and a memfd with the nonce (the name of
 * the instant that the tracking tells from), and leaves when the last process of the job has ended. It reads nothing
 * and answers nobody: snap takes its descriptors with pidfd_getfd.
 *
 *   keeper STATEFILE NEWFILE LEASHFD OLDFD NONCEFD PIDFD[:UFFD] ...
 *
 * It forks, the parent writes the child's pid (decimal) to stdout and exits. The child then waits on LEASHFD, a socket
 * whose other end snap holds: a byte 'k' means that NEWFILE names this keeper. The end without it means that snap
 * died before: the keeper removes NEWFILE and leaves at once. With it, the keeper itself takes over: it renames NEWFILE
 * to STATEFILE, kills the keeper before it (OLDFD, a pidfd; "-": there is none) and answers 'k'. So whenever snap dies,
 * the state file names the one keeper that stays. STATEFILE is removed when the job ends.
 */

#include <linux/poll.h>
#include <linux/prctl.h>

#include "freestanding.h"

#define MAX_TASKS 16384
#define STDOUT 1
#define PTRACER_ANY (-1L)
#define KILL 9
#define FIRST_TASK 6

static struct pollfd polled[MAX_TASKS];
static int uffds[MAX_TASKS];

/* A decimal number; *text then points behind it. */
static int number(const char **text)
{
	int value = 0;

	while (**text >= '0' && **text <= '9')
		value = value * 10 + (*(*text)++ - '0');
	return value;
}

static void say_pid(long pid)
{
	char text[24];
	int at = (int)sizeof(text);

	text[--at] = '\n';
	do {
		text[--at] = (char)('0' + pid % 10);
		pid /= 10;
	} while (pid > 0);
	call3(SYS_WRITE, STDOUT, (long)(text + at), (long)sizeof(text) - at);
}

static void take_over(int leash, int old, const char *statefile, const char *newfile)
{
	char byte = 0;
	long got;

	do {
		got = call3(SYS_READ, leash, (long)&byte, 1);
	} while (got == EINTR_RESULT);
	if (got != 1 || byte != 'k' || call3(SYS_RENAME, (long)newfile, (long)statefile, 0) < 0) {
		call3(SYS_UNLINK, (long)newfile, 0, 0);
		leave(1);
	}
	if (old >= 0) {
		call4(SYS_PIDFD_SEND_SIGNAL, old, KILL, 0, 0);
		call3(SYS_CLOSE, old, 0, 0);
	}
	/* Not write(): snap may be dead by now, and SIGPIPE would take us along. */
	call4(SYS_SENDTO, leash, (long)&byte, 1, MSG_NOSIGNAL);
	call3(SYS_CLOSE, leash, 0, 0);
}

static _Noreturn void keep(int count, const char *statefile)
{
	while (count > 0) {
		if (call3(SYS_POLL, (long)polled, count, -1) <= 0)
			continue;
		for (int i = 0; i < count;) {
			if (polled[i].revents == 0) {
				i++;
				continue;
			}
			call3(SYS_CLOSE, polled[i].fd, 0, 0);
			if (uffds[i] >= 0)
				call3(SYS_CLOSE, uffds[i], 0, 0);
			count--;
			polled[i] = polled[count];
			uffds[i] = uffds[count];
		}
	}
	call3(SYS_UNLINK, (long)statefile, 0, 0);
	leave(0);
}

__attribute__((used)) _Noreturn void keeper_main(const long *stack)
{
	long argc = stack[0];
	const char *const *argv = (const char *const *)(stack + 1);
	int count = 0;
	int leash, old = -1;
	long pid;
	const char *text;

	if (argc <= FIRST_TASK || argc - FIRST_TASK > MAX_TASKS)
		leave(2);
	text = argv[3];
	leash = number(&text);
	text = argv[4];
	if (*text != '-')
		old = number(&text);
	for (long i = FIRST_TASK; i < argc; i++) {
		text = argv[i];
		polled[count].fd = number(&text);
		polled[count].events = POLLIN;
		uffds[count] = -1;
		if (*text == ':') {
			text++;
			uffds[count] = number(&text);
		}
		count++;
	}
	pid = call3(SYS_FORK, 0, 0, 0);
	if (pid != 0) {
		if (pid > 0)
			say_pid(pid);
		leave(pid < 0);
	}
	call3(SYS_CLOSE, STDOUT, 0, 0);
	call3(SYS_PRCTL, PR_SET_NAME, (long)"snap-keeper", 0); /* top and ps -e show this */
	call3(SYS_PRCTL, PR_SET_PTRACER, PTRACER_ANY, 0);
	take_over(leash, old, argv[1], argv[2]);
	keep(count, argv[1]);
}

START_WITH(keeper_main)
