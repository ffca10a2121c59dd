"""Files on this side.

::

    tree              a tree is reached by descriptors, and no symlink is followed
    content           bytes are hashed, copied and written, with their holes
    syscalls          what Python lacks: syncfs, renameat2; files and directories for their owner
    jsonl             files of one JSON line per record
    disk              free space, and what an error of the disk means
"""
