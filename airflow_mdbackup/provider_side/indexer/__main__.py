"""The command line."""

import contextlib
import gc
import os
import sys
from typing import Any, List, Optional

from airflow_mdbackup.provider_side.indexer.build import Builder
from airflow_mdbackup.provider_side.indexer.common import Failure, as_failure, open_root, printable, reason_of
from airflow_mdbackup.provider_side.indexer.config import read_config, with_id_of
from airflow_mdbackup.provider_side.indexer.hasher import new_md5
from airflow_mdbackup.provider_side.indexer.place import Place
from airflow_mdbackup.provider_side.indexer.report import Report
from airflow_mdbackup.provider_side.indexer.request import DEFAULT_INDEX, Request, read_json, validated
from airflow_mdbackup.provider_side.indexer.watch import Input, Watch

MAX_DEPTH = 4096  # directories; each needs a descriptor
FLUSH_SECONDS = 30.0


def read_arguments(arguments: List[str], standard_input: Input, report: Report) -> Optional[Request]:
    """Return the request that the command line gives or refers to; None if it was only to be checked."""
    if arguments == ["--request-from-stdin"]:  # the usual case, without the slow import of argparse
        return validated(read_json(standard_input.request(), "the request"))
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if options.request_from_stdin:
        return validated(read_json(standard_input.request(), "the request"))
    if options.config is not None:
        return read_configured(os.fsencode(options.config), options, standard_input, report)
    standard_input.close()
    if options.serve or options.check:
        parser.error("--serve and --check need --config")
    if not options.source:
        parser.error("--source is needed at least once")
    return validated(
        {
            "chroot": json_text(options.chroot),
            "source": [json_text(path) for path in options.source],
            "index": json_text(options.index),
            "exclude": options.exclude,
            "jobs": options.jobs,
            "nice": options.nice,
            "limit": options.limit,
            "rehash": number_or_text(options.rehash),
            "one_file_system": options.one_file_system,
        }
    )


def argument_parser() -> Any:
    import argparse

    parser = argparse.ArgumentParser(description="Build the provider index of airflow-mdbackup.")
    add = parser.add_argument
    add("--chroot", default="/", help="directory that the backup account sees as / (default /)")
    add("--source", action="append", help="what to index, as the backup account sees it; repeatable")
    add("--index", default=DEFAULT_INDEX, help="the index to write (default %(default)s)")
    add("--exclude", action="append", default=[], help="gitignore pattern of paths to exclude; repeatable")
    add("--jobs", type=int, help="number of hashing processes (default: one per core)")
    add("--nice", type=int, default=0, help="lower the priority by 0 to 19")
    add("--limit", type=int, help="maximum bytes per second to read")
    add("--rehash", default="changed", help="changed (default), all, or percentage of files to re-hash")
    add("--one-file-system", action="store_true", help="skip what is mounted below a source")
    add("--request-from-stdin", action="store_true", help="read everything from a line of JSON")
    add("--config", help="read everything from a JSON file: chroot, source, index, exclude and so on")
    add("--serve", action="store_true", help="with --config: the forced command of an SSH key")
    add("--check", action="store_true", help="with --config: validate it, build nothing")
    return parser


def json_text(argument: str) -> str:
    """Return an argument's bytes as a request has them, whatever the locale is."""
    return os.fsencode(argument).decode("utf-8", "surrogateescape")


def number_or_text(argument: str) -> Any:
    try:
        return float(argument)
    except ValueError:
        return argument


def read_configured(path: bytes, options: Any, standard_input: Input, report: Report) -> Optional[Request]:
    """Return the request of a configuration file; as a forced command, with the id from standard input."""
    if not options.serve or options.check:
        standard_input.close()
        config = read_config(path)
        if options.check:
            os.close(open_root(config.chroot))
            report.note(f"the configuration {printable(path)} is valid")
            return None
        return config
    report.write_line("mdbackup ready request")
    asked = read_json(standard_input.request(), "the request")
    request, notes = with_id_of(asked, path, read_config(path))
    for note in notes:
        report.note(note)
    return request


def run(request: Request, report: Report, watch: Watch) -> int:
    """Build an index, or follow the running build of the same request; return the exit status."""
    root = open_root(request.chroot)
    try:
        new_md5()
    except (TypeError, ValueError) as error:
        raise Failure("FIPS rules forbid md5 to this Python; use Python 3.9 or newer") from error
    try:
        place = Place(request, root)
        status = place.acquire(report, watch)
        if status is not None:
            return status
        try:
            watch.begin(place.stop_requested)
            try:
                Builder(request, root, place, report).build(watch)
            except OSError as error:
                raise unwritable(request, error) from error
            return report.done()
        except Exception as error:  # reported before the lock is released, to those who follow this build
            watch.end()
            report.write_line(f"mdbackup error {as_failure(error)}")
            return 1
        finally:
            watch.end()
            place.release()
    except OSError as error:
        raise unwritable(request, error) from error


def unwritable(request: Request, error: OSError) -> Failure:
    shown = printable(request.chroot + request.index)
    return Failure(
        f"cannot write {shown}: {reason_of(error)} (the index account must be able to write there)"
    )


def main(arguments: List[str]) -> int:
    """Build the index; return 0: complete, 3: something was unreadable or rotten, 1: no index was built."""
    # Otherwise a file that is opened later could get the number of a closed standard output, and the report.
    for standard in (0, 1, 2):
        try:
            os.fstat(standard)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    gc.disable()  # there are no reference cycles to find, and looking for them takes time
    raise_descriptor_limit()
    report, standard_input = Report(), Input()
    watch = Watch(report, standard_input)
    try:
        request = read_arguments(arguments, standard_input, report)
        return 0 if request is None else run(request, report, watch)
    except Exception as error:
        watch.end()
        report.write_line(f"mdbackup error {as_failure(error)}")
        return 1
    finally:
        report.flush(FLUSH_SECONDS)


def raise_descriptor_limit() -> None:
    """Allow as many open files as a deep tree needs, one for each directory on the way down."""
    with contextlib.suppress(ImportError, OSError, ValueError):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = MAX_DEPTH if hard == resource.RLIM_INFINITY else min(MAX_DEPTH, hard)
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
