"""Random runs, kills, disk errors, prunings and hands on B; after each step the backup must be sound."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

import airflow_mdbackup.scheme.backup.cleanup as clean_module
from airflow_mdbackup.scheme.backup.cleanup import clean
from airflow_mdbackup.scheme.backup.plan import PlanItem, read_plan
from airflow_mdbackup.scheme.backup.results import results
from airflow_mdbackup.scheme.errors import IndexRefused
from airflow_mdbackup.scheme.files.jsonl import read_records
from airflow_mdbackup.scheme.history.changes import commits, pending
from airflow_mdbackup.scheme.history.journal import recover
from airflow_mdbackup.scheme.history.outcomes import Outcome
from airflow_mdbackup.scheme.index.canonical import IndexWriter, read_entries
from airflow_mdbackup.scheme.recovery.prune import KeepRules, pruning
from airflow_mdbackup.scheme.recovery.selection import Selection
from airflow_mdbackup.scheme.store.run import Run
from tests.guarantees.crash.crash import crash_at
from tests.guarantees.whatever_happens.soundness import check_sound, contents_of, digest, files_of
from tests.pair import Pair
from tests.torture import scaled

SEEDS = scaled(60, 2000)
# So that files and directories take each other's place, and sort around one another.
NAMES = ("a", "b", "d", "d-", "d/a", "d/a/x", "d/b", "e/a")
CONTENTS = (b"", b"one", b"two", b"six")
FETCH, DIFF, PULL, ARCHIVE, COMMIT, FINISHED = range(6)


class Begun:
    """A run and the step that comes next. ``alone`` as long as nothing else has touched what it planned."""

    def __init__(self, run: Run, shards: int) -> None:
        self.run = run
        self.shards = shards
        self.step = FETCH
        self.alone = True


class Model:
    """What may happen to a pair, and what must hold after it."""

    def __init__(self, folder: Path, chance: random.Random) -> None:
        self.pair = Pair(folder)
        self.chance = chance
        self.runs: list[Begun] = []
        self.by_hand: set[bytes] = set()  # live files that somebody deleted or edited on B
        self.edited = 0  # from how many commits on history tells of all that hands did to the index
        self.told: list[str] = []

    def start(self) -> None:
        """Do a first backup of some files."""
        for name in self.chance.sample(NAMES, 5):
            self.put(name, self.chance.choice(CONTENTS))
        self.told.append("backup")
        self.pair.backup()

    # --- what happens -------------------------------------------------------------------------------

    def happen(self) -> None:
        """Let something happen, and check."""
        name, content = self.chance.choice(NAMES), self.chance.choice(CONTENTS)
        step, number = self.chance.choice((PULL, ARCHIVE, COMMIT, COMMIT)), self.chance.randint(1, 50)
        events: dict[Callable[[], None], int] = {
            lambda: self.put(name, content): 7,
            lambda: self.remove(name): 3,
            lambda: self.begin(self.chance.randint(1, 3)): 5,
            lambda: self.step(self.chance.choice((DIFF, ARCHIVE, COMMIT, FINISHED))): 5,
            lambda: self.kill(step, number): 4,
            lambda: self.clear(self.chance.choice((FETCH, DIFF, PULL, ARCHIVE, COMMIT))): 2,
            lambda: self.fail(self.chance.choice(("replace", "replace", "link", "open")), name): 4,
            lambda: self.delete_by_hand(name): 1,
            lambda: self.edit_by_hand(name, content): 1,
            lambda: self.hand_on_index(self.chance.choice(("drop", "restore", "delete"))): 2,
            lambda: self.limited(self.chance.choice(NAMES)): 1,
            lambda: self.excluding(self.chance.choice(("a", "x", "d", "b"))): 1,
            lambda: self.lose(content): 1,
            lambda: self.clean(): 1,
            lambda: self.prune(
                KeepRules(last=self.chance.choice((0, 1))), self.chance.choice((0, number))
            ): 1,
        }
        before = contents_of(self.pair)
        self.chance.choices(list(events), list(events.values()))[0]()
        if not self.told[-1].startswith(("by hand", "prune")):
            assert before <= contents_of(self.pair), "bytes are lost"
        self.check()

    def put(self, name: str, content: bytes) -> None:
        self.told.append(f"put {name} {content!r}")
        above = self.pair.a
        for part in Path(name).parts:
            above /= part
            if above.is_file():
                above.unlink()
        shutil.rmtree(above, ignore_errors=True)
        self.pair.put(name, content)

    def remove(self, name: str) -> None:
        self.told.append(f"remove {name}")
        path = self.pair.a / name
        if path.is_file():
            path.unlink()
        shutil.rmtree(path, ignore_errors=True)

    def begin(self, shards: int) -> None:
        self.told.append(f"begin, {shards} shards")
        self.runs.append(Begun(self.pair.new_run(), shards))

    def pick(self) -> Begun:
        """Return one of the last runs."""
        if not self.runs:
            self.begin(1)
        begun = self.chance.choice([*self.runs[-3:], self.runs[-1]])
        self.told.append(begun.run.run_id)
        return begun

    def act(self, begun: Begun) -> None:
        run, pair = begun.run, self.pair
        if begun.step == FETCH:
            pair.build_index()
            pair.fetch(run)
        elif begun.step == DIFF:
            pair.diff(run, shards=begun.shards, allow_empty=True)
            begun.alone = True
        elif begun.step == PULL:
            pair.pull(run, read_plan(run))
        elif begun.step == ARCHIVE:
            pair.archive(run)
        elif begun.step == COMMIT:
            summary = pair.commit(run)
            if begun.alone and not summary.failed and not summary.superseded:
                self.check_green(run)

    def forward(self, begun: Begun, step: int) -> None:
        while begun.step < step:
            self.act(begun)
            self.done(begun)

    def done(self, begun: Begun) -> None:
        if begun.step == COMMIT:
            self.not_alone(begun)
        begun.step += 1

    def not_alone(self, begun: Begun | None) -> None:
        for other in self.runs:
            other.alone = other.alone and other is begun

    def step(self, step: int) -> None:
        begun = self.pick()
        self.told.append(f"forward to {step}")
        self.forward(begun, step)

    def kill(self, step: int, number: int) -> None:
        begun = self.pick()
        self.told.append(f"killed in {step} at its {number}")
        self.forward(begun, step)
        if begun.step < FINISHED and not crash_at(number, lambda: self.act(begun)):
            self.act(begun)  # it came to its end, and is done once more
            self.done(begun)
        elif begun.step == COMMIT:
            self.not_alone(begun)

    def clear(self, step: int) -> None:
        begun = self.pick()
        self.told.append(f"clear from {step}")
        begun.step = min(begun.step, step)

    def fail(self, function: str, name: str) -> None:
        """Have archive and commit be refused one name."""
        begun = self.pick()
        self.told.append(f"os.{function} fails for {name}")
        self.forward(begun, ARCHIVE)
        real = getattr(os, function)

        def faulty(*arguments: Any, **options: Any) -> Any:
            if os.fsencode(Path(name).name) in arguments:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            return real(*arguments, **options)

        setattr(os, function, faulty)
        try:
            self.forward(begun, FINISHED)
        finally:
            setattr(os, function, real)

    def delete_by_hand(self, name: str) -> None:
        self.told.append(f"by hand: delete {name}")
        if self.pair.live(name).is_file():
            self.pair.live(name).unlink()
            self.by_hand.add(self.pair.path(name))

    def edit_by_hand(self, name: str, content: bytes) -> None:
        self.told.append(f"by hand: edit {name} {content!r}")
        if self.pair.live(name).is_file():
            edited = self.pair.mirror.dest / "edited"
            edited.write_bytes(content)
            edited.replace(self.pair.live(name))
            self.by_hand.add(self.pair.path(name))
            self.not_alone(None)

    def hand_on_index(self, how: str) -> None:
        """Edit, restore or delete the consumer index, maybe while a commit is cut off."""
        mirror = self.pair.mirror
        cut_off = pending(mirror) if mirror.history.exists() else []
        self.told.append(f"by hand: {how} the index")
        if not mirror.index.exists() or any(path.with_suffix("").exists() for path in cut_off):
            return  # in the second case the copy of the index is that of the commit before
        if how == "delete":
            mirror.index.unlink()
        elif how == "restore":
            shutil.copyfile(mirror.committed, mirror.index)
        else:
            kept = [entry for entry in read_entries(mirror.index) if self.chance.random() < 0.5]
            with IndexWriter(mirror.dest / "edited.md5") as writer:
                for entry in kept:
                    writer.add(*entry)
            (mirror.dest / "edited.md5").replace(mirror.index)
        self.edited = len(commits(mirror)) + len(cut_off) + 1
        self.not_alone(None)
        if cut_off and how == "restore":
            # What it replaces is claimed until it is finished.
            with mirror.lock("test"):
                recover(mirror, mirror.dest / ".mdbackup" / "consumer.md5")

    def limited(self, name: str) -> None:
        self.told.append(f"a run limited to {name}")
        with suppress(IndexRefused):  # neither index has it
            self.pair.backup(allow_empty=True, only=[self.pair.path(name)])
            self.not_alone(None)

    def excluding(self, name: str) -> None:
        self.told.append(f"a run without {name}")
        self.pair.backup(allow_empty=True, exclude=[name])
        self.not_alone(None)

    def lose(self, content: bytes) -> None:
        self.told.append(f"lose {content!r} in staging")
        self.pair.staged(digest(content)).unlink(missing_ok=True)

    def clean(self) -> None:
        self.told.append("clean")
        if not self.pair.mirror.history.exists():
            return
        mirror = self.pair.mirror
        with pytest.MonkeyPatch.context() as patch, mirror.lock("test"), mirror.tree() as tree:
            patch.setattr(clean_module, "_MAX_RUNS", 0)
            patch.setattr(clean_module, "_MAX_AGE", -1.0)
            clean(mirror, tree)
        self.runs = [begun for begun in self.runs if begun.step == FETCH or begun.run.folder.exists()]

    def prune(self, rules: KeepRules, number: int) -> None:
        self.told.append(f"prune {rules}, killed at its {number}")
        mirror = self.pair.mirror
        if self.edited > len(commits(mirror)):
            return  # history tells of what hands did when the next run is committed, and of this before

        def act() -> None:
            with pruning(mirror, Selection(), rules, carry_out=True) as (_, versions):
                assert all(b"/.old/" in version.place for version in versions)

        if not number or not crash_at(number, act):
            act()
        self.not_alone(None)

    # --- what must hold -----------------------------------------------------------------------------

    def check(self) -> None:
        files = files_of(self.pair)
        index = self.pair.index_b() if self.pair.mirror.index.exists() else {}
        for path in [path for path in self.by_hand if path in files and path in index]:
            if digest(files[path].content) == index[path]:
                self.by_hand.discard(path)
        check_sound(self.pair, self.by_hand, edited=len(self.pair.history()) < self.edited)

    def check_green(self, run: Run) -> None:
        plan, index = read_plan(run), self.pair.index_b()
        excused = {r.path for r in results(run, plan) if r.outcome in (Outcome.CHANGED, Outcome.VANISHED)}
        for shard in range(len(plan.shards)):
            for item in read_records(run.pulls(shard), PlanItem):
                done = item.path in excused or index.get(item.path) == item.md5
                assert done, f"the run is green, but {item.path!r} is not backed up"

    def end(self) -> None:
        """The next run must bring everything, and the one after it nothing."""
        self.told.append("end")
        summary = self.pair.backup(allow_empty=True)
        assert not summary.failed and not summary.superseded, summary
        assert self.pair.index_b() == self.pair.index_a()
        self.check()
        changes = len(self.pair.history())
        self.pair.backup(allow_empty=True)
        assert len(self.pair.history()) == changes and not self.pair.transferred


def test_whatever_happens_the_backup_stays_sound(tmp_path: Path) -> None:
    """No bytes are lost, the index claims what is there, history leads to it, and green is backed up."""
    for seed in range(SEEDS):
        folder = tmp_path / str(seed)
        folder.mkdir()
        chance = random.Random(seed)
        model = Model(folder, chance)
        try:
            model.start()
            for _ in range(chance.randint(5, 20)):
                model.happen()
            model.end()
        except Exception as error:
            error.add_note(f"seed {seed}: {'; '.join(model.told)}")
            raise
        finally:
            for server in model.pair.servers:
                server.stop()
        shutil.rmtree(folder)
