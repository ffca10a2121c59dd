"""The backup scheme itself. Imports no Airflow, and works from a plain Python prompt.

::

    wings       backup/     fetch -> diff -> pull -> archive -> commit: the steps of a run, in that order
                recovery/   restore, verify, prune, rebuild: what is done with a backup that is there
                takeover/   adopt, import: what another tool left becomes a backup
    foundation  history/    what each commit changed; carrying it out; what the mirror was at any moment
                store/      where everything is under ``dest``: the one place that builds paths there
                transfer/   bytes from the provider: SFTP, partial files, rate limits
                index/      md5sum lists: hostile ones read strictly, our own read fast
                files/      trees without symlinks, system calls, content, JSON lines, disk errors
                common/     paths, times, units, sorted streams, threads: nothing of backups
                errors      what can go wrong, sorted by what to do about it

Each may import what is below it, and nothing above. The wings never import each other. Inside a package the
modules are named after what a reader looks for; each package says in its own docstring which one has what.

How data flow: a line of A's index becomes an ``Entry`` (path, md5); two sorted streams of entries become a
plan; an entry to pull becomes a verified file in staging, with an outcome; a staged file becomes a live file,
and the one before it a version in ``.old``; the consumer index is written from the old one and what was
committed. No step holds a whole index in memory.

Paths are bytes, absolute, as the provider's backup account sees them. :mod:`.common.paths` makes text of them
at the edges.
"""
