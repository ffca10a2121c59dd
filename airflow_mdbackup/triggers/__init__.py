"""Triggers: what waits without a worker's slot. Imported by the triggerer only."""
