"""Tools that know nothing of backups.

::

    paths             bytes and text of paths
    times             times as people write them
    units             durations, sizes, rates and fractions, read and printed
    sorted_paths      streams in path order: batches, lookups, prefixes
    parallel          work in a few threads, results in order
    progress          how often to report
    bloom             whether an md5 was seen before, in bounded memory
"""
