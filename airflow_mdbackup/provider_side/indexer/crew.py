"""Processes, each running a hasher, which hash the batches while the walk continues."""

import collections
import contextlib
import marshal
import os
import select
import signal
import struct
import time
from typing import Any, Deque, Iterator, List, Optional, Tuple

from airflow_mdbackup.provider_side.indexer.batch import Batch, Big
from airflow_mdbackup.provider_side.indexer.common import Failure, as_failure, write_all
from airflow_mdbackup.provider_side.indexer.hasher import Answer, Hasher, Job
from airflow_mdbackup.provider_side.indexer.request import Request

KILL_SECONDS = 2.0


class Throttle:
    """Bytes per second of all processes together.

    The time of the next turn is kept in a pipe: the process that reads it has the turn, and writes it back
    with the time for its own bytes added.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._parent = os.getpid()  # of the workers; later it might be gone
        self.descriptors = os.pipe()
        os.write(self.descriptors[1], struct.pack(">d", 0))

    def take(self, count: int) -> None:
        """Wait until so many bytes may be read; end this process if its parent is gone."""
        (turn,) = struct.unpack(">d", os.read(self.descriptors[0], 8))
        now = time.monotonic()
        turn = max(turn, now - 1)  # after a pause, at most one second is caught up
        os.write(self.descriptors[1], struct.pack(">d", turn + count / self._limit))
        while turn > now:
            if os.getppid() != self._parent:
                os._exit(1)
            time.sleep(min(turn - now, 1))
            now = time.monotonic()


def read_message(descriptor: int) -> Any:
    """Read what `encoded` made; None at the end."""
    data = b""
    wanted = 4
    while len(data) < wanted:
        more = os.read(descriptor, wanted - len(data))
        if not more:
            return None
        data += more
        if len(data) == wanted == 4:
            wanted += int.from_bytes(data, "big")
    return marshal.loads(data[4:])  # noqa: S302  (of our own fork)


def encoded(message: Any) -> bytes:
    """Return a message behind its length, 4 bytes."""
    data = marshal.dumps(message)
    return len(data).to_bytes(4, "big") + data


def run_worker(root: int, jobs: int, results: int, throttle: Optional[Throttle]) -> None:
    """Hash jobs until there are no more or the parent is gone."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # the parent decides
    null = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    keep = {root, jobs, results, *(throttle.descriptors if throttle else ())}
    for name in os.listdir("/dev/fd") if os.path.isdir("/dev/fd") else range(3, 1024):
        if int(name) > 2 and int(name) not in keep:
            with contextlib.suppress(OSError):
                os.close(int(name))
    reported = time.monotonic()

    def on_block(size: int) -> None:
        # This also fails, and so ends the worker, once the parent is gone.
        nonlocal reported
        if time.monotonic() > reported + 1:
            reported = time.monotonic()
            write_all(results, encoded(size))

    hasher = Hasher(root, throttle.take if throttle else None, on_block)
    while True:
        job = read_message(jobs)
        if job is None:
            return
        write_all(results, encoded(tuple(hasher.run(Job(*job)))))


class Worker:
    """The parent's end of a worker."""

    def __init__(self, pid: int, jobs: int, results: int) -> None:
        self.pid = pid
        self.jobs = jobs
        self.results = results
        self.queue: Deque[Any] = collections.deque()  # batches or big files it has been sent, oldest first
        self.at = 0  # bytes read of its current file
        self._unsent = b""
        self._received = b""

    def send(self, data: bytes = b"") -> bool:
        """Send as much as the pipe accepts, and return whether that is all. It never blocks: no deadlock."""
        self._unsent += data
        with contextlib.suppress(BlockingIOError):
            self._unsent = self._unsent[os.write(self.jobs, self._unsent) :] if self._unsent else b""
        return not self._unsent

    @property
    def sending(self) -> bool:
        return bool(self._unsent)

    def receive(self) -> Iterator[Any]:
        """Yield the messages that have arrived."""
        data = os.read(self.results, 1 << 20)
        if not data:
            raise worker_lost()
        self._received += data
        while len(self._received) >= 4:
            length = 4 + int.from_bytes(self._received[:4], "big")
            if len(self._received) < length:
                return
            data, self._received = self._received[4:length], self._received[length:]
            yield marshal.loads(data)  # noqa: S302  (of our own fork)


def worker_lost() -> Failure:
    return Failure("a hashing process was killed, or ran out of memory")


class Crew:
    """The workers, started when there is something to hash."""

    def __init__(self, request: Request, root: int, cache_age: int) -> None:
        self._root = root
        self._size = request.jobs or available_cores()
        self._throttle = Throttle(request.limit) if request.limit else None
        self._cache_age = cache_age
        self._workers: List[Worker] = []
        self._poll = select.poll()
        self.batches: Deque[Batch] = collections.deque()
        self.big: Deque[Big] = collections.deque()

    def bytes_in_progress(self) -> int:
        """Return the bytes that were read of unfinished files."""
        return sum(worker.at for worker in self._workers)

    @property
    def busy(self) -> bool:
        return bool(self.big or self.batches or any(worker.queue for worker in self._workers))

    @property
    def has_room(self) -> bool:
        """Whether there are so few batches that workers may soon be idle."""
        return len(self.batches) < self._size

    def start(self) -> None:
        """Start the workers, unless they are running."""
        while len(self._workers) < self._size:
            jobs, results = os.pipe(), os.pipe()
            pid = os.fork()
            if not pid:
                try:
                    run_worker(self._root, jobs[0], results[1], self._throttle)
                except BrokenPipeError:
                    pass  # the parent is gone
                except Exception as error:
                    write_all(results[1], encoded(str(as_failure(error))))
                finally:
                    os._exit(1)
            os.close(jobs[0])
            os.close(results[1])
            os.set_blocking(jobs[1], False)
            worker = Worker(pid, jobs[1], results[0])
            self._workers.append(worker)
            self._poll.register(worker.results, select.POLLIN)

    def end(self) -> None:
        """Kill the workers."""
        for worker in self._workers:
            with contextlib.suppress(OSError):
                os.kill(worker.pid, signal.SIGKILL)
        # One that hangs in a read, of a dead disk or server, ends when the read does: do not wait for it.
        left = [worker.pid for worker in self._workers]
        deadline = time.monotonic() + KILL_SECONDS
        while left and time.monotonic() < deadline:
            with contextlib.suppress(OSError):
                left = [pid for pid in left if os.waitpid(pid, os.WNOHANG) == (0, 0)]
            if left:
                time.sleep(0.01)

    def pump(self, seconds: float) -> Iterator[Tuple[Any, Answer]]:
        """Send out work, wait at most so long for results, and yield them with the batch or big file."""
        for worker in self._workers:
            self._assign(worker)
        for descriptor, _ in self._poll.poll(seconds * 1000):
            for worker in self._workers:
                if descriptor == worker.jobs:
                    self._send(worker)
                elif descriptor == worker.results:
                    for message in worker.receive():
                        if isinstance(message, int):
                            worker.at = message
                        elif isinstance(message, str):
                            raise Failure(message)
                        else:
                            worker.at = 0
                            yield worker.queue.popleft(), Answer(*message)
                    self._assign(worker)

    def _assign(self, worker: Worker) -> None:
        """Give a worker more to do: one batch may wait behind another, nothing behind a big file."""
        if worker.sending:
            return
        if self.big:
            if not worker.queue:
                self._send_job(worker, self.big.popleft())
            return
        while self.batches and len(worker.queue) < 2 and not any(isinstance(at, Big) for at in worker.queue):
            self._send_job(worker, self.batches.popleft())

    def _send_job(self, worker: Worker, work: Any) -> None:
        worker.queue.append(work)
        job = Job(work.names, work.known, isinstance(work, Big), work.joined, self._cache_age)
        self._send(worker, encoded(tuple(job)))

    def _send(self, worker: Worker, data: bytes = b"") -> None:
        try:
            sent = worker.send(data)
        except BrokenPipeError:
            raise worker_lost() from None
        if sent:
            with contextlib.suppress(KeyError):
                self._poll.unregister(worker.jobs)
        else:
            self._poll.register(worker.jobs, select.POLLOUT)


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1
