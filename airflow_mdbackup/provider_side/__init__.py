"""What runs on the provider: the two indexers, how to start them over SSH, and their answers.

    request       what to index
    indexer/      the Python indexer;  indexer.sh  the one for providers without Python
    join          makes one file of indexer/
    programs      how to start either, and what to send to it
    report        reads what it prints
    conversation  all of that in order, without a connection

    command = python_command()              # or shell_command(), if that one ended with status 127
    ... run it over SSH ...
    for line in ...: parse_report(line)     # greetings of a login shell are None
        Ready(program=True)                 write python_input(request) to its standard input, leave that open
        Ready(program=False)                a forced command runs: write request_line(request)
        Waiting, Joined, Note, Progress, Unreadable, Rotten
        Done or Failed                      the last one
    ... write STOP to stop the build ...

The shell of `shell_command` needs no Ready: send `shell_input` at once. Where a forced command is set, the
provider starts the indexer that is installed there, whichever command is given.

Nothing here uses a connection. Nothing has to be installed on the provider: the program itself is sent to
standard input, so that neither its text nor any path is ever part of a command line.
"""

from __future__ import annotations
