"""Build the provider index: the md5 of every regular file below the sources, in one file.

This runs on the provider, where no part of airflow-mdbackup has to be installed: the consumer sends it over
SSH as one file, for Python 3.6 and newer, with nothing but the standard library. It can also be installed
there and run as a forced command (``--serve --config FILE``), from cron or a timer (``--config FILE``), or
manually (``--chroot /srv/a --source /backups``).

In the order in which the data passes through them:

    common      errors, printable text, paths and descriptors
    request     what to index and how, validated
    config      a request from a configuration file; a forced command takes nothing but the id from B
    report      results and progress, on standard output and in a file that other runs can follow
    watch       twice a second: progress, signals, requests to stop
    exclude     the paths that the gitignore patterns exclude
    place       the index's directory: one build at a time; the same request again joins the running build
    lines       a line of the index
    cache       what the last build knew of each file, in path order
    hasher      reads files, and decides how far to trust the md5
    batch       neighbours in the index, some known from the cache, some still to be hashed
    crew        processes, each running a hasher, which hash the batches while the walk continues
    output      index and next cache, in path order, renamed into place at the end
    walk        directories and files below the sources, in the order of the raw bytes of their paths
    build       walk -> cache or crew -> output
    __main__    the command line

**When a file is not hashed.** Size, mtime, ctime, inode and device are those in the cache, and the cached
md5 can be trusted. It can if the file was last modified more than 2 seconds (the coarsest timestamps of any
filesystem) before it was hashed: otherwise it may have changed afterwards within the same tick. Writes
through mmap may update the times up to half a minute before the content: a file that was modified in the
minute before it was hashed is therefore hashed once more, by the first build that finds it older and
unchanged. Where another machine's clock sets the times (NFS), and for times in the future, nobody knows
when a file was modified: each build hashes it until one finds it unchanged for a minute.

**Bit rot.** A file that is hashed again (``rehash``) although none of the above changed, and whose content
differs, is rotten: its line keeps the md5 of the sound content, and a comment in the index names it. Each
build hashes it from then on, until its times change (``touch`` it to accept it as it is) or it is sound
again. A difference found when a file is hashed once more because of its age, as above, is a change and not
bit rot. A rotten file is remembered also if a build cannot read or does not reach it, and if only the
device number of its filesystem has changed.

**Memory** is bounded by the largest directory. Files of 32 MiB and more are hashed one by one, and their
lines are filled in afterwards, so that they do not delay the others.

A reader of the index sees the old one or the new one, whole, even if this is killed at any time. Below the
chroot no symlink is ever followed, not even if somebody replaces a directory by one during the walk.

**Limitations.** The index is not a snapshot of the tree. A change that leaves size, times and inode as they
were, as mmap can make on filesystems that do not record it (tmpfs), is only found by ``rehash``.

Standard output has one printable ASCII line each, flushed. Exit status: 0 complete, 3 something was
unreadable or rotten, 1 no index was built and the old one is unchanged.

    mdbackup ready request                                               before a request is read (--serve)
    mdbackup waiting TEXT | joined TEXT | note TEXT
    mdbackup progress files=N bytes=N hashed=N seconds=N                 every 5 seconds
    mdbackup unreadable PATH: REASON                                     the first 20 of them
    mdbackup rotten PATH                                                 the first 20 of them
    mdbackup done files=N bytes=N hashed=N unreadable=N rotten=N seconds=N.N
    mdbackup error MESSAGE

A line ``stop`` on standard input stops the build; the end of standard input does not.
"""
