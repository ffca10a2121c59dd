"""The accounts on a provider: how they are set up, and how it is proven that they can do nothing else."""
