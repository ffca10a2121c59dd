"""What runs on the provider: the two indexers, how to start them over SSH, and what they answer.

    command = python_command()              # or shell_command(), if that one ended with status 127
    ... run it over SSH ...
    for line in ...: parse_report(line)     # greetings of a login shell are None
        Ready(program=True)                 write python_input(request) to its standard input, leave that open
        Ready(program=False)                a forced command runs: write request_line(request)
        Waiting, Joined, Note, Progress, Unreadable, Rotten
        Done or Failed                      the last one
    ... write STOP, should nobody want the index any more ...

The shell of `shell_command` asks for nothing: it takes `shell_input` as it is. Where a forced command is set,
neither command matters, since the provider starts what is installed there.

Nothing here does any work on a connection. Nothing need be installed on the provider: the program itself goes
over standard input, so that neither its text nor any path is ever part of a command line.
"""

from __future__ import annotations
