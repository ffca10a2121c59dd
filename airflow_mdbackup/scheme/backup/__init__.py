"""A run: from the provider's index to new live files, old versions and a new consumer index.

In reading order::

    fetch             the provider's index comes here, and is checked before anything believes it
    diff              two sorted streams of entries become a plan: what to pull, to adopt, to forget
      plan            what a plan is: its items, limits and totals
      ransomware      changed names and contents that look like encryption
    pull              an entry to pull becomes a verified file in staging, with an outcome
      local_content   content that is here already, staged or live
      results         what became of each entry, as a record on the disk
      pull_progress   how far a shard has come
      free_space      what does not fit on the disk is left out before the first byte
      concurrent_runs what other runs committed since the plan was made
      unstable_files  files that change whenever they are read
    archive           the predecessor of a file becomes a version in ``.old``
      name_collisions names that this side's file system cannot keep apart
    commit            what was pulled is judged once more, and put in place
      cleanup         what finished runs leave behind is removed: never files, versions or history

May import the foundation, and neither recovery nor takeover.
"""
