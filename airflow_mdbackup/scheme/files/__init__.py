"""Files on the consumer.

::

    tree              a tree reached by descriptors, without following symlinks
    folder            the files of one directory
    content           hashing, copying and writing bytes, with holes
    syscalls          what Python lacks: syncfs, renameat2; files and directories given to their owner
    jsonl             files with one JSON line per record
    disk              free space, and what an error of the disk means
"""
