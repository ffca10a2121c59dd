"""md5sum lists.

::

    received          one from the provider is hostile input: read strictly, sorted, written in our form
    malformed         what a line that is none is instead, and how to make a right one
    canonical         the sorted form that everything else trusts: reading, writing, comparing, merging
"""
