"""The parasite blob, the restore stub, the keeper, the finisher and the native helpers; built by build.py."""
