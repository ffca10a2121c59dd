"""The table of commands, from which both command lines are made.

Every `airflow` command imports this module, so it imports nothing that takes time, and what a command does is
imported when the command runs. That is a function which takes the parsed arguments and returns the exit
status:

    0  done          1  done, and something is wrong (each command says what)
    2  usage: what was asked for cannot be done like this          3  the provider cannot be reached
    4  an error of this program, with its traceback
    5  standard output or standard error cannot be written: see `output`
"""

from __future__ import annotations

import argparse
import importlib
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from airflow_mdbackup import __version__
from airflow_mdbackup.cli import UsageError, printable
from airflow_mdbackup.cli.output import Output, OutputFailed
from airflow_mdbackup.scheme.errors import BackupError


@dataclass(frozen=True, slots=True)
class Argument:
    """One argument: its flags, or the name of a positional one, and what `add_argument` of argparse takes."""

    flags: tuple[str, ...]
    options: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Command:
    """One command.

    :param help: one line, for the list of commands.
    :param description: what it does, for its own page of help.
    :param examples: command lines without the name of the program, each after a line that says what for.
    :param function: dotted name of what runs it.
    :param changes: whether it changes anything, so that it is to come to its end without output, too.
    """

    name: str
    help: str
    description: str
    examples: tuple[tuple[str, str], ...]
    arguments: tuple[Argument, ...]
    function: str
    changes: Callable[[argparse.Namespace], bool] = lambda arguments: False

    def usage(self, program: str) -> str:
        """Return the first line of its help."""
        positional = [a for a in self.arguments if not a.flags[0].startswith("-")]
        forms = {None: "{}", "?": "[{}]", "*": "[{} ...]"}
        names = [forms[a.options.get("nargs")].format(a.options["metavar"]) for a in positional]
        return " ".join([program, self.name, "[options]", *names])

    def epilog(self, program: str) -> str:
        """Return the examples as they are shown below the help."""
        return "examples:\n" + "\n".join(f"  # {why}\n  {program} {line}" for why, line in self.examples)


def _argument(*flags: str, **options: Any) -> Argument:
    return Argument(flags, options)


def _always(arguments: argparse.Namespace) -> bool:
    return True


def _unless_dry(arguments: argparse.Namespace) -> bool:
    return not arguments.dry_run


def _count(text: str) -> int:
    """Return a number of at least one.

    :raises ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no number from 1 on")
    return int(text)


_PROVIDER = _argument("provider", metavar="PROVIDER", help="name of the provider in providers_file")

_WORDS = _argument(
    "words",
    metavar="PROVIDER | PATH",
    nargs="*",
    help="a provider's name, unless --dest is given, and paths: as backupop sees them, a directory means all"
    " below; or gitignore patterns, in quotes: one with a slash begins at the root",
)
_DEST = _argument("--dest", metavar="DIR", help="the backup itself: needs no configuration and no Airflow")
_PROVIDERS_FILE = _argument(
    "--providers-file", metavar="FILE", help="in place of the one that Airflow's options name"
)
_INDEX = _argument(
    "--index", metavar="FILE", help="the provider's index, not fetched; - is stdin. Needs no Airflow"
)
_FORMAT = _argument(
    "--format",
    choices=("text", "json"),
    default="text",
    help="json: one object a line, names escaped so that they can be given again (default: text)",
)

_KEEP_EXTENSION = _argument(
    "--suffix-keep-extension", action="store_true", help="it stands before the extension, as rclone has it"
)

COMMANDS = (
    Command(
        "provision",
        "Print the script that sets up a provider's accounts",
        "Print a script for the administrator of server A, who reads it and runs it there as root. It makes"
        " the two accounts, their restrictions and the indexer. Nothing is contacted. B's key pairs are made"
        " here if they are missing.",
        (
            (
                "/srv/www of A is backed up as /backups; the script is read, and run on A as root",
                "provision web --bind /srv/www:/backups > web.sh",
            ),
            (
                "A builds its index itself, whenever files are added; B is one machine",
                "provision web --bind /srv/www:/backups --path-unit --from 192.0.2.7 > web.sh",
            ),
            ("the script that undoes it", "provision web --undo > undo.sh"),
        ),
        (
            _PROVIDER,
            _argument(
                "--bind",
                metavar="DIR[:PATH]",
                action="append",
                default=[],
                help="mount DIR of A where backupop sees PATH (or DIR)",
            ),
            _argument(
                "--from",
                metavar="ADDRESS",
                action="append",
                default=[],
                dest="addresses",
                help="address or network of B (default: any)",
            ),
            _argument("--host", metavar="NAME", help="A, as B calls it (default: as in connection, or on A)"),
            _argument(
                "--port", metavar="N", type=int, help="of A's sshd (default: as in connection, or on A)"
            ),
            _argument(
                "--backupop",
                metavar="LOGIN",
                help="account that reads (default: backupop)",
            ),
            _argument(
                "--index-account",
                metavar="LOGIN",
                help="account that builds the index (mdbackup-index)",
            ),
            _argument(
                "--chroot",
                metavar="DIR",
                help="what backupop sees as / (default: /home/LOGIN)",
            ),
            _argument("--sftpi", action="store_true", help="make a subsystem sftpi, leave other users' sftp"),
            _argument(
                "--timer",
                metavar="WHEN",
                help="build the index daily, or as '*:0/15', by systemd",
            ),
            _argument(
                "--path-unit",
                action="store_true",
                help="build the index when files are added, and hourly",
            ),
            _argument("--cron", metavar="WHEN", help="build the index by cron: '30 2 * * *'"),
            _argument(
                "--indexer",
                metavar="KEY=VALUE",
                action="append",
                default=[],
                help="in place of providers_file: jobs=2, limit=50MB, ...",
            ),
            _argument(
                "--keys",
                metavar="DIR",
                help="B's key pairs (default: keys beside providers_file)",
            ),
            _argument(
                "--as",
                metavar="NAME",
                dest="name",
                help="name on A, if two consumers call it PROVIDER",
            ),
            _argument("--undo", action="store_true", help="print the script that undoes it"),
        ),
        "airflow_mdbackup.cli.provision.run",
    ),
    Command(
        "audit",
        "Prove from here that a provider's accounts can do no more than they should",
        "Log in to server A with both accounts, try what they must not be able to do, and print a verdict for"
        " each. Nothing is left behind there. Exit status 1: something is looser than it should be.",
        (("after `provision`, and now and then", "audit web"),),
        (
            _PROVIDER,
            _argument(
                "--format",
                choices=("text", "json"),
                default="text",
                help="how the result is printed (default: text)",
            ),
        ),
        "airflow_mdbackup.cli.audit.run",
    ),
    Command(
        "init",
        "Make the pools that the configuration names, and report what is missing",
        "Make in Airflow each pool that the configuration names and that is missing: without its pool, no"
        " task ever starts. Report connections that are missing or cannot be used on this machine, and"
        " providers that are not configured validly; no server is asked. Exit status 1: there are such. Run"
        " this on a worker, as its user, since keys are looked for.",
        (("after each change of the configuration", "init"), ("two tasks at a time", "init --slots 2")),
        (
            _argument(
                "--slots",
                metavar="N",
                type=int,
                default=4,
                help="how many tasks a new pool lets run at a time (default: 4)",
            ),
        ),
        "airflow_mdbackup.cli.init.run",
        _always,
    ),
    Command(
        "test-alert",
        "Send a test message in each way that a provider's alerts name",
        "Send a message that is marked as a test in each way of the provider's `alerts`, and print which of"
        " them took it; each gets 15 seconds. A ping goes to the log of its check, which stays as it is. Run"
        " this where the DAG processor runs, which tells of failed runs, and on a worker. Exit status 1: one"
        " of them did not take it.",
        (
            ("after `alerts` was written", "test-alert web"),
            ("have the service of a ping alert people too, until the next good run", "test-alert web --fail"),
        ),
        (
            _PROVIDER,
            _argument(
                "--fail",
                action="store_true",
                help="have pings tell of a failed run, as the service takes it",
            ),
        ),
        "airflow_mdbackup.cli.alert.run",
        _always,
    ),
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
            _argument(
                "providers",
                metavar="PROVIDER",
                nargs="*",
                help="name of a provider in providers_file (default: all)",
            ),
            _argument(
                "--format",
                choices=("text", "json", "prometheus"),
                default="text",
                help="how the result is printed (default: text)",
            ),
            _argument("--output", metavar="FILE", help="replace FILE by the result, in one step"),
            _PROVIDERS_FILE,
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
            _PROVIDER,
            _argument("words", metavar="PATH", nargs="*", help="only these, as backupop sees them"),
            _argument("--all", action="store_true", help="also what is the same"),
            _INDEX,
            _FORMAT,
            _PROVIDERS_FILE,
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
            _PROVIDER,
            _argument(
                "--tree",
                metavar="DIR",
                action="append",
                default=[],
                help="move DIR to PATH of the mirror first",
            ),
            _argument(
                "--at", metavar="PATH", action="append", default=[], help="DIR, as backupop sees it on A"
            ),
            _argument(
                "--suffix", metavar="FORM", help="files that end so are old versions: leave them to `import`"
            ),
            _KEEP_EXTENSION,
            _INDEX,
            _argument("--offline", action="store_true", help="do without the provider's index"),
            _argument("--dry-run", action="store_true", help="only tell what would be adopted"),
            _argument("--jobs", metavar="N", type=_count, default=2, help="files at a time (default: 2)"),
            _FORMAT,
            _PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.adopt.run",
        _unless_dry,
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
            _PROVIDER,
            _argument(
                "directory", metavar="DIR", nargs="?", help="the tree; left out: the mirror, by --suffix"
            ),
            _argument("--at", metavar="PATH", help="DIR, as backupop sees it on A"),
            _argument("--displaced", metavar="TIME", help="when: 2026-11-23T14:00, 'yesterday 14:00'"),
            _argument("--suffix", metavar="FORM", help="only files that end so: .%%Y-%%m-%%d, or ~ and TIME"),
            _KEEP_EXTENSION,
            _argument("--copy", action="store_true", help="copy the files; DIR stays as it is"),
            _argument("--dry-run", action="store_true", help="only tell what would be imported"),
            _argument("--jobs", metavar="N", type=_count, default=2, help="files at a time (default: 2)"),
            _FORMAT,
            _PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.import_versions.run",
        _unless_dry,
    ),
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
            _WORDS,
            _DEST,
            _argument(
                "--to",
                metavar="DIR",
                required=True,
                help="where to; each file keeps its whole path below it; made if it is not there",
            ),
            _argument(
                "--as-of",
                metavar="TIME",
                help="2026-11-23T14:00, 'yesterday 14:00', a run's id (default: now)",
            ),
            _argument("--overwrite", action="store_true", help="replace files of DIR that have other bytes"),
            _argument(
                "--include-gone", action="store_true", help="also what had gone from the provider by then"
            ),
            _argument("--dry-run", action="store_true", help="only tell what would come back"),
            _argument("--jobs", metavar="N", type=_count, default=4, help="files at a time (default: 4)"),
            _FORMAT,
            _PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.restore.run",
        _unless_dry,
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
        (_WORDS, _DEST, _FORMAT, _PROVIDERS_FILE),
        "airflow_mdbackup.cli.past.versions",
    ),
    Command(
        "history",
        "List each change of some paths",
        "List what each commit did to some paths, or to all, the oldest first. Exit status 1: nothing, or"
        " history is missing or damaged.",
        (("of a directory", "history web /backups/etc"),),
        (_WORDS, _DEST, _FORMAT, _PROVIDERS_FILE),
        "airflow_mdbackup.cli.past.history",
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
            _argument(
                "words",
                metavar="PROVIDER | PATH",
                nargs="*",
                help="a provider's name, unless --dest is given, and one file, as backupop sees it",
            ),
            _DEST,
            _argument(
                "--from", metavar="TIME", dest="since", help="default: the version before that of --to"
            ),
            _argument("--to", metavar="TIME", dest="until", help="default: the last one"),
            _PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.diff.run",
    ),
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
            _argument("words", metavar="PROVIDER", nargs="*", help=_PROVIDER.options["help"]),
            _DEST,
            _argument(
                "--set", nargs=2, metavar=("RUN", "TIME"), help="a run, or a stamp, and when it committed"
            ),
            _argument("--unset", metavar="RUN", help="take back what --set said of it"),
            _FORMAT,
            _PROVIDERS_FILE,
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
            _argument("words", metavar="PROVIDER", nargs="*", help=_PROVIDER.options["help"]),
            _DEST,
            _argument("--dry-run", action="store_true", help="write nothing"),
            _FORMAT,
            _PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.rebuild.run",
        _unless_dry,
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
            _WORDS,
            _DEST,
            _argument("--bytes", metavar="SIZE", help="the next part of all, of so many bytes: 50GB"),
            _argument("--fraction", metavar="N", help="the next part of all, such as 1/30"),
            _argument("--limit", metavar="SIZE", help="read at most so many bytes per second"),
            _argument("--repair", action="store_true", help="forget rotten live files: see `forget`"),
            _argument("--missing", action="store_true", help="with --repair: also those that are missing"),
            _argument("--let-go", action="store_true", help="miss no more what is gone for good"),
            _argument("--jobs", metavar="N", type=_count, default=2, help="files at a time (default: 2)"),
            _FORMAT,
            _PROVIDERS_FILE,
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
        (_WORDS, _DEST, _FORMAT, _PROVIDERS_FILE),
        "airflow_mdbackup.cli.forget.run",
        _always,
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
            _WORDS,
            _DEST,
            _argument("--keep-last", metavar="N", type=_count, help="keep the N newest of each path"),
            _argument("--keep-within", metavar="TIME", help="keep what was displaced within 90d, 8w or 1y"),
            _argument(
                "--keep-daily",
                metavar="N",
                type=_count,
                help="keep the newest of each of the last N days on which a path has any",
            ),
            _argument("--keep-monthly", metavar="N", type=_count, help="likewise, of the last N months"),
            _argument("--yes", action="store_true", help="take them away"),
            _FORMAT,
            _PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.prune.run",
        lambda arguments: arguments.yes,
    ),
    Command(
        "log",
        "List the runs that changed anything",
        "List each run that changed anything: when, its id, and how much. Exit status 1: history is missing"
        " or damaged.",
        (("of a provider", "log web"), ("of a backup, without Airflow", "log --dest /srv/backups/web")),
        (
            _argument("words", metavar="PROVIDER", nargs="*", help=_PROVIDER.options["help"]),
            _DEST,
            _FORMAT,
            _PROVIDERS_FILE,
        ),
        "airflow_mdbackup.cli.past.log",
    ),
)


def get_airflow_commands() -> list[Any]:
    """Return the commands for the command line of Airflow, which finds this by `get_provider_info`."""
    from airflow.cli.cli_config import ActionCommand, Arg, GroupCommand

    commands = [
        ActionCommand(
            name=command.name,
            help=command.help,
            func=_ending(command),
            args=[Arg(argument.flags, **argument.options) for argument in command.arguments],
            description=command.description,
            epilog=command.epilog("airflow mdbackup"),
        )
        for command in COMMANDS
    ]
    return [GroupCommand(name="mdbackup", help="Pull backups over read-only SFTP", subcommands=commands)]


def main(words: Sequence[str] | None = None) -> int:
    """Run the command line `mdbackup`, and return its exit status."""
    output, arguments, status = Output(goes_on=False), None, 0
    try:
        with output:
            arguments = _parse(words)
    except SystemExit as end:  # it has printed help, or what is wrong with the words
        status = end.code if isinstance(end.code, int) else 0
    if arguments is None:
        raise SystemExit(output.status("mdbackup", status))
    return run(arguments.command, arguments)


def _parse(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="mdbackup", description="Pull backups over read-only SFTP.")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name,
            help=command.help,
            usage=command.usage("mdbackup"),
            description=command.description,
            epilog=command.epilog("mdbackup"),
            formatter_class=_Formatter,
        )
        for argument in command.arguments:
            subparser.add_argument(*argument.flags, **argument.options)
        subparser.set_defaults(command=command)
    arguments, more = parser.parse_known_args(_with_suffix_joined(sys.argv[1:] if words is None else words))
    if len(more) == 1 and not more[0].startswith("-") and getattr(arguments, "directory", "") is None:
        arguments.directory = more.pop()  # it stands behind options
    if more:
        # argparse takes paths in one place only; people write some before options, and some behind.
        if not hasattr(arguments, "words") or any(word.startswith("-") for word in more):
            commands.choices[arguments.command.name].error(f"unrecognized arguments: {' '.join(more)}")
        arguments.words += more
    return arguments


def _with_suffix_joined(words: Sequence[str]) -> list[str]:
    """Return the words with ``--suffix -bak`` as ``--suffix=-bak``, or argparse takes -bak for an option."""
    flags = {flag for command in COMMANDS for argument in command.arguments for flag in argument.flags}
    joined: list[str] = []
    for word in words:
        if joined[-1:] == ["--suffix"] and word.startswith("-") and word not in flags:
            joined[-1] += f"={word}"
        else:
            joined.append(word)
    return joined


def run(command: Command, arguments: argparse.Namespace) -> int:
    """Run one command, tell errors on stderr, and return the exit status."""
    status = 0
    output = Output(goes_on=command.changes(arguments))
    with output:
        status = _run(command, arguments)
    return output.status(f"mdbackup {command.name}", status)


def _run(command: Command, arguments: argparse.Namespace) -> int:
    module, _, name = command.function.rpartition(".")
    try:
        status: int = getattr(importlib.import_module(module), name)(arguments)
    except OutputFailed:
        raise
    except (UsageError, BackupError) as error:
        print(printable(f"mdbackup {command.name}: {error}"), file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if (error.name or "airflow_mdbackup").startswith("airflow_mdbackup"):
            return _fault(command)
        # As where only what reads a backup alone was installed: see docs/restore.md.
        named = getattr(arguments, "dest", "")
        instead = " Where that is gone, name the backup itself: --dest DIR" if named is None else ""
        print(
            f"mdbackup {command.name}: {error.name} is not installed here: run this in Airflow's environment."
            f"{instead}",
            file=sys.stderr,
        )
        return 2
    except Exception:
        return _fault(command)
    return status


def _fault(command: Command) -> int:
    """Print the traceback of an error that nobody expected, and return its exit status."""
    traceback.print_exc()
    print(f"mdbackup {command.name}: this is an error of the program: please report it", file=sys.stderr)
    return 4


def _ending(command: Command) -> Callable[[argparse.Namespace], NoReturn]:
    """Return a function that runs the command and ends the process: Airflow ignores what it returns."""

    def end(arguments: argparse.Namespace) -> NoReturn:
        raise SystemExit(run(command, arguments))

    return end


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills the description, keeps the examples as they are, and takes more of the line for the flags."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=26)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)
