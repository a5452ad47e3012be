"""The command line: one module per command, shared options and output. The only room that prints."""
