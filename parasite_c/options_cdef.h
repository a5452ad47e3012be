// Options of sockets.
#define SNAP_OPTION_BYTES 64
void snap_get_options(int fd, const int32_t *names, size_t nr, char *values, int32_t *lengths);
