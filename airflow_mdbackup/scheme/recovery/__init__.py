"""What can be done with an existing backup.

::

    restore           files as of any time are written into some directory
      selection       which paths were asked for
      state           which files there were at that time, and where each content is now
      restore_target  a directory that a restore never writes outside of
      last_run        what one run, given by its id, had fetched
    verify            files are read again and compared with their md5; corrupted ones can be repaired
    prune             old versions are deleted because an operator wants the space
    rebuild_history   lost history is reconstructed from what is on the disk
      gaps            what must have happened to a path where history is missing
    health            whether the last good run is recent enough

May import the foundation, but neither backup nor takeover.
"""
