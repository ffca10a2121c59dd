"""The documentation of the configuration, which is made from its schema."""

from __future__ import annotations

import re

import yaml

from airflow_mdbackup.config import Provider, load
from demo import generate_docs
from tests.unit.config.providers_file import one


def test_the_reference_and_the_sample_are_what_the_schema_says():
    """`python -m demo.generate_docs` writes them."""
    assert generate_docs.main(["--check"]) == 0


def test_the_check_of_the_generated_files_fails_when_one_is_out_of_date(tmp_path, monkeypatch, capsys):
    """It names the file and the command, and changes nothing."""
    monkeypatch.setattr(generate_docs, "SAMPLE", tmp_path / "sample.yaml")
    monkeypatch.setattr(generate_docs, "REFERENCE", tmp_path / "new" / "reference.md")
    assert generate_docs.main([]) == 0
    assert generate_docs.main(["--check"]) == 0
    generate_docs.SAMPLE.write_text("old")
    assert generate_docs.main(["--check"]) == 1
    assert "sample.yaml is out of date: run `python -m demo.generate_docs`" in capsys.readouterr().err
    assert generate_docs.SAMPLE.read_text() == "old"


def test_the_sample_is_valid_as_it_is_and_with_every_key_in_use(read):
    """Whoever removes a comment mark gets a valid file, and every key is in it."""
    text = generate_docs.SAMPLE.read_text()
    assert one(load(generate_docs.SAMPLE)).name == "web"
    complete = re.sub(r"(?m)^( +)#(?=[a-z_]+:)", r"\1", text)
    assert one(read(complete)).shards == 4
    web = yaml.safe_load(complete)["providers"]["web"]
    assert {"name", *web} == set(Provider.model_fields)


def test_every_key_has_a_description_and_an_example_that_is_valid(read):
    """The reference is only as good as the schema."""
    base = {"sftp_conn_id": "c", "source": "/a", "dest": "/srv/backups/x", "chroot": "/"}
    for key, field in Provider.model_fields.items():
        assert field.description, key
        assert field.examples, key
        if key != "name":
            for example in field.examples:
                assert one(read(yaml.safe_dump({"providers": {"web": {**base, key: example}}}))), key
