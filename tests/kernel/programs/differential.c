/* A random program of raw system calls whose every result is written down: differential SEED STEPS LOG [ONLY].
 * ONLY is the beginning of the names of the steps that are done.
 *
 * The same seed gives the same log, with and without takes in between. So there are no addresses, pids or times in it: only results,
 * errnos, counts and digests of data. Nothing here retries EINTR or finishes a short transfer; whatever a call returns is logged.
 *
 * Each step seeds the generator anew with (SEED, number), so that a difference does not spread into later steps by way of it.
 *
 * Left out, for the documented exceptions (tests/differential.py, EXCEPTIONS): mremap works on one mapping that nothing was mapped into.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/signalfd.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/timerfd.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

#define PAGE 4096l
#define MOST 400000
#define NR_MAPS 12
#define SOME_NS 3000000l

static uint64_t random_state;
static FILE *out;
static long step_number;
static char buffer[MOST], other[MOST];
static int spare[2], block[2], pair[2], stream[2], event, file, memfd, epoll, timer;
static volatile sig_atomic_t handled;
static struct { char *at; long pages; } maps[NR_MAPS];
static const struct timespec *short_time; /* in read-only memory */
static const struct timeval *short_timeval;
static char *heap;
static long heap_pages;

static uint64_t number(uint64_t below) {
  random_state += 0x9e3779b97f4a7c15ull;
  uint64_t z = random_state;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
  return (z ^ (z >> 31)) % below;
}

static void say(const char *format, ...) {
  va_list list;
  va_start(list, format);
  fprintf(out, "%ld ", step_number);
  vfprintf(out, format, list);
  putc('\n', out);
  va_end(list);
}

static long got(long result) { return result < 0 ? -errno : result; }

static uint64_t digest(const char *data, long size) {
  uint64_t hash = 1469598103934665603ull;
  for (long i = 0; i < size; i++) hash = (hash ^ (unsigned char)data[i]) * 1099511628211ull;
  return hash;
}

static void fill(long size) {
  uint64_t value = number(1ull << 62);
  for (long i = 0; i < size; i++) buffer[i] = (char)((value += 0x9e3779b97f4a7c15ull) >> 40);
}

static void data(const char *name, long result) { say("%s %ld %lx", name, result, result > 0 ? digest(other, result) : 0); }

static long now_ns(void) {
  struct timespec at;
  clock_gettime(CLOCK_MONOTONIC, &at);
  return at.tv_sec * 1000000000l + at.tv_nsec;
}

static void nap(long ns) {
  struct timespec left = {0, ns};
  syscall(SYS_nanosleep, &left, NULL);
}

/* -- memory -- */

static void do_map(void) {
  int i = number(NR_MAPS);
  if (maps[i].at) say("munmap %ld", got(syscall(SYS_munmap, maps[i].at, maps[i].pages * PAGE)));
  maps[i].pages = 1 + number(40);
  maps[i].at = mmap(NULL, maps[i].pages * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | (number(4) ? 0 : MAP_POPULATE), -1, 0);
  /* A page between them: what is mapped later must not be one with it (documented exception). */
  say("mmap %d", maps[i].at != MAP_FAILED);
}

static int some(void) {
  int i = number(NR_MAPS);
  if (!maps[i].at) {
    maps[i].pages = 3;
    maps[i].at = mmap(NULL, 3 * PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  }
  return i;
}

static void do_touch(void) {
  int i = some();
  for (int times = number(6); times >= 0; times--) maps[i].at[number(maps[i].pages * PAGE)] = number(256);
  say("touch %lx", digest(maps[i].at, maps[i].pages * PAGE));
}

static void do_remap(void) {
  int i = some();
  long pages = 1 + number(60);
  long at = syscall(SYS_mremap, maps[i].at, maps[i].pages * PAGE, pages * PAGE, MREMAP_MAYMOVE, 0);
  say("mremap %ld", at == -1 ? -(long)errno : 0l);
  if (at == -1) return;
  maps[i].at = (char *)at;
  maps[i].pages = pages;
  say("moved %lx", digest(maps[i].at, pages * PAGE));
}

static void do_protect(void) {
  int i = some();
  long page = number(maps[i].pages);
  char *at = maps[i].at + page * PAGE;
  long one = got(syscall(SYS_mprotect, at, PAGE, PROT_READ));
  long refused = got(syscall(SYS_pread64, file, at, 10, 0)), two = got(syscall(SYS_mprotect, at, PAGE, PROT_READ | PROT_WRITE));
  say("mprotect %ld %ld %ld", one, refused, two);
}

static void do_advise(void) {
  static const int kinds[] = {MADV_DONTNEED, MADV_WILLNEED, MADV_NOHUGEPAGE, MADV_HUGEPAGE, MADV_POPULATE_WRITE, MADV_SEQUENTIAL};
  int i = some(), kind = kinds[number(6)];
  long page = number(maps[i].pages);
  long result = got(syscall(SYS_madvise, maps[i].at + page * PAGE, PAGE, kind));
  say("madvise %d %ld %lx", kind, result, digest(maps[i].at, maps[i].pages * PAGE));
}

static void do_brk(void) {
  long pages = number(50);
  char *wanted = heap + pages * PAGE;
  int done = syscall(SYS_brk, wanted) == (long)wanted;
  if (pages > heap_pages)
    for (long i = heap_pages; i < pages; i++) heap[i * PAGE] += i;
  heap_pages = pages;
  say("brk %d %lx", done, digest(heap, pages * PAGE));
}

/* -- pipes and sockets -- */

static void do_pipe(void) {
  long size = 1 + number(60000);
  fill(size);
  if (number(2)) say("pipe_write %ld", got(syscall(SYS_write, spare[1], buffer, size)));
  else data("pipe_read", got(syscall(SYS_read, spare[0], other, size)));
}

static void do_socket(void) {
  long size = 1 + number(20000);
  fill(size);
  int flags = number(3) ? MSG_DONTWAIT : MSG_DONTWAIT | MSG_PEEK;
  if (number(2)) say("send %ld", got(syscall(SYS_sendto, pair[0], buffer, size, MSG_DONTWAIT, 0, 0)));
  else data("recv", got(syscall(SYS_recvfrom, pair[1], other, size, flags, 0, 0)));
}

struct transfer { int fd; long size; long piece; uint64_t hash; };

static void *reads_slowly(void *argument) {
  struct transfer *it = argument;
  static char into[MOST];
  long have = 0;
  nap(SOME_NS);
  while (have < it->size) {
    long piece = it->piece < it->size - have ? it->piece : it->size - have;
    long one = read(it->fd, into + have, piece);
    if (one < 0 && errno == EINTR) continue; /* only the writer is on trial */
    if (one <= 0) break;
    have += one;
  }
  it->hash = digest(into, have);
  return NULL;
}

/* A write of more than fits blocks until all is read, and returns all of it. */
static void large(const char *name, int from, int to) {
  struct transfer it = {from, 100000 + (long)number(MOST - 100000), 20000, 0};
  pthread_t reader;
  fill(it.size);
  pthread_create(&reader, NULL, reads_slowly, &it);
  long result = got(syscall(SYS_write, to, buffer, it.size));
  if (result > 0 && result < it.size) { /* logged below; the rest is sent so that the reader ends */
    for (long at = result; at < it.size;) {
      long one = write(to, buffer + at, it.size - at);
      if (one > 0) at += one;
    }
  }
  pthread_join(reader, NULL);
  say("%s %ld %lx", name, result - it.size, it.hash);
}

static void do_large_pipe(void) { large("large_pipe", block[0], block[1]); }
static void do_large_stream(void) { large("large_stream", stream[0], stream[1]); }

static void *writes_slowly(void *argument) {
  struct transfer *it = argument;
  for (long at = 0; at < it->size;) {
    nap(SOME_NS / 3);
    long piece = it->piece < it->size - at ? it->piece : it->size - at;
    long one = write(it->fd, buffer + at, piece);
    if (one > 0) at += one;
  }
  return NULL;
}

static void do_wait_all(void) {
  struct transfer it = {stream[1], 1000 + (long)number(50000), 10000, 0};
  pthread_t writer;
  fill(it.size);
  pthread_create(&writer, NULL, writes_slowly, &it);
  long result = got(syscall(SYS_recvfrom, stream[0], other, it.size, MSG_WAITALL, 0, 0));
  pthread_join(writer, NULL);
  for (long at = result > 0 ? result : 0; at < it.size;) {
    long one = read(stream[0], other + at, it.size - at);
    if (one > 0) at += one;
  }
  say("wait_all %ld %lx", result - it.size, digest(other, it.size));
}

static void do_blocking_read(void) {
  struct transfer it = {block[1], 1 + (long)number(100), 100, 0};
  pthread_t writer;
  fill(it.size);
  pthread_create(&writer, NULL, writes_slowly, &it);
  data("blocking_read", got(syscall(SYS_read, block[0], other, 100)));
  pthread_join(writer, NULL);
}

/* -- waiting -- */

static void do_poll(void) {
  struct pollfd set[] = {{spare[0], POLLIN, 0}, {spare[1], POLLOUT, 0}, {event, POLLIN, 0}, {pair[1], POLLIN, 0}};
  long result = got(syscall(SYS_poll, set, 4, 0));
  say("poll %ld %x %x %x %x", result, set[0].revents, set[1].revents, set[2].revents, set[3].revents);
}

/* Nothing comes: every kind must wait out its time and say 0. How late is not logged. */
static void do_wait_in_vain(void) {
  struct pollfd one = {block[0], POLLIN, 0};
  struct epoll_event found;
  fd_set set;
  FD_ZERO(&set);
  FD_SET(block[0], &set);
  int kind = number(7);
  long began = now_ns(), result = 0;
  switch (kind) {
    case 0: result = syscall(SYS_poll, &one, 1, 3); break;
    case 1: result = syscall(SYS_ppoll, &one, 1, short_time, NULL, 8); break;
    case 2: result = syscall(SYS_select, block[0] + 1, &set, NULL, NULL, short_timeval); break;
    case 3: result = syscall(SYS_pselect6, block[0] + 1, &set, NULL, NULL, short_time, NULL); break;
    case 4: { struct timespec wait = {0, SOME_NS}; result = syscall(SYS_nanosleep, &wait, NULL); break; }
    case 5: {
      struct timespec at = {0, 0};
      clock_gettime(CLOCK_MONOTONIC, &at);
      at.tv_nsec += SOME_NS;
      if (at.tv_nsec >= 1000000000l) at.tv_sec++, at.tv_nsec -= 1000000000l;
      result = syscall(SYS_clock_nanosleep, CLOCK_MONOTONIC, TIMER_ABSTIME, &at, NULL);
      break;
    }
    case 6: { int empty = epoll_create1(EPOLL_CLOEXEC); result = syscall(SYS_epoll_wait, empty, &found, 1, 3); close(empty); break; }
  }
  result = got(result);
  say("wait_in_vain %d %ld %d", kind, result, now_ns() - began >= SOME_NS);
}

static void do_epoll(void) {
  struct epoll_event change = {.data.u32 = 1}, found[4];
  static const uint32_t kinds[] = {0, EPOLLET, EPOLLONESHOT, EPOLLET | EPOLLONESHOT};
  int fds[] = {spare[0], event, pair[1]}, fd = number(3);
  change.events = EPOLLIN | kinds[number(4)];
  change.data.u32 = fd;
  int op = number(3);
  long result = op == 2 ? 0 : got(syscall(SYS_epoll_ctl, epoll, op ? EPOLL_CTL_MOD : EPOLL_CTL_ADD, fds[fd], &change));
  long count = got(syscall(SYS_epoll_wait, epoll, found, 4, 0));
  uint32_t sum = 0;
  for (long i = 0; i < count; i++) sum += (found[i].data.u32 + 1) * 100 + found[i].events;
  say("epoll %d %ld %ld %u", op, result, count, sum);
}

static void do_timerfd(void) {
  struct itimerspec set = {.it_value = {0, 1000000 + number(SOME_NS)}}, left;
  uint64_t expired = 0;
  long one = got(syscall(SYS_timerfd_settime, timer, 0, &set, NULL));
  long two = got(syscall(SYS_read, timer, &expired, 8));
  timerfd_gettime(timer, &left);
  say("timerfd %ld %ld %lu %ld", one, two, expired, left.it_value.tv_nsec);
}

static void do_posix_timer(void) {
  sigset_t set;
  siginfo_t info;
  timer_t made;
  struct sigevent event_of = {.sigev_notify = SIGEV_SIGNAL, .sigev_signo = SIGRTMIN + 3, .sigev_value.sival_int = number(1000)};
  struct itimerspec when = {.it_value = {0, SOME_NS}};
  sigemptyset(&set);
  sigaddset(&set, SIGRTMIN + 3);
  if (timer_create(CLOCK_MONOTONIC, &event_of, &made)) { say("timer_create %d", errno); return; }
  timer_settime(made, 0, &when, NULL);
  long result = got(syscall(SYS_rt_sigtimedwait, &set, &info, NULL, 8));
  say("posix_timer %ld %d %d", result, info.si_code, info.si_value.sival_int);
  timer_delete(made);
}

static uint32_t futex_word;

static void *wakes(void *unused) {
  nap(SOME_NS);
  __atomic_store_n(&futex_word, 1, __ATOMIC_SEQ_CST);
  syscall(SYS_futex, &futex_word, FUTEX_WAKE, 1, NULL, NULL, 0);
  return unused;
}

static void do_futex(void) {
  pthread_t waker;
  if (number(2)) {
    futex_word = 0;
    say("futex_timeout %ld", got(syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, short_time, NULL, 0)));
    return;
  }
  futex_word = 0;
  pthread_create(&waker, NULL, wakes, NULL);
  long result = got(syscall(SYS_futex, &futex_word, FUTEX_WAIT, 0, NULL, NULL, 0));
  say("futex_wake %ld", result == -EAGAIN ? 0 : result); /* woken before it slept */
  pthread_join(waker, NULL);
}

/* -- signals -- */

static void handler(int signo) { (void)signo, handled++; }

static void do_signal(void) {
  sigset_t set, pending;
  sigemptyset(&set);
  sigaddset(&set, SIGRTMIN + 1);
  union sigval value = {.sival_int = number(1000)};
  siginfo_t info = {0};
  struct signalfd_siginfo read_info = {0};
  switch (number(4)) {
    case 0: kill(getpid(), SIGUSR1); say("kill %d", handled); break;
    case 1:
      sigqueue(getpid(), SIGRTMIN + 1, value);
      sigpending(&pending);
      say("sigqueue %d", sigismember(&pending, SIGRTMIN + 1));
      break;
    case 2: {
      struct timespec none = {0, number(2) ? SOME_NS : 0};
      long result = got(syscall(SYS_rt_sigtimedwait, &set, &info, &none, 8));
      say("sigtimedwait %ld %d", result, result > 0 ? info.si_value.sival_int : 0);
      break;
    }
    case 3: {
      int fd = signalfd(-1, &set, SFD_NONBLOCK);
      long result = got(read(fd, &read_info, sizeof read_info));
      say("signalfd %ld %d", result, read_info.ssi_int);
      close(fd);
    }
  }
}

/* -- the rest -- */

static void do_eventfd(void) {
  uint64_t value = number(9);
  long result = number(2) ? syscall(SYS_write, event, &value, 8) : syscall(SYS_read, event, &value, 8);
  result = got(result);
  say("eventfd %ld %lu", result, value);
}

static void do_fork(void) {
  int code = number(200), killed = number(4) == 0, status = 0;
  fflush(out);
  pid_t child = fork();
  if (!child) {
    if (killed) raise(SIGKILL);
    nap(number(1000000));
    _exit(code);
  }
  long result = syscall(SYS_wait4, child, &status, 0, NULL);
  result = got(result);
  say("fork %d %x", result == child ? 0 : (int)result, status);
}

static void do_dup(void) {
  int fd = dup(number(2) ? spare[0] : pair[1]);
  int flags = fcntl(fd, F_GETFL), close_flag = fcntl(fd, F_GETFD);
  int changed = fcntl(fd, F_SETFD, FD_CLOEXEC), after = fcntl(fd, F_GETFD);
  say("dup %d %x %d %d %d %ld", fd, flags, close_flag, changed, after, got(close(fd)));
}

static void do_lock(void) {
  struct flock lock = {.l_type = number(3), .l_whence = SEEK_SET, .l_start = number(100), .l_len = 1 + number(100)};
  long one = got(syscall(SYS_fcntl, file, F_SETLK, &lock)), two = got(flock(memfd, number(2) ? LOCK_EX | LOCK_NB : LOCK_UN));
  struct flock ask = {.l_type = F_WRLCK, .l_whence = SEEK_SET, .l_start = lock.l_start, .l_len = 1};
  fflush(out);
  pid_t child = fork();
  if (!child) _exit(fcntl(file, F_GETLK, &ask) ? 99 : ask.l_type);
  int status = 0;
  while (waitpid(child, &status, 0) < 0) {}
  say("lock %ld %ld %x", one, two, status);
}

static void do_file(void) {
  int fd = number(2) ? file : memfd;
  long size = 1 + number(5000), at = number(20000), result = 0;
  fill(size);
  int kind = number(6);
  switch (kind) {
    case 0: result = syscall(SYS_write, fd, buffer, size); break;
    case 1: result = syscall(SYS_pwrite64, fd, buffer, size, at); break;
    case 2: result = syscall(SYS_lseek, fd, at, SEEK_SET); break;
    case 3: result = syscall(SYS_ftruncate, fd, at); break;
    case 4: result = fcntl(fd, F_SETFL, (number(2) ? O_APPEND : 0) | O_RDWR); break;
    case 5: result = syscall(SYS_read, fd, buffer, size); break;
  }
  result = got(result);
  long where = lseek(fd, 0, SEEK_CUR);
  long end = syscall(SYS_pread64, fd, other, 60000, 0);
  say("file %d %ld %ld %lx", kind, result, where, digest(other, end > 0 ? end : 0));
}

static void *adds(void *argument) {
  for (int i = 0; i < 1000; i++) __atomic_add_fetch((long *)argument, i, __ATOMIC_RELAXED);
  return argument;
}

static void do_threads(void) {
  pthread_t made[3];
  long sum = 0;
  for (int i = 0; i < 3; i++) pthread_create(&made[i], NULL, adds, &sum);
  for (int i = 0; i < 3; i++) pthread_join(made[i], NULL);
  say("threads %ld", sum);
}

#define STEP(name) {#name, do_##name}
static const struct { const char *name; void (*run)(void); } steps[] = {
    STEP(map), STEP(touch), STEP(touch), STEP(remap), STEP(protect), STEP(advise), STEP(brk), STEP(pipe), STEP(pipe),
    STEP(socket), STEP(socket), STEP(large_pipe), STEP(large_stream), STEP(wait_all), STEP(blocking_read), STEP(poll),
    STEP(wait_in_vain), STEP(wait_in_vain), STEP(epoll), STEP(timerfd), STEP(posix_timer), STEP(futex), STEP(signal),
    STEP(signal), STEP(eventfd), STEP(fork), STEP(dup), STEP(lock), STEP(file), STEP(file), STEP(threads),
};
#define NR_STEPS (sizeof steps / sizeof *steps)

static void prepare(void) {
  char *constant = mmap(NULL, PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  *(struct timespec *)constant = (struct timespec){0, SOME_NS};
  *(struct timeval *)(constant + 64) = (struct timeval){0, SOME_NS / 1000};
  mprotect(constant, PAGE, PROT_READ);
  short_time = (void *)constant;
  short_timeval = (void *)(constant + 64);
  sigset_t blocked;
  sigemptyset(&blocked);
  sigaddset(&blocked, SIGRTMIN + 1);
  sigaddset(&blocked, SIGRTMIN + 3);
  sigprocmask(SIG_BLOCK, &blocked, NULL);
  struct sigaction action = {.sa_handler = handler, .sa_flags = SA_RESTART};
  sigaction(SIGUSR1, &action, NULL);
  int bad = pipe2(spare, O_NONBLOCK) || pipe2(block, 0) || socketpair(AF_UNIX, SOCK_SEQPACKET, 0, pair);
  bad = bad || socketpair(AF_UNIX, SOCK_STREAM, 0, stream);
  event = eventfd(0, EFD_NONBLOCK);
  memfd = memfd_create("differential", 0);
  epoll = epoll_create1(0);
  timer = timerfd_create(CLOCK_MONOTONIC, 0);
  /* Where malloc's heap will be is malloc's: it is told to keep off. */
  heap = (char *)((((unsigned long)sbrk(0)) + PAGE - 1) & ~(PAGE - 1));
  if (bad || event < 0 || memfd < 0 || epoll < 0 || timer < 0) exit(3);
}

int main(int count, char **words) {
  if (count != 4 && count != 5) return 2;
  char name[4096];
  static char for_log[1 << 16];
  uint64_t seed = strtoull(words[1], NULL, 10);
  long nr_steps = atol(words[2]);
  int log = open(words[3], O_WRONLY | O_CREAT | O_TRUNC | O_APPEND | O_CLOEXEC, 0644);
  snprintf(name, sizeof name, "%s.data", words[3]);
  file = open(name, O_RDWR | O_CREAT | O_TRUNC, 0600);
  out = fdopen(log, "a");
  if (!out || file < 0) return 3;
  setvbuf(out, for_log, _IOLBF, sizeof for_log);
  void *arena = malloc(1); /* before the heap is ours */
  prepare();
  for (step_number = 0; step_number < nr_steps; step_number++) {
    random_state = seed * 1000003 + step_number;
    number(2);
    /* With ONLY: the next one that is named by it. */
    unsigned chosen = number(NR_STEPS), tried = 0;
    while (count == 5 && strncmp(steps[chosen].name, words[4], strlen(words[4]))) {
      if (tried++ == NR_STEPS) return 2;
      chosen = (chosen + 1) % NR_STEPS;
    }
    steps[chosen].run();
  }
  say("end");
  free(arena);
  return 0;
}
