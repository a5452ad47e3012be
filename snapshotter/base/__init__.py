"""Errors, page protocols, units, fault points: the one drawer everybody may open."""
