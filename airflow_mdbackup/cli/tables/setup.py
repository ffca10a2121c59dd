"""Commands that set up a provider."""

from __future__ import annotations

from airflow_mdbackup.cli.tables.command import PROVIDER, Command, always, argument

COMMANDS = (
    Command(
        "provision",
        "Print the script that sets up a provider's accounts",
        "Print a script for the administrator of server A to review and run there as root. It creates the"
        " two accounts with their restrictions, and installs the indexer. This command contacts no server."
        " It creates B's key pairs if they are missing.",
        (
            (
                "back up /srv/www of A as /backups; review the script, and run it on A as root",
                "provision web --bind /srv/www:/backups > web.sh",
            ),
            (
                "A builds its index by itself, whenever files are added; B is one machine",
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
                help="mount DIR of A at PATH inside the chroot (default: at DIR)",
            ),
            argument(
                "--from",
                metavar="ADDRESS",
                action="append",
                default=[],
                dest="addresses",
                help="address or network of B (default: any)",
            ),
            argument(
                "--host", metavar="NAME", help="A's name, as seen from B (default: from the connection or A)"
            ),
            argument(
                "--port",
                metavar="N",
                type=int,
                help="port of A's sshd (default: from the connection or A)",
            ),
            argument(
                "--backupop",
                metavar="LOGIN",
                help="the read-only account (default: backupop)",
            ),
            argument(
                "--index-account",
                metavar="LOGIN",
                help="the account that builds the index (default: mdbackup-index)",
            ),
            argument(
                "--chroot",
                metavar="DIR",
                help="root directory of backupop (default: /home/LOGIN)",
            ),
            argument(
                "--sftpi",
                action="store_true",
                help="use a new subsystem, sftpi; leave other users' sftp as it is",
            ),
            argument(
                "--timer",
                metavar="WHEN",
                help="build the index by a systemd timer: daily, '*:0/15'",
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
                help="override a key of `indexer`: jobs=2, limit=50MB, ...",
            ),
            argument(
                "--keys",
                metavar="DIR",
                help="B's key pairs (default: `keys` beside providers_file)",
            ),
            argument(
                "--as",
                metavar="NAME",
                dest="name",
                help="name on A, if two consumers use the same PROVIDER",
            ),
            argument("--undo", action="store_true", help="print the script that undoes it"),
        ),
        "airflow_mdbackup.cli.provision.run",
    ),
    Command(
        "audit",
        "Prove from here that a provider's accounts are properly restricted",
        "Log in to server A with both accounts, try what they must not be able to do, and print a verdict for"
        " each attempt. Nothing is left behind on A. Exit status 1: something is not restricted enough.",
        (("after `provision`, and now and then", "audit web"),),
        (
            PROVIDER,
            argument(
                "--format",
                choices=("text", "json"),
                default="text",
                help="output format (default: text)",
            ),
        ),
        "airflow_mdbackup.cli.audit.run",
    ),
    Command(
        "init",
        "Create the configured pools; report missing connections",
        "Create each Airflow pool that the configuration names and that does not exist: without its pool, no"
        " task ever starts. Report connections that are missing or do not work on this machine, and invalid"
        " providers; no server is contacted. Exit status 1: something was reported. Run it on a worker, as"
        " the workers' user, since it looks for keys.",
        (("after each change of the configuration", "init"), ("two tasks at a time", "init --slots 2")),
        (
            argument(
                "--slots",
                metavar="N",
                type=int,
                default=4,
                help="slots of a new pool: how many tasks run at a time (default: 4)",
            ),
        ),
        "airflow_mdbackup.cli.init.run",
        always,
    ),
    Command(
        "test-alert",
        "Send a test message by each of a provider's alerts",
        "Send a message marked as a test by each entry of the provider's `alerts`, and print which services"
        " accepted it; each gets 15 seconds. A ping goes to the log of its check, whose state does not"
        " change. Run it where the DAG processor runs, which reports failed runs, and on a worker. Exit"
        " status 1: a service rejected the message.",
        (
            ("after writing `alerts`", "test-alert web"),
            (
                "have the ping service alert too, until the next good run",
                "test-alert web --fail",
            ),
        ),
        (
            PROVIDER,
            argument(
                "--fail",
                action="store_true",
                help="have pings report a failed run, so that their service alerts",
            ),
        ),
        "airflow_mdbackup.cli.alert.run",
        always,
    ),
)
