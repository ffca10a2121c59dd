"""Commands about backups: their age, what the next run would do, and taking over another tool's backup."""

from __future__ import annotations

from airflow_mdbackup.cli.tables.command import (
    FORMAT,
    INDEX,
    KEEP_EXTENSION,
    PROVIDER,
    PROVIDERS_FILE,
    Command,
    argument,
    positive_int,
    unless_dry_run,
)

COMMANDS = (
    Command(
        "status",
        "Report the age of each backup; exit 1 if one is stale",
        "Report when each provider, or each one named, last had a good run, from what is in `dest`. Made for"
        " cron and monitoring agents. Run it where `dest` is, as the workers' user. It does not need"
        " Airflow's database. Exit status 1: a backup is stale, was never made, cannot be read, or its"
        " configuration is invalid.",
        (
            ("all backups, as text", "status"),
            ("without loading Airflow, which takes seconds", "status --providers-file FILE"),
            (
                "for the textfile collector of node_exporter",
                "status --format prometheus --output /var/lib/node_exporter/mdbackup.prom",
            ),
        ),
        (
            argument(
                "providers",
                metavar="PROVIDER",
                nargs="*",
                help="name of a provider in providers_file (default: all)",
            ),
            argument(
                "--format",
                choices=("text", "json", "prometheus"),
                default="text",
                help="output format (default: text)",
            ),
            argument("--output", metavar="FILE", help="write the result to FILE, replacing it atomically"),
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.status.run",
    ),
    Command(
        "plan",
        "Show what the next run would do",
        "Compare the provider's current index with the consumer index, as a run does, and print a line for"
        " each path: + new, * changed, - gone from the provider, = unchanged. Nothing is changed or locked,"
        " and the provider does not rebuild its index. Exit status 1: a run would stop, because of the guard"
        " or one of the indexes; 3: the provider cannot be reached, or has no index.",
        (
            ("everything that differs", "plan web"),
            ("before the first run, with an index that was copied here", "plan web --index web.md5"),
            ("one directory, with unchanged files", "plan web /backups/etc --all"),
        ),
        (
            PROVIDER,
            argument(
                "words",
                metavar="PATH",
                nargs="*",
                help="only these: absolute paths inside the chroot; directories are recursive",
            ),
            argument("--all", action="store_true", help="also list unchanged files"),
            INDEX,
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.plan.run",
    ),
    Command(
        "adopt",
        "Make a backup of a tree that rsync, rclone or scp made",
        "Take over the files already in `files` of `dest`, or a tree that is moved there, so that the first"
        " run transfers only what differs. Every file is hashed and compared with the provider's index."
        " Nothing is deleted or modified. If it is interrupted, run the same command again to continue. Exit"
        " status 1: something could not be adopted; 3: the provider cannot be reached.",
        (
            ("show what would be adopted", "adopt web --tree /srv/rsync/web --at /backups --dry-run"),
            ("with an index that was copied here", "adopt web --index web.md5"),
        ),
        (
            PROVIDER,
            argument(
                "--tree",
                metavar="DIR",
                action="append",
                default=[],
                help="first move DIR to PATH (see --at) in the mirror",
            ),
            argument(
                "--at", metavar="PATH", action="append", default=[], help="path of DIR inside A's chroot"
            ),
            argument(
                "--suffix", metavar="FORM", help="files with this suffix are old versions: skip, see `import`"
            ),
            KEEP_EXTENSION,
            INDEX,
            argument("--offline", action="store_true", help="do without the provider's index"),
            argument("--dry-run", action="store_true", help="only show what would be adopted"),
            argument(
                "--jobs", metavar="N", type=positive_int, default=2, help="files at a time (default: 2)"
            ),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.adopt.run",
        unless_dry_run,
    ),
    Command(
        "import",
        "Import what rsync --backup-dir and the like kept as versions",
        "Move each file of a tree to where the backup keeps the old versions of its path. No version is ever"
        " overwritten. `versions` and `verify` know imported versions; which files existed at a time before"
        " the first backup stays unknown. Exit status 1: something could not be imported, or there was"
        " nothing to import.",
        (
            (
                "what a run of rsync displaced",
                "import web /srv/rsync/web.old/2026-11-20 --at /backups --displaced 2026-11-20",
            ),
            ("what `rclone --suffix .2026-11-20` left beside the files", "import web --suffix .%Y-%m-%d"),
        ),
        (
            PROVIDER,
            argument(
                "directory", metavar="DIR", nargs="?", help="the tree (default: the mirror, with --suffix)"
            ),
            argument("--at", metavar="PATH", help="path of DIR inside A's chroot"),
            argument("--displaced", metavar="TIME", help="when: 2026-11-23T14:00, 'yesterday 14:00'"),
            argument(
                "--suffix", metavar="FORM", help="only files with this suffix: .%%Y-%%m-%%d, or ~ and TIME"
            ),
            KEEP_EXTENSION,
            argument("--copy", action="store_true", help="copy the files; leave DIR unchanged"),
            argument("--dry-run", action="store_true", help="only show what would be imported"),
            argument(
                "--jobs", metavar="N", type=positive_int, default=2, help="files at a time (default: 2)"
            ),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.import_versions.run",
        unless_dry_run,
    ),
)
