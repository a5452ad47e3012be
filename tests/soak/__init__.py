"""Long runs against takes and rollbacks: `make soak SOAK_MINUTES=60`. Each piece also runs for a few rounds among the tests."""
