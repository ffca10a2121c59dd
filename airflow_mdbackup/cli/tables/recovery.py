"""Commands that show what a backup has, and get it back."""

from __future__ import annotations

from airflow_mdbackup.cli.tables.command import (
    DEST,
    FORMAT,
    PROVIDER,
    PROVIDERS_FILE,
    WORDS,
    Command,
    argument,
    count,
    unless_dry,
)

COMMANDS = (
    Command(
        "restore",
        "Get files back, as of any moment",
        "Write files of a backup, or all, into a directory, as they were at some moment, each verified by its"
        " md5. Nothing in the backup is changed, and backups go on meanwhile. The same command again goes on"
        " where it was cut off. Exit status 1: something did not come back, or history is damaged.",
        (
            (
                "everything, as the last run left it, from the disk alone",
                "restore --dest /srv/backups/web --to /tmp/web",
            ),
            (
                "one directory as of a moment; local time, unless a zone is given",
                "restore web /backups/etc --as-of 'yesterday 14:00' --to /tmp/etc",
            ),
            ("what would come", "restore web '*.conf' --as-of '3 days ago' --to /tmp/conf --dry-run"),
        ),
        (
            WORDS,
            DEST,
            argument(
                "--to",
                metavar="DIR",
                required=True,
                help="where to; each file keeps its whole path below it; made if it is not there",
            ),
            argument(
                "--as-of",
                metavar="TIME",
                help="2026-11-23T14:00, 'yesterday 14:00', a run's id (default: now)",
            ),
            argument("--overwrite", action="store_true", help="replace files of DIR that have other bytes"),
            argument(
                "--include-gone", action="store_true", help="also what had gone from the provider by then"
            ),
            argument("--dry-run", action="store_true", help="only tell what would come back"),
            argument("--jobs", metavar="N", type=count, default=4, help="files at a time (default: 4)"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.restore.run",
        unless_dry,
    ),
    Command(
        "versions",
        "List all that a path ever held, and where it lies",
        "List for paths, or patterns, each content that the backup ever had of them: from when to when, its"
        " size and md5, and the file that has it now. Exit status 1: there is none, or history is damaged.",
        (
            ("of one file", "versions web /backups/etc/passwd"),
            ("without Airflow and configuration", "versions --dest /srv/backups/web '*.conf'"),
        ),
        (WORDS, DEST, FORMAT, PROVIDERS_FILE),
        "airflow_mdbackup.cli.history.versions",
    ),
    Command(
        "history",
        "List each change of some paths",
        "List what each commit did to some paths, or to all, the oldest first. Exit status 1: nothing, or"
        " history is missing or damaged.",
        (("of a directory", "history web /backups/etc"),),
        (WORDS, DEST, FORMAT, PROVIDERS_FILE),
        "airflow_mdbackup.cli.history.history",
    ),
    Command(
        "diff",
        "Show what changed in a text from one version to another",
        "Show what changed in a file of text, from its last version to what it is now, or between any two"
        " moments, as `diff -u` does. Exit status 0, whether they differ or not; 1: the bytes of one are"
        " nowhere any more, or history is damaged.",
        (
            ("what the last change was", "diff web /backups/etc/passwd"),
            ("in a week", "diff web /backups/etc/passwd --from '8 days ago' --to yesterday"),
        ),
        (
            argument(
                "words",
                metavar="PROVIDER | PATH",
                nargs="*",
                help="a provider's name, unless --dest is given, and one file, as backupop sees it",
            ),
            DEST,
            argument("--from", metavar="TIME", dest="since", help="default: the version before that of --to"),
            argument("--to", metavar="TIME", dest="until", help="default: the last one"),
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.diff.run",
    ),
    Command(
        "log",
        "List the runs that changed anything",
        "List each run that changed anything: when, its id, and how much. Exit status 1: history is missing"
        " or damaged.",
        (("of a provider", "log web"), ("of a backup, without Airflow", "log --dest /srv/backups/web")),
        (
            argument("words", metavar="PROVIDER", nargs="*", help=PROVIDER.options["help"]),
            DEST,
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.history.log",
    ),
)
