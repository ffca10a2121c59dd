"""Commands that show what a backup has, and restore it."""

from __future__ import annotations

from airflow_mdbackup.cli.tables.command import (
    DEST,
    FORMAT,
    PROVIDER,
    PROVIDERS_FILE,
    WORDS,
    Command,
    argument,
    positive_int,
    unless_dry_run,
)

COMMANDS = (
    Command(
        "restore",
        "Restore files as they were at any time",
        "Write files of a backup, or all of them, into a directory, as they were at some time, each verified"
        " by its md5. The backup is not changed, and runs continue meanwhile. If it is interrupted, run the"
        " same command again to continue. Exit status 1: something was not restored, or history is damaged.",
        (
            (
                "everything, as the last run left it, from the disk alone",
                "restore --dest /srv/backups/web --to /tmp/web",
            ),
            (
                "one directory, as of a time (local, unless a zone is given)",
                "restore web /backups/etc --as-of 'yesterday 14:00' --to /tmp/etc",
            ),
            (
                "show what would be restored",
                "restore web '*.conf' --as-of '3 days ago' --to /tmp/conf --dry-run",
            ),
        ),
        (
            WORDS,
            DEST,
            argument(
                "--to",
                metavar="DIR",
                required=True,
                help="target directory, created if missing; each file keeps its whole path below it",
            ),
            argument(
                "--as-of",
                metavar="TIME",
                help="2026-11-23T14:00, 'yesterday 14:00', a run's id (default: now)",
            ),
            argument("--overwrite", action="store_true", help="replace different files in DIR"),
            argument(
                "--include-gone",
                action="store_true",
                help="also restore files that were gone from the provider by then",
            ),
            argument("--dry-run", action="store_true", help="only show what would be restored"),
            argument(
                "--jobs", metavar="N", type=positive_int, default=4, help="files at a time (default: 4)"
            ),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.restore.run",
        unless_dry_run,
    ),
    Command(
        "versions",
        "List every version of a path, and where it is",
        "List for paths, or patterns, every version that the backup ever had: from when until when it was"
        " live, its size and md5, and the file that holds it now. Exit status 1: there are no versions, or"
        " history is damaged.",
        (
            ("one file", "versions web /backups/etc/passwd"),
            ("without Airflow and configuration", "versions --dest /srv/backups/web '*.conf'"),
        ),
        (WORDS, DEST, FORMAT, PROVIDERS_FILE),
        "airflow_mdbackup.cli.history.versions",
    ),
    Command(
        "history",
        "List every change of some paths",
        "List what each commit did to some paths, or to all, oldest first. Exit status 1: there is nothing,"
        " or history is missing or damaged.",
        (("one directory", "history web /backups/etc"),),
        (WORDS, DEST, FORMAT, PROVIDERS_FILE),
        "airflow_mdbackup.cli.history.history",
    ),
    Command(
        "diff",
        "Show what changed in a text file between two versions",
        "Show what changed in a text file, from its last version to its present state, or between any two"
        " times, as `diff -u` does. Exit status 0 whether they differ or not; 1: the content of one of them"
        " no longer exists, or history is damaged.",
        (
            ("the last change", "diff web /backups/etc/passwd"),
            ("the changes of a week", "diff web /backups/etc/passwd --from '8 days ago' --to yesterday"),
        ),
        (
            argument(
                "words",
                metavar="PROVIDER | PATH",
                nargs="*",
                help="a provider's name, unless --dest is given; then the path of one file inside the chroot",
            ),
            DEST,
            argument("--from", metavar="TIME", dest="since", help="default: the version before that of --to"),
            argument("--to", metavar="TIME", dest="until", help="default: the latest version"),
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.diff.run",
    ),
    Command(
        "log",
        "List the runs that changed anything",
        "List each run that changed anything: when, its id, and how much. Exit status 1: history is missing"
        " or damaged.",
        (("one provider", "log web"), ("a backup, without Airflow", "log --dest /srv/backups/web")),
        (
            argument("words", metavar="PROVIDER", nargs="*", help=PROVIDER.options["help"]),
            DEST,
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.history.log",
    ),
)
