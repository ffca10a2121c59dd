"""The layout under ``dest``. No other package builds paths there.

::

    mirror            the paths of a backup, its lock and its stamps
    run               the directory of one run
    staging           verified files that are not in the mirror yet
    version_names     names of versions in ``.old``, and stamps in file names
    locks             flocks, and who holds them
"""
