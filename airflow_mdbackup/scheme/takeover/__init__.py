"""What another tool left becomes a backup, without being copied again.

::

    survey            the files of a tree are listed and hashed
    adopt             the tree becomes the mirror
    import_versions   old versions that the other tool kept become versions

May import the foundation, but neither backup nor recovery.
"""
