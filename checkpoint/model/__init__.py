"""Pure: mappings, page plans, task trees; no I/O, tested without root."""
