/* The finisher: makes one step of snap's that takes a system call per process happen for all of them or for none.
 *
 * Killing a job, or taking PTRACE_O_EXITKILL from a restored one, goes process by process; snap killed in between would
 * leave half a job. So snap tells this process beforehand which signal all of them are to get should it end before it
 * says that the step is done.
 *
 * Stdin is one end of a stream socket, snap has the other. A message is three kinds of 32-bit words, native order:
 *
 *   offset  size       what
 *        0     4       signal
 *        4     4       number of processes N; 0: nothing is under way (any more)
 *        8     4 * N   pids
 *
 * Each is answered by one byte 'k' once it holds. The end of the stream while N > 0: the signal for every one of
 * them. Their pids are turned into pidfds while snap holds the processes, so that nobody else can be hit. */

#include "freestanding.h"

#define MAX_PROCESSES (1 << 20)
#define STDIN 0

static int targets[MAX_PROCESSES]; /* > 0: a pidfd, < 0: a pid without one (no descriptor was left), 0: gone */

/* Whether all of it came. */
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

static void signal_all(unsigned int count, unsigned int signo)
{
	for (unsigned int i = 0; i < count; i++) {
		if (targets[i] > 0)
			call4(SYS_PIDFD_SEND_SIGNAL, targets[i], signo, 0, 0);
		else if (targets[i] < 0)
			call3(SYS_KILL, -(long)targets[i], signo, 0);
	}
}

__attribute__((used)) _Noreturn void finisher_main(void)
{
	unsigned int words[2] = {0, 0}; /* the signal, how many */
	unsigned int next[2];
	char answer = 'k';

	while (get(next, sizeof(next))) {
		for (unsigned int i = 0; i < words[1]; i++)
			if (targets[i] > 0)
				call3(SYS_CLOSE, targets[i], 0, 0);
		words[1] = 0;
		if (next[1] > MAX_PROCESSES || !get(targets, next[1] * sizeof(targets[0])))
			leave(2);
		for (unsigned int i = 0; i < next[1]; i++) {
			long pidfd = call3(SYS_PIDFD_OPEN, targets[i], 0, 0);

			if (pidfd == ESRCH_RESULT)
				targets[i] = 0;
			else
				targets[i] = pidfd < 0 ? -targets[i] : (int)pidfd;
		}
		words[0] = next[0];
		words[1] = next[1];
		call4(SYS_SENDTO, STDIN, (long)&answer, 1, MSG_NOSIGNAL);
	}
	signal_all(words[1], words[0]);
	leave(0);
}

START_WITH(finisher_main)
