/* The watchdog: ends snap when a job has stood still for too long.
 *
 * Whatever a job is held by ends with its tracer: the kernel detaches every task of a tracer that dies, and they go on.
 * So the one thing that can keep a job frozen is a snap that neither goes on nor dies. This process kills it.
 *
 *   watchdog SNAPFD NOTEFD
 *
 * SNAPFD is a pidfd of snap, NOTEFD a file of which the first NOTE_SIZE bytes say what snap is doing (text, a zero byte behind
 * it). Stdin is one end of a stream socket, snap has the other. A message is one 32-bit word, native order: in how many
 * milliseconds from now snap is to be killed, or 0: the job is not held (any more). A later message replaces the earlier. The
 * end of the stream is the end of snap: there is nothing left to watch.
 *
 * Snap lets the job go by itself when its time is over (checkpoint/watchdog.py); this is for the snap that cannot. */

#include <linux/poll.h>

#include "freestanding.h"

#define STDIN 0
#define STDERR 2
#define NOTE_SIZE 512
#define KILL 9
#define MONOTONIC 1
#define PRIORITY_OF_PROCESS 0

static int number(const char *text)
{
	int value = 0;

	while (*text >= '0' && *text <= '9')
		value = value * 10 + (*text++ - '0');
	return value;
}

static long now_ms(void)
{
	long time[2] = {0, 0};

	call3(SYS_CLOCK_GETTIME, MONOTONIC, (long)time, 0);
	return time[0] * 1000 + time[1] / 1000000;
}

static void say(const char *text)
{
	long length = 0;

	while (text[length])
		length++;
	call3(SYS_WRITE, STDERR, (long)text, length);
}

static void end_snap(int snap, int note_fd)
{
	char note[NOTE_SIZE + 1];
	long got;

	call4(SYS_PIDFD_SEND_SIGNAL, snap, KILL, 0, 0);
	/* Afterwards: nobody may read what we say, and SIGPIPE would end us. */
	got = call4(SYS_PREAD64, note_fd, (long)note, NOTE_SIZE, 0);
	note[got > 0 ? got : 0] = 0;
	say("snap: the job stood still for too long (--max-frozen) and snap could not let it go, so snap was killed and the "
	    "job goes on");
	if (note[0]) {
		say("; snap was ");
		say(note);
	}
	say("\n");
}

__attribute__((used)) _Noreturn void watchdog_main(const long *stack)
{
	const char *const *argv = (const char *const *)(stack + 1);
	struct pollfd waiting = {STDIN, POLLIN, 0};
	long limit = -1; /* when, in milliseconds of the monotonic clock; -1: never */
	int snap, note;

	if (stack[0] != 3)
		leave(2);
	snap = number(argv[1]);
	note = number(argv[2]);
	/* It must run when its time has come, however busy the machine is; who may not have this goes without. */
	call3(SYS_SETPRIORITY, PRIORITY_OF_PROCESS, 0, -20);
	for (;;) {
		unsigned int word = 0;
		long left = limit < 0 ? -1 : limit - now_ms();

		if (limit >= 0 && left <= 0) {
			end_snap(snap, note);
			limit = -1;
			continue;
		}
		if (call3(SYS_POLL, (long)&waiting, 1, left) <= 0)
			continue;
		if (call3(SYS_READ, STDIN, (long)&word, sizeof(word)) != sizeof(word))
			leave(0);
		limit = word ? now_ms() + word : -1;
	}
}

START_WITH(watchdog_main)
