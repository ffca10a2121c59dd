"""Commands that look after a backup: verify, prune, and what is to be corrected by hand."""

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
    count,
    unless_dry,
)

COMMANDS = (
    Command(
        "clock",
        "Tell which commits were at other times than their stamps say",
        "After a run under a wrong clock, each commit keeps its stamp, which is in the names of versions."
        " All that goes by time (--as-of, prune, versions, log) goes by when it really was: what the clock"
        " said, or, where that cannot be, evenly between the commits before and after. --set corrects it, and"
        " --unset takes that back.",
        (
            ("what a wrong clock has left", "clock web"),
            ("a commit of which you know better", "clock web --set manual__fix '2026-11-23 14:00'"),
        ),
        (
            argument("words", metavar="PROVIDER", nargs="*", help=PROVIDER.options["help"]),
            DEST,
            argument(
                "--set", nargs=2, metavar=("RUN", "TIME"), help="a run, or a stamp, and when it committed"
            ),
            argument("--unset", metavar="RUN", help="take back what --set said of it"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.clock.run",
        changes=lambda arguments: bool(arguments.set or arguments.unset),
    ),
    Command(
        "rebuild",
        "Tell lost history anew, by what is left on the disk",
        "Where files of history are lost or damaged, tell anew what can be told by the names in .old and the"
        " index: when a version was displaced is exact; of what was added or had gone, a restore as of then"
        " brings too much rather than too little. Damaged files are kept, under another name.",
        (
            ("first look, then do it", "rebuild web --dry-run"),
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
        unless_dry,
    ),
    Command(
        "verify",
        "Read what lies in the backup again, and tell what is damaged",
        "Read live files and versions again, and compare them with their md5s: all, some paths, or a part"
        " that goes on where the last one ended. Backups go on meanwhile. Exit status 1: a file is missing,"
        " rotten (other bytes, though size and time are as they were), or changed by hand; or history is"
        " missing or damaged.",
        (
            ("all of it; also tells of files that nobody knows", "verify web"),
            (
                "a thirtieth each night, at 50 MB a second, from cron",
                "verify web --fraction 1/30 --limit 50MB",
            ),
            ("have the next run pull rotten files of a directory again", "verify web /backups/etc --repair"),
            ("without Airflow and configuration", "verify --dest /srv/backups/web /backups/etc"),
        ),
        (
            WORDS,
            DEST,
            argument("--bytes", metavar="SIZE", help="the next part of all, of so many bytes: 50GB"),
            argument("--fraction", metavar="N", help="the next part of all, such as 1/30"),
            argument("--limit", metavar="SIZE", help="read at most so many bytes per second"),
            argument("--repair", action="store_true", help="forget rotten live files: see `forget`"),
            argument("--missing", action="store_true", help="with --repair: also those that are missing"),
            argument("--let-go", action="store_true", help="miss no more what is gone for good"),
            argument("--jobs", metavar="N", type=count, default=2, help="files at a time (default: 2)"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.verify.run",
        lambda arguments: arguments.repair or arguments.let_go,
    ),
    Command(
        "forget",
        "Have the next run copy some files again",
        "Take paths out of the consumer index. Their files stay; the next run hashes them, and pulls those"
        " that are not what the provider has: the old bytes become versions. Exit status 1: the index has"
        " none of them.",
        (
            ("a file that `verify` found rotten", "forget web /backups/etc/passwd"),
            ("everything, as if there were no index", "forget web '*'"),
        ),
        (WORDS, DEST, FORMAT, PROVIDERS_FILE),
        "airflow_mdbackup.cli.forget.run",
        always,
    ),
    Command(
        "prune",
        "Take old versions away, by rules, when the disk is full",
        "Show which versions in .old no rule keeps, and what room they take; with --yes, take them away, for"
        " good. What any rule keeps stays; so do live files, and what history does not know. Nothing else"
        " ever deletes. Exit status 1: history is missing or damaged, a path was never in it, or the disk"
        " refused.",
        (
            ("what would go", "prune web --keep-last 3 --keep-within 1y"),
            ("one directory, for good", "prune web /backups/logs --keep-within 90d --yes"),
            ("a version of each of the last days", "prune --dest /srv/backups/web --keep-daily 30"),
        ),
        (
            WORDS,
            DEST,
            argument("--keep-last", metavar="N", type=count, help="keep the N newest of each path"),
            argument("--keep-within", metavar="TIME", help="keep what was displaced within 90d, 8w or 1y"),
            argument(
                "--keep-daily",
                metavar="N",
                type=count,
                help="keep the newest of each of the last N days on which a path has any",
            ),
            argument("--keep-monthly", metavar="N", type=count, help="likewise, of the last N months"),
            argument("--yes", action="store_true", help="take them away"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.prune.run",
        lambda arguments: arguments.yes,
    ),
)
