"""Destinations that clash."""

from __future__ import annotations

import os

import pytest

from tests.unit.config.providers_file import MINIMAL, names


def clash(read, *dests: str | os.PathLike) -> tuple[list[str], dict[str, str]]:
    """Load a provider p0, p1, ... for each dest; return the valid names, and why the others are refused."""
    lines = [f"  p{n}: {{sftp_conn_id: c, source: /, dest: {dest}}}" for n, dest in enumerate(dests)]
    configuration = read("providers:\n" + "\n".join(lines))
    assert {problem.key for problem in configuration.problems} <= {"dest"}
    return names(configuration), {p.provider: p.message for p in configuration.problems}


def test_equal_destinations_refuse_both_and_each_names_the_other(read):
    """A backup of two providers into one tree is dangerous whichever of them runs."""
    valid, refused = clash(read, "/srv/a", "/srv/b", "/srv/a")
    assert valid == ["p1"]
    assert refused["p0"].startswith("`/srv/a` is the same as `dest` of provider `p2` (`/srv/a`, in ")
    assert refused["p2"].startswith("`/srv/a` is the same as `dest` of provider `p0` (`/srv/a`, in ")
    assert refused["p0"].endswith(": give each its own directory; until then neither is backed up")


@pytest.mark.parametrize("inner", ["/srv/a/b", "/srv/a/b/c"])
def test_a_destination_at_any_depth_inside_another_refuses_both(read, inner):
    """In whichever order they stand."""
    valid, refused = clash(read, inner, "/srv/ab", "/srv/a")
    assert valid == ["p1"]
    assert refused["p0"].startswith(f"`{inner}` is inside `dest` of provider `p2` (`/srv/a`, in ")
    assert refused["p2"].startswith(f"`/srv/a` is around `dest` of provider `p0` (`{inner}`, in ")


def test_destinations_that_only_share_a_beginning_do_not_clash(read):
    """`/srv/a` does not contain `/srv/ab`."""
    assert clash(read, "/srv/a", "/srv/ab", "/srv/a-b") == (["p0", "p1", "p2"], {})


def test_destinations_that_symbolic_links_make_one_refuse_both(read, tmp_path):
    """The message says that links are the reason, since the text does not show it."""
    (tmp_path / "real" / "inner").mkdir(parents=True)
    (tmp_path / "link").symlink_to("real")
    valid, refused = clash(read, tmp_path / "real", tmp_path / "link/inner/new", "/srv/c")
    assert valid == ["p2"]
    assert "is around `dest` of provider `p1`" in refused["p0"]
    assert f"is inside `dest` of provider `p0` (`{tmp_path}/real`" in refused["p1"]
    assert "seen through symbolic links" in refused["p1"]


def test_a_link_to_the_root_is_around_everything(read, tmp_path):
    """An absurd configuration is refused like any other."""
    (tmp_path / "all").symlink_to("/")
    assert clash(read, tmp_path / "all", "/srv/a")[0] == []


def test_a_provider_that_is_refused_anyway_clashes_with_nobody(read):
    """It does not run, so the other one may."""
    configuration = read(f"providers: {{web: {{{MINIMAL}}}, db: {{{MINIMAL}, shards: 0}}}}")
    assert names(configuration) == ["web"]
