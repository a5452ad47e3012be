"""Runs a command as root inside a stock Debian kernel, on this machine's own files: `python -m tests.kernels`."""
