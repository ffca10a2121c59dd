"""Alerts about a provider's runs, as its ``alerts`` configure them.

::

    tasks, on the workers                                        the DAG processor, after a run has failed
    ------------------------------------------------------       -----------------------------------------
    the first one starts   -> note_start: ping, and store
                              the last good backup as XCom  ->
    one fails for good     -> note_failure: store the       ->   alert_failed_run: one alert, made of what
                              exception as XCom                  the failed tasks stored
    approve asks           -> alert_approval: an alert
    commit_backup is good  -> alert_good_run: ping, and an alert if configured

Airflow calls the DAG's own callback once for each failed run, whatever ended it: an exception, a timeout of
task or run, a killed process, a lost worker. So each failed run is one alert, however many of its tasks
failed; a task that stored nothing is reported as killed. The callbacks of tasks run on the workers and know
the exception, which the DAG's callback does not; they send nothing themselves.

===============  ======================================================================
module           what it does
===============  ======================================================================
:mod:`.message`  the texts: from failures to messages; pure
:mod:`.context`  what Airflow knows about a run: from a callback's context to an alert
:mod:`.senders`  sending; never raises
===============  ======================================================================

A failed verification is reported in the same way, with its own texts and without pings: it is not a failed
backup.

An alert must never harm what it is about: a channel that does not work is logged, with what to do, and
neither fails a task nor keeps the other channels from being tried.
"""

from __future__ import annotations
