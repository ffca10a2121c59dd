"""What is done with a backup that is there.

::

    restore           files of any moment become files in some directory
      selection       which paths are meant
      state           which files there were at a moment, and where each content is now
      restore_target  a directory that a restore must not leave
      last_run        what one run by its id brought
    verify            contents are read again and compared with their md5; bit rot can be repaired
    prune             old versions are removed because an operator wants their room
    rebuild_history   lost history is reconstructed from what is on the disk
    health            whether the last good run is as recent as it should be

May import the foundation, and neither backup nor takeover.
"""
