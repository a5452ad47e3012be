/* A request of io_uring that the kernel has a worker do: a thread of this process by /proc, which runs nothing of it, cannot be stopped
 * like a thread of it, and is not part of a point. It waits for more to do when the take comes. */
#include "uring_ring.h"
#include <dirent.h>

static int nr_workers(void)
{
    char path[300], name[32];
    int found = 0;
    DIR *tasks = opendir("/proc/self/task");
    for (struct dirent *entry; (entry = readdir(tasks)) != NULL;) {
        snprintf(path, sizeof(path), "/proc/self/task/%s/comm", entry->d_name);
        FILE *file = fopen(path, "r");
        if (file == NULL)
            continue;
        if (fgets(name, sizeof(name), file) != NULL && strncmp(name, "iou-wrk-", 8) == 0)
            found++;
        fclose(file);
    }
    closedir(tasks);
    return found;
}

static int ask(struct ring *r, int op, uint64_t token)
{
    prepare(r, op, token);
    if (hand_over(r) != 1)
        return -1001;
    return answer(r, token);
}

int main(int argc, char **argv)
{
    static struct ring ring;
    check_init(argc, argv);
    make(&ring, 0);
    ring.how = IOSQE_ASYNC;
    ring.event = (struct epoll_event){.events = EPOLLIN, .data.u32 = 7};
    if (ask(&ring, EPOLL_CTL_ADD, 1) != 0)
        check_die("EPOLL_CTL_ADD");
    if (nr_workers() == 0)
        check_die("a worker");
    check_ready();
    check_wait();
    ring.event.data.u32 = 8;
    CHECK(ask(&ring, EPOLL_CTL_MOD, 2) == 0, "another request");
    return check_done();
}
