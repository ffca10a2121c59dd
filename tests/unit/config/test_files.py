"""Files and directories of providers: one fault stops no other provider, and all are told."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from airflow_mdbackup.config import Configuration, ConfigurationError, Provider, load, raise_for_problems
from tests.unit.config.providers_file import MINIMAL, names, one

# One fault stops no other provider


def test_an_invalid_provider_stops_no_other_one(read):
    """The good ones keep their order."""
    configuration = read(f"""
providers:
  a: {{sftp_conn_id: c, source: /, dest: /srv/a}}
  b: {{{MINIMAL}, shards: none}}
  c: [nonsense]
  d: {{sftp_conn_id: c, source: /, dest: /srv/d}}
""")
    assert names(configuration) == ["a", "d"]
    assert list(configuration.refused) == ["b", "c"]


def test_a_provider_given_twice_in_a_file_is_refused_with_both_lines(read):
    """YAML itself would silently keep the last."""
    configuration = read(f"""\
providers:
  web: {{{MINIMAL}}}
  db: {{sftp_conn_id: c, source: /, dest: /srv/db}}
  "web": {{sftp_conn_id: c, source: /, dest: /srv/other}}
""")
    assert names(configuration) == ["db"]
    (problem,) = configuration.problems
    assert (problem.provider, problem.key) == ("web", None)
    assert problem.message == "is given twice, on lines 2 and 4: remove or rename one of them"


def test_a_key_given_twice_refuses_its_provider_only(read):
    """Also inside `guard`."""
    configuration = read("""\
providers:
  web:
    sftp_conn_id: c
    source: /
    dest: /srv/web
    dest: /srv/other
    guard: {above: 1, above: 2}
  db: {sftp_conn_id: c, source: /, dest: /srv/db}
""")
    assert names(configuration) == ["db"]
    assert [(problem.provider, problem.key) for problem in configuration.problems] == [
        ("web", "dest"),
        ("web", "guard.above"),
    ]
    assert "on lines 5 and 6" in configuration.problems[0].message


@pytest.mark.parametrize(
    ("top", "key", "said"),
    [
        ("defaults: {retires: 1}", "defaults.retires", "is not a key; did you mean `retries`?"),
        ("defaults: {retries: many}", "defaults.retries", "must be a whole number, but is the text 'many'"),
        ("defaults: {guard: {share: 7}}", "defaults.guard.share", "is not a valid percentage"),
        ("defaults: {1: 2}", "defaults", "a key must be text, but YAML reads the number 1"),
        ("defaults: {name: x}", "defaults.name", "is not a key"),
        ("defaults: {retries: 1, retries: 2}", "defaults.retries", "is given twice, on line 1: remove"),
        ("defaults: []", "defaults", "must be a mapping, but is a list"),
        ("default: {retries: 1}", "default", "is not a key; did you mean `defaults`?"),
    ],
)
def test_a_fault_in_what_a_file_shares_refuses_its_providers_and_no_others(tmp_path, top, key, said):
    """Which settings were meant is not known, so that no provider of the file runs without them."""
    (tmp_path / "a.yaml").write_text(f"{top}\nproviders: {{web: {{{MINIMAL}}}}}\n")
    (tmp_path / "b.yaml").write_text("providers: {db: {sftp_conn_id: c, source: /, dest: /srv/db}}\n")
    configuration = load(tmp_path)
    assert names(configuration) == ["db"]
    (problem,) = configuration.problems
    assert (problem.file.name, problem.provider, problem.key) == ("a.yaml", "web", key)
    assert said in problem.message


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("a: b: c", "line 1, column 5: is not valid YAML: mapping values are not allowed"),
        ("providers:\n  web:\n    schedule: @daily", "line 3, column 15: is not valid YAML"),
        ("providers:\n  web:\n    schedule: */5 * * * *", "text that begins with `@`, `*`, `&`"),
        ("providers:\n\tweb:", "tabs do not indent"),
        ("providers:\n  web:\n    dest: {{ dest }}", "`{` needs quotes"),
        (b"a: 1\nb: \xfc", "line 2: is not UTF-8 text"),
        ("a: 1\nb: \x07", "is not valid YAML: "),
        (
            "providers: {}\n---\nproviders: {}",
            "line 2, column 1: is not valid YAML: expected a single document",
        ),
        ("a: !!bool x", "remove explicit tags"),
        ("a: !!python/object/apply:os.system [ls]", "could not determine a constructor"),
        ("", "must be a mapping with the key `providers`, but holds nothing (null)"),
        ("- web", "must be a mapping with the key `providers`, but holds a list"),
        ("defaults: {}", "is missing: write the providers as a mapping"),
        ("providers:", "is nothing (null): write the providers as a mapping"),
        ("providers: [web]", "is a list: write the providers as a mapping"),
        ("provider: {web: {}}", "is not a key; did you mean `providers`?"),
    ],
)
def test_a_file_that_cannot_be_read_is_a_problem_of_the_file(read, content, said):
    """Which providers it has is not known; where it is wrong is told by line and column."""
    configuration = read(content)
    assert configuration.providers == ()
    assert {problem.provider for problem in configuration.problems} == {None}
    assert said in configuration.problems[0].message or said in configuration.problems[-1].message


def test_a_file_without_providers_on_purpose_is_no_problem(read):
    """`providers: {}` says so."""
    assert read("providers: {}") == Configuration((), ())


def test_a_file_saved_with_a_byte_order_mark_is_read(read):
    """Some editors write one."""
    assert read(b"\xef\xbb\xbfproviders: {}") == Configuration((), ())


@given(st.binary() | st.text().map(str.encode) | st.text("{}[]:-#&*!|>'\"%@`?,<= \n\tab1").map(str.encode))
def test_no_content_makes_load_raise(tmp_path_factory, content):
    """Whatever is in the file."""
    file = tmp_path_factory.getbasetemp() / "any.yaml"
    file.write_bytes(content)
    for problem in load(file).problems:
        assert str(problem)


KEYS = st.sampled_from([*Provider.model_fields, "share", "number", "above", "other"])
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.dates() | st.binary()
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS | SCALARS, inner, max_size=3),
    max_leaves=8,
)


@given(st.dictionaries(KEYS, VALUES), st.dictionaries(KEYS | SCALARS, VALUES | st.dictionaries(KEYS, VALUES)))
def test_no_values_make_load_raise(tmp_path_factory, defaults, providers):
    """Also where the file is valid YAML, with the right keys and any values."""
    file = tmp_path_factory.getbasetemp() / "values.yaml"
    file.write_text(yaml.safe_dump({"defaults": defaults, "providers": providers}, allow_unicode=True))
    configuration = load(file)
    assert configuration.problems or not providers
    for problem in configuration.problems:
        assert str(problem)


# Files and directories


def test_a_directory_is_read_file_by_file_in_the_order_of_names(tmp_path):
    """Defaults hold in their own file; hidden and other files are left alone; `.yml` is not forgotten."""
    (tmp_path / "b.yaml").write_text("providers: {b: {sftp_conn_id: c, source: /, dest: /srv/b}}")
    (tmp_path / "a.yaml").write_text(
        "defaults: {retries: 9}\nproviders: {z: {sftp_conn_id: c, source: /, dest: /srv/z}}"
    )
    (tmp_path / ".hidden.yaml").write_text("]")
    (tmp_path / "README").write_text("]")
    (tmp_path / "c.yml").write_text("providers: {}")
    configuration = load(tmp_path)
    assert [(provider.name, provider.retries) for provider in configuration.providers] == [("z", 9), ("b", 2)]
    (problem,) = configuration.problems
    assert str(problem) == (
        f"{tmp_path}/c.yml: is not read, since its name does not end in `.yaml`: rename it"
    )


def test_a_broken_file_of_a_directory_stops_no_other_file(tmp_path):
    """Its own problem names it."""
    (tmp_path / "a.yaml").write_text("]")
    (tmp_path / "b.yaml").write_text(f"providers: {{web: {{{MINIMAL}}}}}")
    (tmp_path / "c.yaml").symlink_to("nowhere")
    (tmp_path / "d.yaml").mkdir()
    configuration = load(tmp_path)
    assert names(configuration) == ["web"]
    assert [problem.file.name for problem in configuration.problems] == ["a.yaml", "c.yaml", "d.yaml"]
    assert "cannot be read (No such file or directory)" in configuration.problems[1].message
    assert "cannot be read (Is a directory)" in configuration.problems[2].message


def test_a_directory_without_files_is_a_problem(tmp_path):
    """Nothing would be backed up, and nobody would notice."""
    (problem,) = load(tmp_path).problems
    assert problem.message.startswith("is a directory without any `*.yaml` file: write one, ")


def test_a_missing_file_is_a_problem_that_tells_how_to_begin(tmp_path, read):
    """It names the place, the option, and a beginning that itself is valid."""
    (problem,) = load(tmp_path / "providers.yaml").problems
    assert str(problem).startswith(f"{tmp_path}/providers.yaml: does not exist: write one, ")
    assert "AIRFLOW__MDBACKUP__PROVIDERS_FILE" in problem.message
    assert one(read(re.search("`(providers: .*?)`", problem.message)[1])).name == "web"


def test_the_same_name_in_two_files_refuses_both(tmp_path):
    """Even if one of them is invalid anyway: which one was meant is not known."""
    (tmp_path / "a.yaml").write_text(f"providers: {{web: {{{MINIMAL}}}}}")
    (tmp_path / "b.yaml").write_text("providers: {web: {}, db: {sftp_conn_id: c, source: /, dest: /srv/db}}")
    configuration = load(tmp_path)
    assert names(configuration) == ["db"]
    told = [str(problem) for problem in configuration.problems if "of this name" in problem.message]
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    action = "rename one; until then none of them is backed up"
    assert told == [
        f"{a}: provider `web`: a provider of this name is also in {b}: {action}",
        f"{b}: provider `web`: a provider of this name is also in {a}: {action}",
    ]


# Telling it


def test_refused_has_all_problems_of_each_provider_that_a_dag_can_be_named_after(read):
    """Reserved names belong to other DAGs, and no DAG id has a blank; `problems` has them all."""
    configuration = read(
        "providers: {Web.1: {dest: x, source: /, sftp_conn_id: c},"
        " watchdog: {}, verify_x: {}, 'a b': {}, ä: {}}"
    )
    assert {name: len(problems) for name, problems in configuration.refused.items()} == {"Web.1": 2}
    assert {p.provider for p in configuration.problems} == {"Web.1", "watchdog", "verify_x", "a b", "ä"}


def test_raise_for_problems_tells_all_of_them_and_what_is_shared_once(read):
    """The text is what people read among the import errors of Airflow."""
    configuration = read(
        "defaults: {retires: 1}\nproviders:\n"
        + "".join(f"  p{n}: {{sftp_conn_id: c, source: /, dest: /srv/{n}}}\n" for n in range(3))
        + "  web: {sftp_conn_id: c, source: relative, dest: /srv/web}\n"
    )
    with pytest.raises(ConfigurationError) as raised:
        raise_for_problems(configuration)
    heading, shared, own = str(raised.value).splitlines()
    assert heading == "2 problems in the configuration of the backups:"
    assert shared.startswith("- ")
    assert "provider `p0`: `defaults.retires`" in shared
    assert shared.endswith("(and the same for `p1`, `p2`, `web`)")
    assert "provider `web`: `source`: 'relative' is not absolute" in own


def test_raise_for_problems_does_nothing_without_problems():
    """So that the file that calls it is green when all is well."""
    raise_for_problems(Configuration((), ()))


def test_no_name_of_a_file_garbles_a_message(read):
    """Control characters in names and keys are shown, not obeyed."""
    configuration = read('providers: {"a\\e[31m\\nb": {"c\\nd": 1}}')
    assert configuration.problems
    for problem in configuration.problems:
        assert str(problem).isprintable()


@pytest.mark.parametrize("opening", ["[", "{a: ", "- "])
def test_deep_nesting_is_refused_before_it_ends_the_process(read, opening):
    configuration = read("providers: " + "\n" * (opening == "- ") + opening * 100_000)
    (problem,) = configuration.problems
    assert "nested more deeply than any provider needs" in problem.message
