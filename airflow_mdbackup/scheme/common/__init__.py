"""Tools that know nothing of backups.

::

    paths             bytes and text of paths
    times             times as people write them
    units             durations, sizes and shares as people write them
    sorted_paths      streams in path order: batches, lookups, prefixes
    parallel          work for a few threads, in order
    progress          how often to report
    bloom             whether an md5 has come before, in bounded memory
"""
