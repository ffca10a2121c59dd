"""Commands that set a provider up."""

from __future__ import annotations

from airflow_mdbackup.cli.tables.command import PROVIDER, Command, always, argument

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
            PROVIDER,
            argument(
                "--bind",
                metavar="DIR[:PATH]",
                action="append",
                default=[],
                help="mount DIR of A where backupop sees PATH (or DIR)",
            ),
            argument(
                "--from",
                metavar="ADDRESS",
                action="append",
                default=[],
                dest="addresses",
                help="address or network of B (default: any)",
            ),
            argument("--host", metavar="NAME", help="A, as B calls it (default: as in connection, or on A)"),
            argument(
                "--port", metavar="N", type=int, help="of A's sshd (default: as in connection, or on A)"
            ),
            argument(
                "--backupop",
                metavar="LOGIN",
                help="account that reads (default: backupop)",
            ),
            argument(
                "--index-account",
                metavar="LOGIN",
                help="account that builds the index (mdbackup-index)",
            ),
            argument(
                "--chroot",
                metavar="DIR",
                help="what backupop sees as / (default: /home/LOGIN)",
            ),
            argument("--sftpi", action="store_true", help="make a subsystem sftpi, leave other users' sftp"),
            argument(
                "--timer",
                metavar="WHEN",
                help="build the index daily, or as '*:0/15', by systemd",
            ),
            argument(
                "--path-unit",
                action="store_true",
                help="build the index when files are added, and hourly",
            ),
            argument("--cron", metavar="WHEN", help="build the index by cron: '30 2 * * *'"),
            argument(
                "--indexer",
                metavar="KEY=VALUE",
                action="append",
                default=[],
                help="in place of providers_file: jobs=2, limit=50MB, ...",
            ),
            argument(
                "--keys",
                metavar="DIR",
                help="B's key pairs (default: keys beside providers_file)",
            ),
            argument(
                "--as",
                metavar="NAME",
                dest="name",
                help="name on A, if two consumers call it PROVIDER",
            ),
            argument("--undo", action="store_true", help="print the script that undoes it"),
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
            PROVIDER,
            argument(
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
            argument(
                "--slots",
                metavar="N",
                type=int,
                default=4,
                help="how many tasks a new pool lets run at a time (default: 4)",
            ),
        ),
        "airflow_mdbackup.cli.init.run",
        always,
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
            PROVIDER,
            argument(
                "--fail",
                action="store_true",
                help="have pings tell of a failed run, as the service takes it",
            ),
        ),
        "airflow_mdbackup.cli.alert.run",
        always,
    ),
)
