"""Commands that look after a backup: verify, prune, and manual corrections."""

from __future__ import annotations

from airflow_mdbackup.cli.tables.command import (
    DEST,
    FORMAT,
    PROVIDER,
    PROVIDERS_FILE,
    WORDS,
    Command,
    always,
    argument,
    old_flag,
    positive_int,
    unless_dry_run,
)

COMMANDS = (
    Command(
        "clock",
        "List commits whose stamp is not their time; correct a time",
        "After a run with a wrong clock, each commit keeps its stamp, which is part of the names of versions."
        " Everything that depends on time (--as-of, prune, versions, log) uses the real time instead: what"
        " the clock showed or, where that is impossible, evenly between the commits before and after. --set"
        " corrects a time, --unset undoes that.",
        (
            ("what a wrong clock left behind", "clock web"),
            ("correct the time of one commit", "clock web --set manual__fix '2026-11-23 14:00'"),
        ),
        (
            argument("words", metavar="PROVIDER", nargs="*", help=PROVIDER.options["help"]),
            DEST,
            argument(
                "--set", nargs=2, metavar=("RUN", "TIME"), help="a run or a stamp, and when it committed"
            ),
            argument("--unset", metavar="RUN", help="undo --set for this run"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.clock.run",
        changes=lambda arguments: bool(arguments.set or arguments.unset),
    ),
    Command(
        "rebuild",
        "Rebuild lost history from what is on the disk",
        "Where history files are lost or damaged, rebuild what the names in .old and the index show. The time"
        " at which a version was displaced is exact; where additions and deletions are unknown, a restore as"
        " of then restores too much rather than too little. Damaged files are kept under another name.",
        (
            ("look first, then run it without --dry-run", "rebuild web --dry-run"),
            ("without Airflow", "rebuild --dest /srv/backups/web"),
        ),
        (
            argument("words", metavar="PROVIDER", nargs="*", help=PROVIDER.options["help"]),
            DEST,
            argument("--dry-run", action="store_true", help="write nothing"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.rebuild.run",
        unless_dry_run,
    ),
    Command(
        "verify",
        "Read the backup again, and report what is damaged",
        "Read live files and versions again and compare them with their md5s: all of them, some paths, or the"
        " next part, from where the last one ended. Runs continue meanwhile. Exit status 1: a file is"
        " missing, rotten (bit rot: other bytes with the same size and time), or changed outside mdbackup; or"
        " history is missing or damaged.",
        (
            ("all of it; also reports files that mdbackup does not know", "verify web"),
            (
                "a thirtieth each night, at 50 MB a second, from cron",
                "verify web --fraction 1/30 --limit 50MB",
            ),
            (
                "have the next run fetch rotten files of a directory again",
                "verify web /backups/etc --repair",
            ),
            ("without Airflow and configuration", "verify --dest /srv/backups/web /backups/etc"),
        ),
        (
            WORDS,
            DEST,
            argument("--bytes", metavar="SIZE", help="read the next part, of this size: 50GB"),
            argument("--fraction", metavar="N", help="read the next part, such as 1/30 of everything"),
            argument("--limit", metavar="SIZE", help="read at most SIZE per second"),
            argument("--repair", action="store_true", help="forget rotten live files: see `forget`"),
            argument("--missing", action="store_true", help="with --repair: also forget missing ones"),
            argument("--acknowledge-missing", action="store_true", help="stop reporting files lost for good"),
            old_flag("--let-go", "--acknowledge-missing"),
            argument(
                "--jobs", metavar="N", type=positive_int, default=2, help="files at a time (default: 2)"
            ),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.verify.run",
        lambda arguments: arguments.repair or arguments.acknowledge_missing,
    ),
    Command(
        "forget",
        "Drop files from the index so that the next run fetches them again",
        "Remove paths from the consumer index. Their files stay; the next run hashes them, and pulls those"
        " that differ from the provider's: the old content becomes a version. Exit status 1: the index has"
        " none of them.",
        (
            ("a file that `verify` reported as rotten", "forget web /backups/etc/passwd"),
            ("everything, as if there were no index", "forget web '*'"),
        ),
        (WORDS, DEST, FORMAT, PROVIDERS_FILE),
        "airflow_mdbackup.cli.forget.run",
        always,
    ),
    Command(
        "prune",
        "Delete old versions, by rules, when the disk is full",
        "Show which versions in .old no rule keeps, and how much space they take; with --yes, delete them for"
        " good. A version stays if any rule keeps it; live files and files that history does not know always"
        " stay. Nothing else ever deletes. Exit status 1: history is missing or damaged, it never had a"
        " path, or the disk refused.",
        (
            ("show what would be deleted", "prune web --keep-last 3 --keep-within 1y"),
            ("delete in one directory, for good", "prune web /backups/logs --keep-within 90d --yes"),
            ("keep a version of each of the last days", "prune --dest /srv/backups/web --keep-daily 30"),
        ),
        (
            WORDS,
            DEST,
            argument(
                "--keep-last", metavar="N", type=positive_int, help="keep the N newest versions of each path"
            ),
            argument("--keep-within", metavar="TIME", help="keep what was displaced within 90d, 8w or 1y"),
            argument(
                "--keep-daily",
                metavar="N",
                type=positive_int,
                help="keep each path's newest version of a day, for its last N days with versions",
            ),
            argument("--keep-monthly", metavar="N", type=positive_int, help="the same for months"),
            argument("--yes", action="store_true", help="delete them"),
            argument("--dry-run", action="store_true", help="only show them, as without --yes"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.prune.run",
        lambda arguments: arguments.yes,
    ),
)
