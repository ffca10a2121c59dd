"""md5sum lists, and the manifest that goes with them.

::

    received          an index from the provider is hostile input: parse strictly, sort, write canonically
    malformed         explains why a line is not an index line, and how to make a correct list
    canonical         the sorted form that everything else trusts: read, write, compare, merge
    manifest          what md5sum lists leave out, in mtree(5) format; no step uses it yet
"""
