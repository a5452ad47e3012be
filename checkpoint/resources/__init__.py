"""One kernel resource per module, its dump and its restore side by side."""
