"""Where everything is under ``dest``. Nothing else builds paths there.

::

    mirror            the paths of a backup, its lock and its stamps
    run               the directory of one run
    staging           verified files that are not in the mirror yet
    version_names     names of versions in ``.old``, and stamps in file names
    locks             who may change what, and who is waited for
"""
