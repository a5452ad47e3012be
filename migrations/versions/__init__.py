"""One module per revision; rev_NNNN.py."""
