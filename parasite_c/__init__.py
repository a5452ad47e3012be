"""The parasite blob, the restore stub, the keeper and the native helpers; built by build.py."""
