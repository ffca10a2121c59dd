"""Hooks for the two accounts of a provider, by ordinary Airflow connections of type ``sftp`` and ``ssh``.

:mod:`.connection` says what such a connection may contain; backups go over :mod:`.session` or
:mod:`.ssh_program`.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any

import asyncssh
import paramiko
from airflow.providers.common.compat.connection import get_async_connection
from airflow.providers.sftp.hooks.sftp import SFTPHook
from airflow.providers.ssh.hooks.ssh import SSHHook, SSHHookAsync
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mdbackup.config.airflow_options import providers_file
from airflow_mdbackup.config.configuration import load
from airflow_mdbackup.hooks.connection import CONNECT, SshAccount, account_of
from airflow_mdbackup.hooks.failures import NoCommonAlgorithm, ended_here, lost, refused, wrong_host_key
from airflow_mdbackup.hooks.login import connect
from airflow_mdbackup.hooks.session import Connection, Session
from airflow_mdbackup.hooks.ssh_program import Program, SshChannel, program_for
from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.provider_side.programs import STOP
from airflow_mdbackup.provider_side.report import Done
from airflow_mdbackup.provider_side.request import IndexRequest
from airflow_mdbackup.scheme.common.paths import to_text
from airflow_mdbackup.scheme.errors import AccessRefused, BackupError, ConnectionLost
from airflow_mdbackup.scheme.transfer.sftp import PATIENCE, Reader
from airflow_mdbackup.scheme.transfer.sftp_files import Stated
from airflow_mdbackup.scheme.transfer.sftp_packets import Attributes, NotAnSftpServer
from airflow_mdbackup.triggers.bounded import BoundedClient

_VARIABLE = "AIRFLOW_CONN_"  # prefix of environment variables that hold connections
_LONGEST_MESSAGE = 4096  # characters, in the log
# Seconds of round trip above which asyncssh, with a larger window, is faster than ssh with its 2 MiB.
LONG_ROUND_TRIP = 0.03
_OUTSIDE = "/etc/passwd"  # exists on every machine, and in no chroot for backups
_SILENCES = 5  # stall timeouts in which more than a trickle must arrive
# Messages of ssh when it has no algorithm in common with the server, or does not support one.
_NO_ALGORITHM = ("Unable to negotiate", "no matching", "Bad SSH2 ", "Bad key types")
_REFUSED = ("Permission denied", "Too many authentication failures")
_LISTEN = 10.0  # seconds after which a silent connection is checked
_STOPPING = 3.0  # seconds for a build to stop; Airflow kills a task after five
_ENDING = 10.0  # seconds for a server to end a session; it may allow only one


class Printable(logging.Filter):
    """Escapes and shortens what paramiko and asyncssh log, since they quote the server verbatim."""

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()[:_LONGEST_MESSAGE]
        record.msg, record.args = to_text(message.encode("utf-8", "backslashreplace")), ()
        return True


logging.getLogger("paramiko.transport").addFilter(Printable())
logging.getLogger("asyncssh").addFilter(Printable())
# A server may request XON/XOFF as often as it likes, and asyncssh logs each time.
logging.getLogger("asyncssh").addFilter(lambda record: "XON/XOFF" not in str(record.msg))
logging.getLogger("asyncssh").setLevel(logging.WARNING)


def account(conn_id: str) -> SshAccount:
    """Return the account that an Airflow connection describes.

    :raises AccessRefused: there is no such connection, or it cannot be used as it is.
    """
    try:
        connection = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as error:
        raise no_such_connection(conn_id) from error
    return account_of(conn_id, connection)


def no_such_connection(conn_id: str) -> AccessRefused:
    variable = f"{_VARIABLE}{conn_id.upper()}"
    if variable in os.environ:  # Airflow treats one that it cannot parse as missing
        return AccessRefused(
            f"the connection {conn_id} cannot be read: the variable {variable} is neither a connection in "
            "JSON nor a URI with a number as its port"
        )
    return AccessRefused(
        f"the connection {conn_id} does not exist. Create it in the Airflow UI, or by: airflow connections "
        f"add {conn_id} ... (outside a task, only `airflow mdbackup ...` reads Airflow's database)"
    )


class IndexHookAsync(SSHHookAsync):
    """The index account, for triggers, which share their event loop with others."""

    def __init__(self, conn_id: str) -> None:
        super().__init__(ssh_conn_id=conn_id)

    async def _get_conn(self) -> asyncssh.SSHClientConnection:
        """Connect. The server can take neither the memory nor the turns of other triggers.

        :raises AccessRefused, ConnectionLost: see :func:`.login.connect`.
        """
        try:
            connection = await get_async_connection(self.ssh_conn_id)
        except AirflowNotFoundException as error:
            raise no_such_connection(self.ssh_conn_id) from error
        # In a thread, since an encrypted key takes seconds to open.
        account = await asyncio.to_thread(account_of, self.ssh_conn_id, connection)
        return await connect(account, BoundedClient)


class _Connected:
    """Base of both hooks: the account, and a connection to it. A context manager.

    :param conn_id: the Airflow connection.
    :param stall_timeout: seconds that a transfer may be silent.
    :raises AccessRefused: the connection cannot be used.
    """

    ssh_conn_id: str | None

    def __init__(self, conn_id: str, *, stall_timeout: float = 60.0) -> None:
        self.ssh_conn_id = conn_id
        self.stall_timeout = stall_timeout
        self.account = account(conn_id)
        self._patience = max(PATIENCE, _SILENCES * stall_timeout)
        self._connection: Connection | None = None
        self._channels: list[SshChannel] = []
        self._ended = False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    if not TYPE_CHECKING:  # to mypy, any attribute would be there

        def __getattr__(self, name: str) -> Any:
            """Initialise Airflow's hook once one of its attributes is used.

            It parses the connection in its own way, and does not support all that backups do.
            """
            if name.startswith("__") or vars(self).get("_is_airflows"):
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            self._is_airflows = True
            try:
                super().__init__(self.ssh_conn_id)
            except BaseException:
                self._is_airflows = False
                raise
            return getattr(self, name)

    def close(self) -> None:
        """End the connection for good, and all that waits on it. May be called from any thread."""
        self._ended = True
        if self._connection is not None:
            self._connection.close()
        channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()
        client: paramiko.SSHClient | None = vars(self).get("client")  # of Airflow's hook
        if client is not None:
            client.close()

    def connected(self) -> Connection:
        """Return the connection; connect if necessary.

        :raises AccessRefused: the host key is not the expected one, or the login is refused.
        :raises ConnectionLost: the server cannot be reached, or the connection has been ended.
        """
        self._check_not_ended()
        if self._connection is None or not self._connection.alive:
            self._connection = Connection(self.account)
            if not self._ended:  # nobody would end this one
                self._connection.connect()
        if self._ended:
            self._connection.close()
        self._check_not_ended()
        return self._connection

    def _check_not_ended(self) -> None:
        """:raises ConnectionLost: the hook has been closed, or the build stopped, which is final."""
        if self._ended:
            raise ended_here(self.account)

    def _channel(self, program: Program, timeout: float, *, runs_command: bool = False) -> SshChannel:
        """Start ``ssh``; it ends when the hook is closed."""
        self._check_not_ended()
        channel = SshChannel(program.command, timeout, log=program.log, runs_command=runs_command)
        self._channels.append(channel)
        if self._ended:  # closed meanwhile, so that nobody would end this one
            channel.close()
            self._check_not_ended()
        return channel

    def _raise_why(self, channel: SshChannel, error: Exception, why: NoCommonAlgorithm | None) -> None:
        """Raise why a connection by ``ssh`` failed, unless asyncssh may succeed.

        :param why: asyncssh cannot connect, so that nothing else is left to try.
        """
        channel.close()
        self._check_not_ended()
        message = channel.messages() or str(error)
        self._raise_if_final(message, channel.stderr_messages())
        if why is None:
            return
        if any(words in message for words in _NO_ALGORITHM):
            raise why
        if "Host key verification failed" in message:
            raise wrong_host_key(self.account, message) from error
        raise ConnectionLost(f"{self.account.where}: {message}") from error

    def _raise_if_final(self, message: str, stderr: str) -> None:
        """Raise what asyncssh would raise as well, without a second failed login.

        :param message: of ``ssh`` itself; ``stderr``: of a proxy or the server.
        """
        account = self.account
        is_refused = any(words in message for words in _REFUSED)
        if is_refused and account.password is None:  # ssh cannot use a password
            raise refused(account, message)
        about_server = (*_NO_ALGORITHM, "Host key verification failed")  # the proxy has reached it
        if account.proxy is not None and not is_refused and not any(each in message for each in about_server):
            raise lost(account, stderr or message)
        if "connect to host" in message or "resolve hostname" in message:
            raise ConnectionLost(f"{account.where}: {message}")


class ProviderHook(_Connected, SFTPHook):
    """The backup account, over SFTP.

    It is also Airflow's :class:`SFTPHook`, whose methods go over paramiko. Backups use :meth:`reader`, which
    goes over::

        the program ssh         if there is one, and the round trip is short: it decrypts on another core
        asyncssh                otherwise: its window is large enough for a long round trip
        ssh all the same        if asyncssh and the server have no algorithm in common
    """

    def test_connection(self) -> tuple[bool, str]:
        """Check the host key, the account, the chroot and the index.

        It requests attributes only, since the account may not list directories.
        """
        try:
            reader = self.reader()
            found = [f"{self.account.where}: logged in, {self.account.known_by}, SFTP answers"]
            chrooted = _attributes(reader, _OUTSIDE) is None
            found.append("chrooted" if chrooted else f"NOT chrooted: it sees {_OUTSIDE}")
            missing = 0
            for name, index in self._indexes():
                there = _attributes(reader, index)
                missing += there is None
                found.append(f"{name}: the index {index} {'is NOT there yet' if there is None else 'exists'}")
        except BackupError as error:
            return False, str(error)
        return chrooted and not missing, "; ".join(found)

    def _indexes(self) -> list[tuple[str, str]]:
        """Return name and index of each provider that is configured with this connection."""
        configured = load(providers_file()).providers
        return [(each.name, each.index) for each in configured if each.sftp_conn_id == self.ssh_conn_id]

    def reader(
        self, throttle: Callable[[int], int | None] | None = None, round_trip: float | None = None
    ) -> Reader:
        """Return an SFTP reader on a new session.

        :param throttle: see :class:`.Reader`.
        :param round_trip: seconds, as measured by an earlier reader, to choose between ssh and asyncssh.
        :raises AccessRefused: the host key is not the expected one, or the login is refused.
        :raises NotOnProvider: the server has no such subsystem.
        :raises ConnectionLost: the connection broke, or the answer is not SFTP.
        """
        is_long = round_trip is not None and round_trip > LONG_ROUND_TRIP
        reader = (None if is_long else self._over_ssh()) or self._over_asyncssh()
        reader.stream.throttle = throttle  # not earlier: a throttled reader measures no round trip
        return reader

    def _over_asyncssh(self) -> Reader:
        try:
            session = self.connected().session(self.stall_timeout, subsystem=self.account.subsystem)
        except NoCommonAlgorithm as error:
            if reader := self._over_ssh(error):
                return reader
            raise
        try:
            return Reader(session, patience=self._patience)
        except ConnectionLost as error:
            raise self._no_sftp(error) from error

    def _over_ssh(self, why: NoCommonAlgorithm | None = None) -> Reader | None:
        """Return a reader over ``ssh``, or None if asyncssh is to be used, or to find out what is wrong.

        :param why: asyncssh cannot connect, so that ``ssh`` is used whatever the round trip.
        :raises AccessRefused: the server refuses the login.
        :raises ConnectionLost: it cannot be reached.
        """
        try:
            program = program_for(self.account)
            if program is None:
                return None
            with program:  # it has read its files before the server answers
                channel = self._channel(program, self.stall_timeout)
                reader = Reader(channel, patience=self._patience)
        except OSError as error:  # it does not start
            self.log.info("Connecting without the program ssh: %s", error)
            return None
        except ConnectionLost as error:
            self._check_not_ended()
            if channel.answered:
                channel.close()
                raise self._no_sftp(error) from error
            self._raise_why(channel, error, why)
            self.log.info("Connecting again, without the program ssh: %s", channel.messages() or error)
            return None
        if why is not None or reader.round_trip < LONG_ROUND_TRIP:
            return reader
        channel.close()
        self.log.info("Connecting again, without the program ssh: the round trip is long")
        return None

    def _no_sftp(self, error: ConnectionLost) -> BackupError:
        """Return the error for a server that accepts the login, but does not speak SFTP."""
        if isinstance(error, NotAnSftpServer) and b"mdbackup ready" in error.sent:
            return AccessRefused(
                f"{self.account.where} is the index account. Set the provider's sftp_conn_id to the"
                " connection of the backup account, and ssh_conn_id to this one"
            )
        return ConnectionLost(f"{self.account.where}: {error}")


def _attributes(reader: Reader, path: str) -> Attributes | None:
    """Return the attributes of a path; None if it is not visible."""
    reader.submit_stat(path.encode(), None)
    (answer,) = reader.wait()
    assert isinstance(answer, Stated)
    return answer.attributes


class IndexHook(_Connected, SSHHook):
    """The index account, which runs one command. It is also Airflow's :class:`SSHHook`."""

    _building: tuple[Session | SshChannel, Conversation] | None = None

    def test_connection(self) -> tuple[bool, str]:
        """Check the host key and the account. No index is built."""
        try:
            try:
                self.connected()
            except NoCommonAlgorithm as error:
                with self._over_ssh("exit", error) as channel:
                    channel.recv(1)
        except (BackupError, TimeoutError) as error:
            return False, str(error)
        return True, f"{self.account.where}: logged in, {self.account.known_by}"

    def build_index(self, request: IndexRequest) -> Done:
        """Let the provider build its index, and return its report.

        :raises NotOnProvider: the index could not be built; the old one is unchanged.
        :raises AccessRefused: the account does not run the indexer.
        :raises ConnectionLost: the connection broke. The build continues without us; the same request joins
            it.
        """
        conversation = Conversation(request, f"connection {self.ssh_conn_id}", self.log)
        while not conversation.is_over(self._converse(conversation)):
            pass
        return conversation.result()

    def _converse(self, conversation: Conversation) -> int | None:
        """Run the command of a conversation, and return its exit status; None if there is none."""
        try:
            with self.running(conversation.command) as session:
                self._building = session, conversation
                session.sendall(conversation.opening)
                for data in self._output(session, conversation):
                    if answer := conversation.receive(data):
                        session.sendall(answer)
                # Its output has ended, and the exit status follows at once if the server reports one.
                status = session.wait(CONNECT)
                alive = self._connection is not None and self._connection.alive
        except EOFError as error:
            raise ConnectionLost(f"{self.account.where}: the connection broke: {error}") from error
        finally:
            self._building = None
        if status is None and not session.was_killed and not alive:
            raise ConnectionLost(
                f"{self.account.where}: the connection broke while the provider was building its index"
            )
        return status

    @contextmanager
    def running(self, command: str) -> Iterator[Session | SshChannel]:
        """Run a command over asyncssh, or over ``ssh`` if asyncssh has no algorithm for the server.

        :raises AccessRefused, NotOnProvider, ConnectionLost: see :meth:`.Connection.session`.
        """
        session: Session | SshChannel
        with ExitStack() as stack:
            try:
                session = self.connected().session(_LISTEN, command=command)
            except NoCommonAlgorithm as error:
                session = stack.enter_context(self._over_ssh(command, error))
            try:
                yield session
            finally:
                session.close()
                session.wait(_ENDING)

    @contextmanager
    def _over_ssh(self, command: str, why: NoCommonAlgorithm) -> Iterator[SshChannel]:
        """Run a command over the program ``ssh``.

        :param why: why asyncssh cannot connect; raised if ``ssh`` cannot either.
        """
        with ExitStack() as stack:
            try:
                program = program_for(self.account, command)
                if program is None:
                    raise why
                self.log.info("Connecting by the program ssh: %s", why)
                stack.enter_context(program)
                channel = self._channel(program, _LISTEN, runs_command=True)
            except OSError as error:  # it does not start
                raise why from error
            stack.callback(channel.close)
            try:
                yield channel
            except EOFError as error:
                if not channel.answered:
                    self._raise_why(channel, error, why)
                raise

    def _output(self, session: Session | SshChannel, conversation: Conversation) -> Iterator[bytes]:
        """Yield the output of the command."""
        conversation.restart_timer()
        while True:
            session.settimeout(min(_LISTEN, conversation.seconds_left()))
            try:
                data = session.recv(65536)
            except TimeoutError:
                continue
            if not data:
                return
            yield data

    def stop_build(self) -> None:
        """Stop a running build, and end the connection. May be called from a signal handler."""

        def stop() -> None:
            with suppress(EOFError):
                # A build that has not received its request yet ends with the connection.
                if building is not None and building[1].started:
                    building[0].sendall(STOP)
                    building[0].wait(_STOPPING)

        building = self._building
        # In another thread, since the interrupted one may hold a lock.
        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        stopping.join(_STOPPING)
        self.close()
