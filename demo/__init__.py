"""Throw-away servers to see the backup scheme at work: an OpenSSH server, an Airflow, and the demo itself."""
