"""Commands about backups: how old they are, what the next one brings, and how another tool's becomes one."""

from __future__ import annotations

from airflow_mdbackup.cli.tables.command import (
    FORMAT,
    INDEX,
    KEEP_EXTENSION,
    PROVIDER,
    PROVIDERS_FILE,
    Command,
    argument,
    count,
    unless_dry,
)

COMMANDS = (
    Command(
        "status",
        "Tell how old the backups are, and fail if one is too old",
        "Tell for each provider, or those that are named, when its last good run was, by what `dest` shows:"
        " for cron, or a monitoring agent. Run this where `dest` is, as the user of the workers. Needs no"
        " database of Airflow. Exit status 1: a backup is stale, was never made, cannot be seen, or is not"
        " configured validly.",
        (
            ("all backups, for people", "status"),
            ("without Airflow's own configuration, which takes seconds", "status --providers-file FILE"),
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
                help="how the result is printed (default: text)",
            ),
            argument("--output", metavar="FILE", help="replace FILE by the result, in one step"),
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.status.run",
    ),
    Command(
        "plan",
        "Tell what the next run would do",
        "Compare the index that the provider has now with the consumer index, as a run does, and print a line"
        " for each path: + is new, * is changed, - is gone from the provider, = is the same. Nothing is"
        " changed, locked, or built anew on the provider. Exit status 1: a run would stop, by its guard or"
        " for one of the indexes; 3: the provider cannot be reached, or has no index.",
        (
            ("all that differs", "plan web"),
            ("before the first run, against an index that was copied here", "plan web --index web.md5"),
            ("also what is the same, in one directory", "plan web /backups/etc --all"),
        ),
        (
            PROVIDER,
            argument("words", metavar="PATH", nargs="*", help="only these, as backupop sees them"),
            argument("--all", action="store_true", help="also what is the same"),
            INDEX,
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.plan.run",
    ),
    Command(
        "adopt",
        "Make a backup of a tree that rsync, rclone or scp made",
        "Take over what lies in `files` of `dest`, or a tree that is moved there, so that the first run"
        " transfers only what differs. All is hashed and compared with the provider's index. Nothing is"
        " deleted or written to. The same command again goes on where it was cut off. Exit status 1:"
        " something could not be adopted; 3: the provider cannot be reached.",
        (
            ("what would be", "adopt web --tree /srv/rsync/web --at /backups --dry-run"),
            ("with an index that was copied here", "adopt web --index web.md5"),
        ),
        (
            PROVIDER,
            argument(
                "--tree",
                metavar="DIR",
                action="append",
                default=[],
                help="move DIR to PATH of the mirror first",
            ),
            argument(
                "--at", metavar="PATH", action="append", default=[], help="DIR, as backupop sees it on A"
            ),
            argument(
                "--suffix", metavar="FORM", help="files that end so are old versions: leave them to `import`"
            ),
            KEEP_EXTENSION,
            INDEX,
            argument("--offline", action="store_true", help="do without the provider's index"),
            argument("--dry-run", action="store_true", help="only tell what would be adopted"),
            argument("--jobs", metavar="N", type=count, default=2, help="files at a time (default: 2)"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.adopt.run",
        unless_dry,
    ),
    Command(
        "import",
        "Make versions of what rsync --backup-dir and the like kept",
        "Move each file of a tree to where the backup has the old versions of its path. No version is ever"
        " overwritten. `versions` and `verify` know them; which files there were at a moment before the first"
        " backup is not known. Exit status 1: something could not be imported, or there was nothing.",
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
                "directory", metavar="DIR", nargs="?", help="the tree; left out: the mirror, by --suffix"
            ),
            argument("--at", metavar="PATH", help="DIR, as backupop sees it on A"),
            argument("--displaced", metavar="TIME", help="when: 2026-11-23T14:00, 'yesterday 14:00'"),
            argument("--suffix", metavar="FORM", help="only files that end so: .%%Y-%%m-%%d, or ~ and TIME"),
            KEEP_EXTENSION,
            argument("--copy", action="store_true", help="copy the files; DIR stays as it is"),
            argument("--dry-run", action="store_true", help="only tell what would be imported"),
            argument("--jobs", metavar="N", type=count, default=2, help="files at a time (default: 2)"),
            FORMAT,
            PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.import_versions.run",
        unless_dry,
    ),
)
