"""A run: from the provider's index to new live files, old versions and a new consumer index.

In reading order::

    fetch             downloads the provider's index, and checks it before anything relies on it
    diff              two sorted streams of entries become a plan: what to pull, to adopt, to forget
      plan            the plan's options, items and totals
      guard           stops a plan in which too much is gone or changed at once
      ransomware      warns of changed names and contents that look like encryption
    pull              an entry to pull becomes a verified file in staging, with an outcome
      pull_item       an item while it is being pulled, and the result that each answer leads to
      local_content   content that is already on this side, staged or live
      results         the outcome of each entry, as a record on the disk
      pull_progress   counts and progress lines of a shard
      free_space      skips what does not fit on the disk, before the first byte
      concurrent_runs what other runs have committed since the plan was made
      unstable_files  files that change whenever they are read
    archive           the predecessor of a file becomes a version in ``.old``
      name_collisions names that this side's file system cannot tell apart
    commit            what was pulled is checked once more, and put in place
      commit_content  where the new bytes of an entry are
      commit_summary  the outcome of a run
      cleanup         removes what finished runs leave behind: never files, versions or history

May import the foundation, and neither recovery nor takeover.
"""
