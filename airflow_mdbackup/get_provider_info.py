"""Metadata of this Airflow provider package. Imports no Airflow, which reads it while starting."""

from __future__ import annotations

from typing import Any


def get_provider_info() -> dict[str, Any]:
    """Return the metadata in the form of Airflow's ``provider_info.schema.json``."""
    return {
        "package-name": "airflow-mdbackup",
        "name": "mdbackup",
        "description": "Verified pull backups over read-only SFTP.",
        "integrations": [{"integration-name": "mdbackup", "tags": ["service"]}],
        "operators": [
            {
                "integration-name": "mdbackup",
                "python-modules": [
                    "airflow_mdbackup.operators.build_provider_index",
                    "airflow_mdbackup.operators.fetch_index",
                    "airflow_mdbackup.operators.diff_indexes",
                    "airflow_mdbackup.operators.approve_changes",
                    "airflow_mdbackup.operators.pull_changed",
                    "airflow_mdbackup.operators.archive_old",
                    "airflow_mdbackup.operators.commit_backup",
                    "airflow_mdbackup.operators.audit_provider",
                    "airflow_mdbackup.operators.watch_backup",
                    "airflow_mdbackup.operators.verify_mirror",
                    "airflow_mdbackup.operators.restore_files",
                ],
            }
        ],
        "hooks": [
            {"integration-name": "mdbackup", "python-modules": ["airflow_mdbackup.hooks.provider"]},
        ],
        "triggers": [
            {
                "integration-name": "mdbackup",
                "python-modules": ["airflow_mdbackup.triggers.build_provider_index"],
            },
        ],
        "asset-uris": [
            {
                "schemes": ["mdbackup"],
                "handler": "airflow_mdbackup.assets.check_uri",
                "to_openlineage_converter": "airflow_mdbackup.assets.as_openlineage",
            }
        ],
        "cli": ["airflow_mdbackup.cli.main.get_airflow_commands"],
        "extra-links": ["airflow_mdbackup.links.LastGoodRunLink", "airflow_mdbackup.links.RunReportLink"],
        "config": {
            "mdbackup": {
                "description": "Pull backups over read-only SFTP.",
                "options": {
                    "providers_file": {
                        "description": (
                            "YAML file, or directory of ``*.yaml`` files, that describes the providers. A "
                            "relative path is relative to ``AIRFLOW_HOME``."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "/etc/airflow/mdbackup/providers.yaml",
                        "default": "mdbackup/providers.yaml",
                    },
                    "restore_below": {
                        "description": (
                            "The directory on the workers below which the DAG ``mdbackup_restore`` may write:"
                            " an absolute path, writable for the workers' user only. Not set: that DAG"
                            " restores nothing."
                        ),
                        "version_added": "0.1.0",
                        "type": "string",
                        "example": "/srv/restored",
                        "default": None,
                    },
                },
            }
        },
    }
