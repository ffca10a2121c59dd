"""Triggers, which wait without occupying a worker slot. Only the triggerer imports them."""
