"""People are told of a provider's runs, as its ``alerts`` say.

::

    tasks, on the workers                                        the DAG processor, when a run has failed
    ------------------------------------------------------       -----------------------------------------
    the first one begins   -> note_start: ping, and remember
                              the last good backup as XCom  ->
    one fails for good     -> note_failure: remember what   ->   tell_failed_run: one alert, made of what
                              was raised, as XCom                the failed tasks have left
    approve asks           -> tell_approval: an alert
    commit_backup is good  -> tell_good_run: ping, an alert if asked

Airflow calls the DAG's own callback once for each failed run, whatever ended it: an exception, a timeout of
task or run, a killed process, a lost worker. So each failed run is one alert, however many of its tasks have
failed; a task that could leave no word is told as killed. The tasks' callbacks, on the workers, know the
exception, which the DAG's does not; they send nothing themselves.

===============  ======================================================================
module           what it does
===============  ======================================================================
:mod:`.message`  what is said: from failures to texts; pure
:mod:`.context`  what Airflow knows of a run: from a callback's context to an alert
:mod:`.senders`  how it is sent; never raises
===============  ======================================================================

A failed verification is told likewise, with words of its own, and without pings: it is no failed backup.

What is told must not depend on what it tells of: a way of telling that does not work is logged, with what to
do, and neither fails a task nor keeps the other ways from being tried.
"""

from __future__ import annotations
