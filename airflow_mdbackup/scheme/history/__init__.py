"""What each commit changed, and how changes are carried out so that a crash loses nothing.

::

    changes           the record of one change, and the history files that contain them
    journal           writes changes ahead, carries them out, and finishes them after a crash
      apply           applies changes to the files one by one
    consumer_index    the consumer index, and the manual edits in it
    status_file       status.json, which monitoring reads
    forget            removes entries from the consumer index, so that their files are fetched again
    timeline          what the mirror was at any time, and where each version is now
      replay          what one path held over time
    clock             whether the clock of this machine is right; times corrected by an operator
    usage             the disk usage of a backup
    outcomes          what can become of an entry in a run
"""
