"""``mdbackup clock``: which commits were at another time than their stamp, and when."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime

from airflow_mdbackup.cli.common import print_problems
from airflow_mdbackup.cli.mirrors import open_mirror
from airflow_mdbackup.cli.output import UsageError, printable
from airflow_mdbackup.scheme.common.times import (
    NoSuchTime,
    RequestedTime,
    format_time,
    parse_time,
    stamp_of,
    time_of_stamp,
)
from airflow_mdbackup.scheme.history.clock import bounds, set_time
from airflow_mdbackup.scheme.history.timeline import Timeline
from airflow_mdbackup.scheme.store.mirror import Mirror


def run(args: argparse.Namespace) -> int:
    """Correct the time of a commit if asked to; print a line for each commit whose stamp is not its time.

    :returns: 0; 1: history is missing or damaged.
    :raises UsageError: there is no such backup or commit, or it cannot have been at that time.
    """
    mirror, words = open_mirror(args)
    if words:
        raise UsageError(f"unexpected argument {words[0]!r}: `clock` is about the backup as a whole")
    if args.set:
        _set(mirror, *args.set)
    if args.unset:
        _set(mirror, args.unset, None)
    with Timeline(mirror, lambda path: False) as past:
        others = [moment for moment in past.moments if moment.time != moment.stamp or moment.is_set]
        for moment in others:
            if args.format == "json":
                facts = {"stamp": moment.stamp, "time": moment.time, "run_id": moment.run_id}
                print(json.dumps(facts | {"set": moment.is_set}))
            else:
                by = "  (set with --set)" if moment.is_set else ""
                print(printable(f"{moment.stamp}  was at {format_time(moment.time)}  {moment.run_id}{by}"))
        if not others:
            print("Every commit was at the time of its stamp", file=sys.stderr)
        return print_problems(past)


def _set(mirror: Mirror, word: str, text: str | None) -> None:
    """Set the time of a commit, or with None go back to its own, and print what changed."""
    with Timeline(mirror, lambda path: False) as past:
        try:
            moment = past.find_commit(
                RequestedTime(word, None, f"{word!r} is not a commit: write its stamp, or its run's id")
            )
            when = None if text is None else parse_time(text, datetime.now().astimezone())
        except NoSuchTime as error:
            raise UsageError(str(error)) from error
        if moment is None:
            raise UsageError("there are no commits yet")
        if when is None:
            set_time(mirror, moment, None)
            print(printable(f"{moment.run_id}: the time given by --set was removed"), file=sys.stderr)
            return
        before, after = bounds(past.claims, moment.number, mirror.now())
        if (before and when <= time_of_stamp(before)) or (after and when >= time_of_stamp(after)):
            raise UsageError(
                f"{when:%Y-%m-%d %H:%M:%S %z} must be between the nearest commits whose times are known:"
                f" {format_time(before) or 'none'} before, {format_time(after) or 'none'} after"
            )
        set_time(mirror, moment, when)
    before, now = format_time(moment.time), format_time(stamp_of(when))
    print(
        printable(f"{moment.run_id}: time {before} changed to {now}; --unset {moment.run_id} undoes that"),
        file=sys.stderr,
    )
