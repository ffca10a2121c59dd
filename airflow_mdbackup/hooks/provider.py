"""The two accounts of a provider, reached through ordinary Airflow connections of type ``sftp`` and ``ssh``.

What such a connection may be is in :mod:`.connection`; all that a backup does goes over :mod:`.session`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import asyncssh
import paramiko
from airflow.providers.common.compat.connection import get_async_connection
from airflow.providers.sftp.hooks.sftp import SFTPHook
from airflow.providers.ssh.hooks.ssh import SSHHook, SSHHookAsync
from airflow.sdk import BaseHook
from airflow.sdk.exceptions import AirflowNotFoundException

from airflow_mdbackup.config.configuration import load
from airflow_mdbackup.config.settings import providers_file
from airflow_mdbackup.hooks.connection import CONNECT, SshAccount, account_of
from airflow_mdbackup.hooks.session import Connection, NoCommonAlgorithm, Session, connect, refused
from airflow_mdbackup.hooks.ssh_program import SshChannel, program_for
from airflow_mdbackup.provider_side import STOP, Done, IndexRequest
from airflow_mdbackup.provider_side.conversation import Conversation
from airflow_mdbackup.scheme.errors import AccessRefused, BackupError, ConnectionLost
from airflow_mdbackup.scheme.names import to_text
from airflow_mdbackup.scheme.sftp import PATIENCE, Attributes, Reader, Stated
from airflow_mdbackup.triggers.bounded import BoundedClient

_LONGEST = 4096  # characters of what asyncssh or paramiko logs
# Seconds of a round trip from which on asyncssh, whose window we choose, outruns ssh, whose window is 2 MiB.
_LONG = 0.03
_OUTSIDE = "/etc/passwd"  # what is in every machine, and in no chroot for backups
_SILENCES = 5  # stall timeouts in which more than a trickle must come
_LISTEN = 10.0  # seconds between two looks whether a silent connection is still alive
_STOPPING = 3.0  # seconds that a build gets to stop; Airflow kills a task after five
_ENDING = 10.0  # seconds that a server gets to end a session, where it may allow only one


class Printable(logging.Filter):
    """Keeps a server's own words, which paramiko and asyncssh log as they come, from acting on a terminal.

    Nor do they fill the log: a greeting may be of any size.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        said = record.getMessage()[:_LONGEST]
        record.msg, record.args = to_text(said.encode("utf-8", "backslashreplace")), ()
        return True


logging.getLogger("paramiko.transport").addFilter(Printable())
logging.getLogger("asyncssh").addFilter(Printable())
# A server may ask for XON/XOFF as often as it likes, and asyncssh logs it each time.
logging.getLogger("asyncssh").addFilter(lambda record: "XON/XOFF" not in str(record.msg))
logging.getLogger("asyncssh").setLevel(logging.WARNING)


def account(conn_id: str) -> SshAccount:
    """Return the account that an Airflow connection leads to.

    :raises AccessRefused: there is no such connection, or it is of no use as it is.
    """
    try:
        connection = BaseHook.get_connection(conn_id)
    except AirflowNotFoundException as error:
        raise no_such_connection(conn_id) from error
    return account_of(conn_id, connection)


def no_such_connection(conn_id: str) -> AccessRefused:
    return AccessRefused(
        f"the connection {conn_id} does not exist. Make it in the Airflow UI, or by: airflow connections add "
        f"{conn_id} ..."
    )


class IndexHookAsync(SSHHookAsync):
    """The index account, for triggers, whose event loop is everybody's."""

    def __init__(self, conn_id: str) -> None:
        super().__init__(ssh_conn_id=conn_id)

    async def _get_conn(self) -> asyncssh.SSHClientConnection:
        """Connect, so that the server can take neither the memory nor the turns of others.

        :raises AccessRefused, ConnectionLost: see :func:`.session.connect`.
        """
        try:
            connection = await get_async_connection(self.ssh_conn_id)
        except AirflowNotFoundException as error:
            raise no_such_connection(self.ssh_conn_id) from error
        return await connect(account_of(self.ssh_conn_id, connection), BoundedClient)


class _Connected:
    """What both hooks share: the account, and a connection to it. Context managers.

    :param conn_id: the Airflow connection.
    :param stall_timeout: seconds that a transfer may be silent.
    :raises AccessRefused: it is of no use.
    """

    ssh_conn_id: str | None

    def __init__(self, conn_id: str, *, stall_timeout: float = 60.0) -> None:
        self.ssh_conn_id = conn_id
        self.stall_timeout = stall_timeout
        self.account = account(conn_id)
        self._patience = max(PATIENCE, _SILENCES * stall_timeout)
        self._connection: Connection | None = None
        self._ended = False

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """End the connection for good, and what waits on it. May be called from another thread."""
        self._ended = True
        if self._connection is not None:
            self._connection.close()
        client: paramiko.SSHClient | None = getattr(self, "client", None)  # of Airflow's hook
        if client is not None:
            client.close()

    def connected(self) -> Connection:
        """Return the connection, which is made if there is none.

        :raises AccessRefused: the host key is not the expected one, or the account is refused.
        :raises ConnectionLost: the server cannot be reached, or the connection has been ended.
        """
        if self._connection is None or not self._connection.alive:
            self._connection = Connection(self.account)
        if self._ended:  # meanwhile, so that nobody would end this one
            self._connection.close()
            raise ConnectionLost(f"{self.account.where}: the connection was ended on this side")
        return self._connection

    def _raise_for(self, said: str) -> None:
        """Raise what another way would come to as well, without another failed login."""
        if "Permission denied" in said and self.account.password is None:  # which ssh cannot be told
            raise refused(self.account, said)
        no_way = ["connect to host", "resolve hostname", "proxy", "Proxy"]
        if self.account.options.proxy_command:  # which has ended, without a word of the server
            no_way.append("kex_exchange_identification")
        if any(words in said for words in no_way):
            raise ConnectionLost(f"{self.account.where}: {said}")


class ProviderHook(_Connected, SFTPHook):
    """The backup account, over SFTP.

    It is Airflow's :class:`SFTPHook`, too: what that offers goes over paramiko, as ever, and is made when it
    is asked for. Backups use :meth:`reader`, which goes::

        over the program ssh    if there is one, and the line is short: it decrypts on another core
        over asyncssh           else, or if ssh cannot: its window fills a long line
        over ssh all the same   if asyncssh and the server have no algorithm in common
    """

    def __init__(self, conn_id: str, *, stall_timeout: float = 60.0) -> None:
        super().__init__(conn_id, stall_timeout=stall_timeout)
        self._channels: list[SshChannel] = []

    def get_conn(self) -> paramiko.SFTPClient:  # type: ignore[override]
        """Return an SFTP client of paramiko's, as Airflow's hook does."""
        self._be_made()
        return super().get_conn()

    def get_managed_conn(self) -> Any:
        """Hold an SFTP client of paramiko's, as Airflow's hook does."""
        self._be_made()
        return super().get_managed_conn()

    def test_connection(self) -> tuple[bool, str]:
        """Tell whether host key, account, chroot and index are as they should be.

        It asks for attributes only, since the account may list nothing.
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
                found.append(f"{name}: the index {index} is {'NOT there yet' if there is None else 'there'}")
        except BackupError as error:
            return False, str(error)
        return chrooted and not missing, "; ".join(found)

    def _indexes(self) -> list[tuple[str, str]]:
        """Return provider and index, for each one that is configured with this connection."""
        configured = load(providers_file()).providers
        return [(each.name, each.index) for each in configured if each.sftp_conn_id == self.ssh_conn_id]

    def _be_made(self) -> None:
        """Have Airflow's hook read the connection, too, which it does in its own way."""
        if not hasattr(self, "remote_host"):
            SFTPHook.__init__(self, self.ssh_conn_id)

    def close(self) -> None:
        super().close()
        channels, self._channels = self._channels, []
        for channel in channels:
            channel.close()

    def reader(
        self, throttle: Callable[[int], int | None] | None = None, round_trip: float | None = None
    ) -> Reader:
        """Return an SFTP reader on a new session.

        :param throttle: as for a reader.
        :param round_trip: seconds, as an earlier reader found, so that a long line is known as such.
        :raises AccessRefused: the host key is not the expected one, or the account is refused.
        :raises NotOnProvider: the server has no such subsystem.
        :raises ConnectionLost: the connection broke, or what answers is no SFTP server.
        """
        is_long = round_trip is not None and round_trip > _LONG
        reader = (None if is_long else self._over_ssh(_LONG)) or self._over_asyncssh()
        reader.throttle = throttle  # not before, since what waits does not tell how long the line is
        return reader

    def _over_asyncssh(self) -> Reader:
        try:
            session = self.connected().session(self.stall_timeout, subsystem=self.account.subsystem)
        except NoCommonAlgorithm:
            if reader := self._over_ssh(float("inf")):
                return reader
            raise
        return Reader(session, patience=self._patience)

    def _over_ssh(self, longest: float) -> Reader | None:
        """Return a reader over ``ssh``, or None where asyncssh must do, or has to tell what is wrong.

        :param longest: seconds of a round trip, from which on asyncssh is faster.
        :raises AccessRefused: the server refuses the account.
        :raises ConnectionLost: it cannot be reached.
        """
        try:
            program = program_for(self.account)
            if program is None:
                return None
            with program:  # it has read its files before the server answers
                channel = SshChannel(program.command, self.stall_timeout)
                self._channels.append(channel)
                reader = Reader(channel, patience=self._patience)
        except OSError as error:  # it does not start
            self.log.info("Connecting without the program ssh: %s", error)
            return None
        except ConnectionLost as error:
            if channel not in self._channels:  # it was closed meanwhile, and is not wanted any more
                raise
            channel.close()
            said = channel.said() or str(error)
            self._raise_for(said)
            self.log.info("Connecting again, without the program ssh: %s", said)
            return None
        if reader.round_trip < longest:
            return reader
        channel.close()
        self.log.info("Connecting again, without the program ssh: the line is long")
        return None


def _attributes(reader: Reader, path: str) -> Attributes | None:
    """Return the attributes of a path; None if it cannot be seen."""
    reader.submit_stat(path.encode(), None)
    (answer,) = reader.wait()
    assert isinstance(answer, Stated)
    return answer.attributes


class IndexHook(_Connected, SSHHook):
    """The index account, which runs one command. It is Airflow's :class:`SSHHook`, too."""

    _building: tuple[Session | SshChannel, Conversation] | None = None

    def test_connection(self) -> tuple[bool, str]:
        """Tell whether host key and account are as they should be. Nothing is run."""
        try:
            self.connected()
        except BackupError as error:
            return False, str(error)
        return True, f"{self.account.where}: logged in, {self.account.known_by}"

    def get_conn(self) -> paramiko.SSHClient:
        """Return a client of paramiko's, as Airflow's hook does."""
        if not hasattr(self, "remote_host"):
            SSHHook.__init__(self, self.ssh_conn_id)
        return super().get_conn()

    def build_index(self, request: IndexRequest) -> Done:
        """Have the provider build its index, and return what it reports.

        :raises NotOnProvider: the index could not be built; the old one is still there.
        :raises AccessRefused: the account runs no indexer.
        :raises ConnectionLost: the connection broke. The build goes on without us, and the same request
            joins it.
        """
        conversation = Conversation(request, f"connection {self.ssh_conn_id}", self.log)
        while not conversation.ends(self._converse(conversation)):
            pass
        return conversation.result()

    def _converse(self, conversation: Conversation) -> int | None:
        """Run the command of a conversation to its end, and return its exit status, if the server tells."""
        try:
            with self.running(conversation.command) as session:
                self._building = session, conversation
                session.sendall(conversation.opening)
                for data in self._output(session, conversation):
                    if answer := conversation.hear(data):
                        session.sendall(answer)
                # Its output has ended; a server that then tells no status has none to tell.
                status = session.wait(CONNECT)
                alive = self._connection is not None and self._connection.alive
        except EOFError as error:
            raise ConnectionLost(f"the connection broke: {error}") from error
        finally:
            self._building = None
        if status is None and not session.was_killed and not alive:
            raise ConnectionLost("the connection broke while the provider was building its index")
        return status

    @contextmanager
    def running(self, command: str) -> Iterator[Session | SshChannel]:
        """Run a command: over asyncssh; over the program ``ssh`` where that has no algorithm for the server.

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

        :param why: asyncssh does not do; raised if ``ssh`` does not either.
        """
        program = program_for(self.account, command)
        if program is None:
            raise why
        self.log.info("Connecting by the program ssh: %s", why)
        with program:
            channel = SshChannel(program.command, _LISTEN, runs_command=True)
            try:
                yield channel
            except EOFError as error:
                if channel.answered:
                    raise
                self._raise_for(str(error))
                raise why from error

    def _output(self, session: Session | SshChannel, conversation: Conversation) -> Iterator[bytes]:
        """Yield what the other side writes, to its end."""
        conversation.listen()
        while True:
            session.settimeout(min(_LISTEN, conversation.patience()))
            try:
                data = session.recv(65536)
            except TimeoutError:
                continue
            if not data:
                return
            yield data

    def stop_build(self) -> None:
        """Have a running build stop, and end the connection. May be called from a signal's handler."""

        def stop() -> None:
            with suppress(EOFError):
                # What has not been given its request yet ends with the connection.
                if building is not None and building[1].begun:
                    building[0].sendall(STOP)
                    building[0].wait(_STOPPING)

        building = self._building
        # A thread of its own, because the interrupted one may be holding a lock.
        stopping = threading.Thread(target=stop, daemon=True)
        stopping.start()
        stopping.join(_STOPPING)
        self.close()
        if building is not None:
            building[0].close()
