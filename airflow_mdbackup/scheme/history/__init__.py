"""What each commit changed, and how a change is carried out so that a crash loses nothing.

::

    changes           the record of one change, and the files that have them
    journal           changes are written ahead, carried out, and finished after a crash
      apply           one change after the other is applied to the files
    consumer_index    the consumer index, and what was edited in it by hand
    status_file       what monitoring reads
    forget            entries leave the consumer index, so that their files are copied again
    timeline          what the mirror was at any moment, and where each content is now
    clock             whether the clock of this machine can be believed; times corrected by hand
    usage             what a backup takes on the disk
    outcomes          what can become of an entry in a run
"""
