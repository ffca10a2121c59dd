"""The backup scheme itself, in the order in which data flow. Imports no Airflow.

======================  ==============================================================================
module                  what becomes of the data
======================  ==============================================================================
:mod:`.index`           a line of an md5sum index becomes an ``Entry`` (path, md5)
:mod:`.fetch`           the provider's index comes here, and is checked before anything believes it
:mod:`.diff`            two sorted streams of entries become a plan: what to pull, to adopt, to forget
:mod:`.sftp`            bytes come from the provider, many files in flight on one channel
:mod:`.space`           before the first byte, what does not fit on the disk is left out of what comes
:mod:`.pull`            an entry to pull becomes a verified file in staging, with an outcome
:mod:`.clash`           names that this side's file system cannot hold apart are found
:mod:`.archive`         the predecessor of a file becomes a version in ``.old``
:mod:`.commit`          what was pulled is judged once more, and written ahead as history
:mod:`.settle`          a staged file becomes a live file, and the consumer index is written anew
:mod:`.history`         what each commit changed
:mod:`.past`            what the mirror was at any moment, and where each content lies now
:mod:`.restore`         a content of the past becomes a file in some directory
:mod:`.verify`          a content of the past is read again, and judged; what is rotten may be repaired
:mod:`.adopt`           a tree that another tool made becomes the mirror
:mod:`.import_versions` old versions that another tool kept become versions
:mod:`.forget`          entries leave the consumer index, so that their files are copied again
:mod:`.prune`           old versions go, because a person wants their room
:mod:`.clean`           what runs leave behind is taken away, never files, versions or history
:mod:`.status`          whether the last good run is as recent as it should be
======================  ==============================================================================

Beneath them: :mod:`.mirror` is the only module that knows how all this lies on the disk, :mod:`.tree` reaches
files without following symlinks, :mod:`.records` are files of one JSON line per record, :mod:`.ordered` walks
in path order, :mod:`.threads` shares work out, :mod:`.patience` counts files that never hold still,
:mod:`.limit` shares a bandwidth among tasks, :mod:`.telltale` knows what ransomware would look like,
:mod:`.moments` reads and writes times as people do, :mod:`.quantities` durations and sizes, :mod:`.target`
keeps a restore within its bounds, :mod:`.totals` adds up what a backup takes on the disk, :mod:`.disk` has
words for what a disk does, :mod:`.errors` sorts what can go wrong by what to do about it.

Paths are bytes here, absolute, as the provider's backup account sees them. :mod:`.names` makes text of
them at the edges.
"""
