"""The engine: one job into images and pages, and back. Knows nothing of the store."""
