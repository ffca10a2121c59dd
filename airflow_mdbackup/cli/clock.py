"""``mdbackup clock``: which commits were at other times than their stamps say, and when."""

from __future__ import annotations

import argparse
import json
import sys
from datetime import datetime

from airflow_mdbackup.cli.common import tell_problems
from airflow_mdbackup.cli.mirrors import mirror_of
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
    """Print a line for each commit whose stamp is not its time; say first when one was, if that is asked for.

    :returns: 0; 1: history is missing or damaged.
    :raises UsageError: there is no such backup or commit, or it was not then.
    """
    mirror, words = mirror_of(args)
    if words:
        raise UsageError(f"{words[0]!r} is one word too many: the clock is that of the whole backup")
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
                by = "  (set by hand)" if moment.is_set else ""
                print(printable(f"{moment.stamp}  was at {format_time(moment.time)}  {moment.run_id}{by}"))
        if not others:
            print("Each commit was when its stamp says", file=sys.stderr)
        return tell_problems(past)


def _set(mirror: Mirror, word: str, text: str | None) -> None:
    """Say when a commit was, or no longer, and print what holds now."""
    with Timeline(mirror, lambda path: False) as past:
        try:
            moment = past.find_commit(
                RequestedTime(word, None, f"{word!r} is no commit: name its stamp, or its run")
            )
            when = None if text is None else parse_time(text, datetime.now().astimezone())
        except NoSuchTime as error:
            raise UsageError(str(error)) from error
        if moment is None:
            raise UsageError("nothing was committed yet")
        if when is None:
            set_time(mirror, moment, None)
            print(printable(f"{moment.run_id}: what --set said of it is taken back"), file=sys.stderr)
            return
        before, after = bounds(past.claims, moment.number, mirror.now())
        if (before and when <= time_of_stamp(before)) or (after and when >= time_of_stamp(after)):
            raise UsageError(
                f"{when:%Y-%m-%d %H:%M:%S %z} is not between the commits before and after whose times are"
                f" known: {format_time(before) or 'none'}, and {format_time(after) or 'none'}"
            )
        set_time(mirror, moment, when)
    before, now = format_time(moment.time), format_time(stamp_of(when))
    told = f"{moment.run_id} was at {before} so far, and is at {now} now"
    print(printable(f"{told}; --unset {moment.run_id} takes that back"), file=sys.stderr)
