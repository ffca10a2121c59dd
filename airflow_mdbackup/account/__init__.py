"""The accounts on a provider: set them up, and prove that they can do nothing else."""
