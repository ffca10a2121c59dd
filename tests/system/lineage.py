"""A plugin as OpenLineage's: a reader, and a listener that has it read after each task."""

from __future__ import annotations

VARIABLE = "LINEAGE"
"""Environment variable: the file to which the plugin adds a line, as JSON, for each task with lineage."""

PLUGIN = """
import json, os
from airflow.plugins_manager import AirflowPlugin
from airflow.providers.common.compat.sdk import hookimpl
from airflow.sdk.lineage import HookLineageReader

class Reader(HookLineageReader):
    pass

class Listener:
    @hookimpl
    def on_task_instance_success(self, previous_state, task_instance):
        found = Reader().retrieve_hook_lineage()
        uris = [[each.asset.uri for each in some] for some in (found.inputs, found.outputs)]
        if any(uris):
            with open(os.environ["LINEAGE"], "a") as file:
                file.write(json.dumps([task_instance.dag_id, task_instance.task_id, *uris]) + "\\n")

class Lineage(AirflowPlugin):
    name = "lineage_of_the_test"
    hook_lineage_readers = [Reader]
    listeners = [Listener()]
"""
