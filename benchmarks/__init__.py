"""How fast the backup is, against the programs that people use for the same: ``make bench``.

    scene      server A and a place for B, on this machine
    data       what is backed up, the same bytes on every machine
    delay      a long line, where 127.0.0.1 is a short one
    ours       the operators, as tasks run them, in a process of their own
    peers      sftp, rsync, rclone, lftp and Airflow's SFTPHook (sftp_hook), as people call them
    copying    ours and the others copy the same
    indexer    the provider index, against md5sum and find
    growth     what a million files and ten million lines cost
    works      all that is measured, with what is wanted; each is a work.Work
    results    medians and ratios
    run, report, plot    from the command line

What this does not give: figures for another machine. Client and server share this one's cores, its loopback
and, where there is room, its memory as disk. Ratios of one run travel better than seconds.
"""
