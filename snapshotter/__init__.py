"""snap: incremental snapshot and rollback manager for running Linux jobs."""

__version__ = "0.1.0"
