"""Keys and values that are refused, and that each refusal says what to write instead."""

from __future__ import annotations

import pytest

from tests.unit.config.providers_file import MINIMAL, one


def test_a_problem_is_printed_with_file_provider_key_and_what_to_write(read, tmp_path):
    """One line of text says where it is, what is wrong and what to do."""
    (problem,) = read(f"providers: {{web: {{{MINIMAL}, guard: {{share: 50}}}}}}").problems
    assert str(problem) == (
        f"{tmp_path}/providers.yaml: provider `web`: `guard.share`: the number 50 is not a valid percentage:"
        " write `0%` to `100%`, or a number from 0 to 1"
    )


def test_an_unknown_key_is_refused_and_the_similar_one_named(refusals):
    """A misspelled key never silently means nothing."""
    wrong = refusals("sftp_con_id: x, guard: {shares: 10%}, colour: red")
    assert wrong["sftp_con_id"] == "is not a key; did you mean `sftp_conn_id`?"
    assert wrong["guard.shares"] == "is not a key; did you mean `share`?"
    assert wrong["colour"].startswith("is not a key; the keys are `sftp_conn_id`, ")
    assert "`name`" not in wrong["colour"]


@pytest.mark.parametrize("key", ["max_ages: 2d", "name: web"])
def test_keys_that_a_provider_does_not_have_are_refused(refusals, key):
    """Also those which one might expect."""
    assert "is not a key" in refusals(key)[key.partition(":")[0]]


def test_each_required_key_that_is_missing_is_named_with_an_example(refusals):
    """All at once, not one after the other."""
    assert refusals("retries: 1", given="") == {
        "sftp_conn_id": "is missing: write for example `sftp_conn_id: web_backupop`",
        "source": "is missing: write for example `source: [/backups, /etc]`",
        "dest": "is missing: write for example `dest: /srv/backups/web`",
    }


def test_chroot_is_required_with_an_index_account_and_told_beside_other_problems(refusals):
    """The indexer must know where the paths of `backupop` are."""
    wrong = refusals("ssh_conn_id: web_index, shards: 0")
    assert wrong["chroot"].startswith("is missing, and `ssh_conn_id` needs it: write the directory")
    assert wrong["shards"] == "must be at least 1, but is the number 0: write for example `shards: 4`"


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ("queue: 1:30", "queue", "must be text, but YAML reads the number 90: put it in quotes"),
        ("queue: no", "queue", "must be text, but YAML reads the boolean false: put it in quotes"),
        ("tags: [on]", "tags", "must be text, but YAML reads the boolean true: put it in quotes"),
        ("pool: 0755", "pool", "must be text, but YAML reads the number 493: put it in quotes"),
        (
            "stall_timeout: 1:30",
            "stall_timeout",
            "YAML reads the number 90 (as it does for an unquoted `1:30`)",
        ),
        ("on: 1", None, "a key must be text, but YAML reads the boolean true: put it in quotes"),
        ('allow_empty: "yes"', "allow_empty", "must be `true` or `false`, but is the text 'yes'"),
        (
            'retries: "3"',
            "retries",
            "must be a whole number, but is the text '3': write for example `retries: 5`",
        ),
        ("retries: true", "retries", "must be a whole number, but is the boolean true"),
        ("shards: 2.0", "shards", "must be a whole number, but is the number 2.0"),
        ("indexer: {limit: 50}", "indexer.limit", "must be a rate, but YAML reads the number 50"),
        ("indexer: {jobs: 0}", "indexer.jobs", "1"),
        ("indexer: {nice: 20}", "indexer.nice", "19"),
        ("indexer: {rehash: 120%}", "indexer.rehash", "is not a valid percentage"),
        ("indexer: {job: 1}", "indexer.job", "is not a key; did you mean `jobs`?"),
        ("deferrable: 1", "deferrable", "true"),
        ("on_guard: off", "on_guard", "must be 'fail' or 'approve', but is the boolean false"),
    ],
)
def test_what_yaml_reads_as_something_else_is_named_as_what_yaml_made_of_it(refusals, keys, key, said):
    """Nothing is converted: whoever wrote `1:30` never meant 90."""
    assert said in refusals(keys)[key]


@pytest.mark.parametrize(
    ("keys", "key", "said"),
    [
        ("shards: 65", "shards", "must be at most 64"),
        ("shards: null", "shards", "must be a whole number, but is nothing (null)"),
        (f"shards: 0x{'f' * 5000}", "shards", "must be at most 64, but is a huge number"),
        ("mount: 2026-13-45", "mount", "'2026-13-45' is not absolute"),
        ("retries: -1", "retries", "must be at least 0"),
        ('queue: ""', "queue", "must not be empty: write for example `queue: backup`"),
        (f"tags: [{'x' * 101}]", "tags", "must have at most 100 characters"),
        ("tags: production", "tags", "must be a list, but is the text 'production': write for example"),
        ("exclude: null", "exclude", "or leave the key out"),
        ("on_guard: ask", "on_guard", "must be 'fail' or 'approve', but is the text 'ask'"),
        (
            "guard: 50%",
            "guard",
            "must be a mapping, but is the text '50%': write for example `guard: {share: 25%}`",
        ),
        ("guard: {1: 2}", "guard", "a key must be text, but YAML reads the number 1"),
        ("guard: {share: true}", "guard.share", "must be a percentage, but YAML reads the boolean true"),
        ("guard: {share: 120%}", "guard.share", "is not a valid percentage: write `0%` to `100%`"),
        ("guard: {share: .nan}", "guard.share", "is not a valid percentage"),
        ("guard: {number: many}", "guard.number", "must be a whole number"),
        ("guard: {above: -1}", "guard.above", "must be at least 0"),
        ("mount: /mnt", "mount", "`/mnt` is neither `dest` (`/srv/web`) nor a directory above it"),
        ("mount: /sr", "mount", "is neither `dest`"),
        ("mount: /", "mount", "must not be `/` itself"),
        ("index: /", "index", "must not be `/` itself"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_what_fits(refusals, keys, key, said):
    """The message names the key, shows the value and gives an example."""
    assert said in refusals(keys)[key]


def test_a_mistake_made_in_many_elements_of_a_list_is_told_once(read):
    """One line is enough."""
    (problem,) = read(f"providers: {{web: {{{MINIMAL}, tags: [[], [], []]}}}}").problems
    assert problem.message == "must be text, but is a list: write for example `tags: [production]`"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("backups", "'backups' is not absolute: write the whole path, starting with `/`"),
        ("~/backups", "begins with `~`, which is not expanded"),
        ("/a/../b", "has `.` or `..` as a component"),
        ("/a/./b", "has `.` or `..` as a component"),
        ("/a//b", "has an empty component"),
        ("/a/", "has an empty component: write single slashes, and none at the end"),
        ('""', "is not absolute"),
        ('"/a\\0"', "contains a NUL character"),
        (f"/{'a' * 256}", "is too long"),
    ],
)
@pytest.mark.parametrize("key", ["source", "index", "dest", "chroot", "mount"])
def test_a_path_is_absolute_and_written_in_the_only_way(refusals, key, path, said):
    """Every path key, on either side, has the same rules."""
    given = {"sftp_conn_id": "c", "source": "/a", "dest": "/b"}
    given.pop(key, None)
    text = ", ".join(f"{name}: {value}" for name, value in given.items())
    assert said in refusals(f"{key}: {path}", given=text)[key]


def test_source_may_be_everything_but_dest_may_not(refusals, read):
    """`/` is the whole of what `backupop` sees; on the consumer it would be the whole machine."""
    assert one(read("providers: {web: {sftp_conn_id: c, source: /, dest: /srv/web}}")).source == ("/",)
    wrong = refusals("", given="sftp_conn_id: c, source: /a, dest: /")
    assert wrong == {"dest": "must not be `/` itself: name something below it"}


@pytest.mark.parametrize("source", ["[/a, /a]", "[/a/b, /a]", "[/, /a]"])
def test_a_source_inside_another_is_refused(refusals, source):
    """It would be hashed twice."""
    assert "already contains" in refusals("", given=f"sftp_conn_id: c, dest: /d, source: {source}")["source"]


def test_an_empty_source_is_refused(refusals):
    """A provider without source backs nothing up."""
    assert refusals("", given="sftp_conn_id: c, dest: /d, source: []") == {
        "source": "must not be empty: write for example `source: [/backups, /etc]`"
    }


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("!", "is not a gitignore pattern"),
        ("[z-a]", "is not a gitignore pattern"),
        ("a\\", "is not a gitignore pattern"),
        ("", "matches nothing"),
        ("/", "matches nothing"),
        ("#name", "is a comment in gitignore: write `\\#`"),
    ],
)
def test_a_pattern_that_excludes_nothing_is_refused(refusals, pattern, said):
    """Whoever wrote it meant something."""
    assert said in refusals(f"exclude: ['*.tmp', '{pattern}']")["exclude"]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("Web", "consists of lowercase letters, digits, `_` and `-`"),
        ("-web", "begins with a letter or digit"),
        ("web.server", "rename it"),
        ("x" * 101, "at most 100 characters"),
        ('"web\\n"', "consists of lowercase letters"),
        ("watchdog", "are reserved"),
        ("restore", "are reserved"),
        ("verify", "are reserved"),
        ("verify_web", "names that begin with `verify_` are reserved"),
        ("no", "a provider's name must be text, but YAML reads the boolean false: put it in quotes"),
        ("12", "YAML reads the number 12"),
        ("null", "YAML reads nothing (null)"),
    ],
)
def test_a_name_that_a_provider_cannot_have_is_refused(read, name, said):
    """And its other keys are judged all the same."""
    configuration = read(f"providers: {{? {name} : {{{MINIMAL}, shards: 0}}}}")
    about_name, about_shards = configuration.problems
    assert about_name.key is None
    assert said in about_name.message
    assert about_shards.key == "shards"
    assert about_name.provider == about_shards.provider


def test_two_names_that_are_no_text_and_a_huge_number_are_reported(read):
    """Python refuses to print a number of so many digits."""
    huge = f"? 0x{'f' * 5000}\n"
    configuration = read(f"providers: {{.nan: {{}}, .nan: {{}}, {huge} : {{}}}}\n{huge}: 1")
    assert {problem.provider for problem in configuration.problems} == {"the number nan", "a huge number"}
    assert "a huge number" in {problem.key for problem in configuration.problems}


def test_names_that_merely_resemble_reserved_ones_are_accepted(read):
    """Only `verify_` at the beginning is reserved."""
    assert one(read(f"providers: {{verify-web: {{{MINIMAL}}}}}")).name == "verify-web"


def test_a_provider_without_keys_is_refused(read):
    """A name alone is an unfinished thought."""
    (problem,) = read("providers:\n  web:\n").problems
    assert str(problem).endswith("provider `web`: must be a mapping of keys, but is nothing (null)")
