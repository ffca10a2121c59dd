"""md5sum lists.

::

    received          an index from the provider is hostile input: parse strictly, sort, write canonically
    malformed         explains why a line is not an index line, and how to make a correct list
    canonical         the sorted form that everything else trusts: read, write, compare, merge
"""
