"""The configuration: from YAML files to :class:`Provider` objects and printable problems.

In the order in which a file is read:

=======================  =============================================================================
module                   what it does
=======================  =============================================================================
:mod:`.airflow_options`  our options in Airflow's own configuration, such as where the files are
:mod:`.yaml_file`        reads one YAML file strictly, and reports each fault with its line
:mod:`.provider`         one provider: the schema, from which the reference page is generated
:mod:`.sections`         the mappings inside a provider: ``guard``, ``indexer``, ``timeouts``, ``verify``
:mod:`.alert`            one entry of a provider's ``alerts``
:mod:`.value_types`      single values: how a duration, a percentage, a path, a schedule is written
:mod:`.bandwidth`        how a bandwidth limit is written, and which one applies at what time of day
:mod:`.schedule`         when runs start, and how old a backup may be by its schedule
:mod:`.configuration`    all files together: names, clashing destinations, what is refused and why
:mod:`.problem`          what is wrong, where, and what to write instead, as a message
:mod:`.classes`          imports a class that the configuration names by its dotted path
:mod:`.foreign`          tries such classes (notifiers, timetables) before they are needed
=======================  =============================================================================

Importing this package does not import Airflow, so that a command line can read the same files without it.
"""

from airflow_mdbackup.config.airflow_options import providers_file, web_path
from airflow_mdbackup.config.alert import AlertRule
from airflow_mdbackup.config.configuration import (
    Configuration,
    ConfigurationError,
    load,
    raise_for_problems,
)
from airflow_mdbackup.config.problem import Problem
from airflow_mdbackup.config.provider import Provider
from airflow_mdbackup.config.sections import Guard, Verify

__all__ = [
    "AlertRule",
    "Configuration",
    "ConfigurationError",
    "Guard",
    "Problem",
    "Provider",
    "Verify",
    "load",
    "providers_file",
    "raise_for_problems",
    "web_path",
]
