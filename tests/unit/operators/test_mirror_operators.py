"""The operators that work on a backup that is there: one verifies it, one restores from it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import structlog.testing
from airflow.sdk.exceptions import AirflowFailException, AirflowSkipException

from airflow_mdbackup.alerts.message import describe_error
from airflow_mdbackup.assets import LAST_GOOD, provider_asset
from airflow_mdbackup.operators import RestoreFiles, VerifyMirror
from airflow_mdbackup.scheme.errors import DestinationRefused
from airflow_mdbackup.scheme.history.changes import commits
from airflow_mdbackup.scheme.history.forget import forget
from airflow_mdbackup.scheme.recovery.rebuild_history import rebuild
from airflow_mdbackup.scheme.recovery.restore_target import resolve_target
from tests.pair import Pair
from tests.unit.recovery.damage import rot
from tests.unit.recovery.somebody import two_runs


class Log:
    """What operators have logged, as people read it."""

    def __init__(self, events: Any) -> None:
        self._events = events

    @property
    def text(self) -> str:
        return "\n".join(each["event"] % each.get("positional_args", ()) for each in self._events)


@pytest.fixture
def log() -> Iterator[Log]:
    with structlog.testing.capture_logs() as events:
        yield Log(events)


class Task:
    """What our operators use of a task instance."""

    def __init__(self) -> None:
        self.pushed: dict[str, Any] = {}

    def xcom_push(self, key: str, value: Any) -> None:
        self.pushed[key] = value


def execute(operator: Any, task: Task | None = None, *, good: bool = False, **params: Any) -> Any:
    """Execute an operator as a run with these parameters does.

    :param good: whether Airflow knows of a good backup.
    """
    run = SimpleNamespace(run_id="r1", run_after=datetime(2026, 11, 28, 12, tzinfo=UTC), conf=params)
    store = {provider_asset("srv1"): {LAST_GOOD: {"at": "..."}} if good else {}}
    context = {"run_id": "r1", "ti": task or Task(), "dag_run": run, "params": params}
    return operator.execute(context | {"asset_state_store": store})


def verifier(pair: Pair, **options: Any) -> VerifyMirror:
    return VerifyMirror(
        task_id="verify_mirror",
        provider="srv1",
        dest=str(pair.mirror.dest),
        inlets=[provider_asset("srv1")],
        **{"part": "all", **options},
    )


# --- verify -----------------------------------------------------------------------------------------


def test_verification_of_a_sound_backup_goes_through_it_part_by_part(pair: Pair, log: Log) -> None:
    """Returns plain counts; a part goes on where the last one ended, by hand also with another size."""
    two_runs(pair)
    whole = execute(verifier(pair))
    assert (whole["sound"], whole["repaired"], whole["rotten"]) == (9, 0, 0)
    found = [execute(verifier(pair, part="1/3", limit="50MB"))["sound"]]
    while "last part" not in log.text and len(found) < 9:
        found.append(execute(verifier(pair), part="10KB" if len(found) > 1 else "1/3")["sound"])
    assert sum(found) == 9 and len(found) > 1


def test_damage_fails_the_task_for_good_and_says_where_and_what_to_do(pair: Pair, log: Log) -> None:
    """The counts are there all the same, and the alert knows what kind of failure it is."""
    for number in range(12):
        pair.put(f"many/{number}", b"%d" % number)
    pair.put(b"odd\n::endgroup::", b"odd")
    pair.backup()
    for number in range(11):
        rot(pair.live(f"many/{number}"))
    pair.live(b"odd\n::endgroup::").unlink()
    task = Task()
    with pytest.raises(AirflowFailException) as failed:
        execute(verifier(pair), task)
    told = str(failed.value)
    assert told.startswith(f"srv1: damage in {pair.mirror.files}: ") and "and 2 more" in told
    assert told.count("\n- rotten: ") == 10 and "mdbackup verify srv1 PATH --repair" in told
    assert "1 missing" in told and "11 rotten" in told and "\x1b" not in told
    assert task.pushed["return_value"]["rotten"] == 11 and len(task.pushed["return_value"]["damage"]) == 10
    assert describe_error(failed.value)[0] == "files of the backup are damaged"
    assert log.text.count("rotten: /") == 11
    assert "odd\\x0a:\\x3aendgroup::" in log.text and "\x1b" not in log.text
    with pytest.raises(AirflowFailException, match="nothing was ever backed up under /nowhere"):
        execute(verifier(pair), paths=["/nowhere"])


def test_log_tells_how_far_it_is_and_no_more_than_so_much_damage(
    pair: Pair, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also within one large file; a disk that is gone does not fill the one with the logs."""
    monkeypatch.setattr("airflow_mdbackup.operators.verify_mirror._MAX_LOGGED", 2)
    monkeypatch.setattr("airflow_mdbackup.scheme.recovery.verify.ReportTimer.due", lambda pace: True)
    pair.put("large", bytes(3 << 20))
    two_runs(pair)
    for name in ("same", "changed", "new", "twin"):
        pair.live(name).unlink()
    with pytest.raises(AirflowFailException, match="4 missing"):
        execute(verifier(pair))
    assert log.text.count("missing: /") == 2 and "and 2 more" in log.text
    assert "0 files, 1.0 MB read so far" in log.text and "0 files, 3.1 MB read so far" in log.text


def test_repair_is_done_by_configuration_or_by_the_form_and_told(pair: Pair) -> None:
    """What was repaired is damage all the same: a disk lost bits."""
    two_runs(pair)
    rot(pair.live("same"))
    pair.live("twin").unlink()
    with pytest.raises(AirflowFailException, match="mdbackup verify srv1 PATH --repair"):
        execute(verifier(pair))
    with pytest.raises(AirflowFailException, match="airflow dags trigger mdbackup_srv1 --conf"):
        execute(verifier(pair, repair=True), repair=True, missing=False)
    assert pair.index_a().keys() - pair.index_b().keys() == {pair.path("same")}
    with pytest.raises(AirflowFailException, match="wait for the next backup"):
        execute(verifier(pair, repair=True))
    with pytest.raises(AirflowFailException, match="1 entry has left the index"):
        execute(verifier(pair), repair=True, missing=True, paths=["twin"])
    assert pair.path("twin") not in pair.index_b()
    pair.backup()
    assert execute(verifier(pair))["sound"] == 10


def test_repair_that_has_to_wait_for_too_long_still_tells_of_the_damage(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("airflow_mdbackup.operators.verify_mirror.LOCK_WAIT", 0.0)
    two_runs(pair)
    rot(pair.live("same"))
    with pair.mirror.lock("a run"), pytest.raises(AirflowFailException) as failed:
        execute(verifier(pair, repair=True, part="1/1"))
    assert "rotten: " in str(failed.value) and "Nothing was repaired: srv1: " in str(failed.value)
    assert not pair.mirror.verified.exists()


def test_backup_that_is_not_there_yet_is_no_damage_but_one_that_is_gone_is(pair: Pair) -> None:
    """As when its disk is not mounted; and a directory of somebody else's is refused."""
    with pytest.raises(AirflowSkipException, match="there is no backup in"):
        execute(verifier(pair))
    with pytest.raises(DestinationRefused, match="not mounted"):
        execute(verifier(pair), good=True)
    pair.mirror.claim()
    with pytest.raises(AirflowSkipException, match="there is no backup yet"):
        execute(verifier(pair))
    operator = verifier(pair)
    operator.provider = "other"
    with pytest.raises(DestinationRefused, match="belongs to the provider"):
        execute(operator)


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"part": "2/1"}, "at most all"),
        ({"missing": True}, "only together with corrupted ones: add `repair`"),
        ({"paths": [""]}, "a path is empty"),
        ({"path": ["/x"]}, "did you mean paths"),
        ({"repairs": True}, "did you mean repair"),
    ],
)
def test_verification_refuses_what_it_cannot_do(pair: Pair, params: dict[str, Any], said: str) -> None:
    two_runs(pair)
    with pytest.raises(AirflowFailException, match=said):
        execute(verifier(pair), **params)


def test_verification_fails_where_history_or_index_is_lost_until_it_is_rebuilt(pair: Pair) -> None:
    """What no history tells of is not read, so that nobody may take it for sound."""
    two_runs(pair)
    for path in commits(pair.mirror):
        path.unlink()
    with pytest.raises(AirflowFailException, match=r"no history at all.*\n.*mdbackup rebuild srv1"):
        execute(verifier(pair, part="1/30"))
    rebuild(pair.mirror)
    assert execute(verifier(pair))["sound"] == 9
    prune_nothing = pair.mirror.history_path(pair.mirror.next_stamp(), "spoilt")
    prune_nothing.write_bytes(b"spoilt")
    with pytest.raises(AirflowFailException, match="is damaged"):
        execute(verifier(pair))
    rebuild(pair.mirror)
    assert execute(verifier(pair))["sound"] == 9
    for path in (*commits(pair.mirror), pair.mirror.index):
        path.unlink()
    with pytest.raises(AirflowFailException, match="neither history nor index"):
        execute(verifier(pair), good=True)


# --- restore ----------------------------------------------------------------------------------------


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = tmp_path / "restored"
    base.mkdir()
    monkeypatch.setenv("AIRFLOW__MDBACKUP__RESTORE_BELOW", str(base))
    return base


def restorer(pair: Pair, **options: Any) -> RestoreFiles:
    return RestoreFiles(task_id="restore_files", provider="srv1", dest=str(pair.mirror.dest), **options)


def test_restore_writes_below_the_base_what_the_form_asks_for(pair: Pair, base: Path) -> None:
    """Into a directory of the run's own, or one that is named; as of then, and with what was gone."""
    first, _ = two_runs(pair)
    found = execute(restorer(pair))
    own = base / "srv1" / "20261128T120000.000000Z"
    assert found["target"] == str(own) and found["restored"] == 6
    assert Path(f"{own}{pair.a}/changed").read_bytes() == b"newer"
    then = f"{first[:4]}-{first[4:6]}-{first[6:8]}T{first[9:11]}:{first[11:13]}:{first[13:22]}Z"
    found = execute(restorer(pair), as_of=then, target="then/here", paths=["changed"])
    assert found["restored"] == 1 and Path(f"{base}/then/here{pair.a}/changed").read_bytes() == b"changed"
    gone = execute(restorer(pair), include_gone=True, target=f"{base}/gone", paths=["gone", "same"])
    assert gone["restored"] == 2
    again = execute(restorer(pair), target=f"{base}/gone", paths=["same"], as_of="", dry_run=True)
    assert again["there"] == 1


def test_restore_says_what_a_person_has_taken_out_of_the_index(pair: Pair, base: Path, log: Log) -> None:
    two_runs(pair)
    forget(pair.mirror, lambda path: path in (pair.path("same"), pair.path("new")))
    assert execute(restorer(pair), target="t")["restored"] == 4
    assert "2 files excluded" in log.text and "include_gone includes" in log.text


def test_dry_run_makes_nothing_and_tells_what_would_come(pair: Pair, base: Path, log: Log) -> None:
    two_runs(pair)
    assert execute(restorer(pair), dry_run=True)["restored"] == 6
    assert list(base.iterdir()) == [] and log.text.count("would restore: /") == 6


def test_what_does_not_come_back_fails_the_task_for_good_and_is_named(pair: Pair, base: Path) -> None:
    """Lost, in the way, or never there; the rest is there, and the counts are."""
    two_runs(pair)
    pair.live("new").unlink()
    Path(f"{base}/t{pair.a}").mkdir(parents=True)
    Path(f"{base}/t{pair.a}/same").write_bytes(b"in the way")
    task = Task()
    with pytest.raises(AirflowFailException) as failed:
        execute(restorer(pair), task, target="t", paths=["*", "/nowhere"])
    told = str(failed.value)
    assert f"lost: {os.fsdecode(pair.path('new'))}: " in told and "kept: " in told
    assert "Nothing was ever backed up under '/nowhere'" in told
    counts = task.pushed["return_value"]
    assert (counts["lost"], counts["kept"], counts["restored"]) == (1, 1, 4)
    assert Path(f"{base}/t{pair.a}/same").read_bytes() == b"in the way"
    assert execute(restorer(pair), target="t", paths=["same"], overwrite=True)["restored"] == 1
    assert Path(f"{base}/t{pair.a}/same").read_bytes() == b"same"


@pytest.mark.parametrize(
    ("params", "said"),
    [
        ({"as_of": "sometime"}, "is not a time I understand"),
        ({"as_of": "2001-01-01"}, "the first backup is newer than"),
        ({"path": ["/x"]}, "did you mean paths"),
        ({"targets": "x"}, "did you mean target"),
    ],
)
def test_restore_refuses_what_it_cannot_do(pair: Pair, base: Path, params: dict[str, Any], said: str) -> None:
    two_runs(pair)
    with pytest.raises(AirflowFailException, match=said):
        execute(restorer(pair), **params)


def test_without_the_option_nothing_is_restored_and_it_says_what_to_set(pair: Pair) -> None:
    two_runs(pair)
    with pytest.raises(AirflowFailException, match="AIRFLOW__MDBACKUP__RESTORE_BELOW"):
        execute(restorer(pair), target="/tmp/x")


def test_nothing_is_written_outside_of_the_base_nor_into_a_backup_or_the_dags(
    pair: Pair, base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever may start the DAG could else put what the provider has where it is run."""
    two_runs(pair)
    dags, other = base / "dags", base / "other backup"
    dags.mkdir()
    (other / ".mdbackup").mkdir(parents=True)
    (other / ".mdbackup" / "provider-id").write_text("{}")
    monkeypatch.setenv("AIRFLOW__CORE__DAGS_FOLDER", str(dags))
    outside = base.parent / "outside"
    outside.mkdir()
    (base / "link").symlink_to(outside)
    (base / "inner").symlink_to(base / "elsewhere")
    (base / "file").touch()
    refused = [
        *(str(outside), "/", "..", "../outside", "x/../../outside", str(base), f"{base}/../outside", "."),
        *("link", "link/x", "inner", "file", "file/x", f"{base}x", "a\0b"),
        *("dags", "dags/x", f"{other}/files", str(other), str(base.parent / "b"), "listed/x"),
    ]
    before = sorted(base.parent.rglob("*"))
    for target in refused:
        with pytest.raises(DestinationRefused):
            execute(restorer(pair, keep_out=[f"{base}/listed/x/y"]), target=target)
    assert sorted(base.parent.rglob("*")) == before


def test_base_may_be_a_symlink_and_must_be_a_directory(tmp_path: Path) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    link.symlink_to(real)
    for target in ("a/b", f"{link}/a/b", f"{real}/a/b"):
        assert resolve_target(link, target) == real / "a" / "b"
    assert (real / "a" / "b").stat().st_mode & 0o777 == 0o700
    for base in (tmp_path / "missing", Path("relative")):
        with pytest.raises(DestinationRefused, match="absolute path of an existing directory"):
            resolve_target(base, "a")
    assert resolve_target(real, "not made", make=False) == real / "not made"
    assert not (real / "not made").exists()


@pytest.mark.parametrize("target", ["a\nb", "\x1b[31m", "\udcff", "\u202e"])
def test_target_that_cannot_be_printed_is_refused(pair: Pair, base: Path, log: Log, target: str) -> None:
    """It would be in the log, in messages and in XCom."""
    two_runs(pair)
    with pytest.raises(DestinationRefused, match="cannot be printed") as refused:
        execute(restorer(pair), target=target)
    assert target not in str(refused.value) and not list(base.iterdir())
