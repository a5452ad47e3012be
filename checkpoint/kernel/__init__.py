"""Every ptrace, /proc and ioctl; nothing else touches the kernel."""
