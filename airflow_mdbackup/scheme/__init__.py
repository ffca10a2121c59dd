"""The backup scheme itself, in the order in which data flow. Imports no Airflow.

======================  ==============================================================================
module                  what becomes of the data
======================  ==============================================================================
:mod:`.index`           a line of an md5sum index becomes an ``Entry`` (path, md5)
:mod:`.diff`            two sorted streams of entries become a plan: what to pull, to adopt, to forget
:mod:`.sftp`            bytes come from the provider, many files in flight on one channel
:mod:`.pull`            an entry to pull becomes a verified file in staging, with an outcome
:mod:`.archive`         the predecessor of a file becomes a version in ``.old``
:mod:`.commit`          a staged file becomes a live file, and the consumer index is written anew
:mod:`.mirror`          the only module that knows how all this lies on the disk
:mod:`.history`         what each commit changed
======================  ==============================================================================

Paths are bytes here, absolute, as the provider's backup account sees them. :mod:`.names` makes text of
them at the edges.
"""
