"""The configuration: from YAML files to :class:`Provider` objects and printable problems.

======================  ==============================================================================
module                  what it knows
======================  ==============================================================================
:mod:`.values`          how a duration, a percentage, a path, a schedule is written
:mod:`.bandwidth`       how a bandwidth limit is written, and which one holds at what time of day
:mod:`.alert`           the keys of one entry of a provider's ``alerts``
:mod:`.max_age`         how old a backup may be, by its schedule
:mod:`.schedule`        when the next run begins, by its schedule
:mod:`.provider`        the keys of a provider: the schema, from which the reference page is generated
:mod:`.problem`         what is wrong, and where, as a person reads it
:mod:`.yaml_file`       one YAML file: read strictly, each fault told with its line
:mod:`.configuration`   all files together: names, clashing destinations, what is refused and why
:mod:`.settings`        the options in Airflow's own configuration
======================  ==============================================================================

Nothing here imports Airflow when it is imported itself, so that a command line needs no Airflow to read
the same files.
"""

from airflow_mdbackup.config.alert import AlertRule
from airflow_mdbackup.config.configuration import (
    Configuration,
    ConfigurationError,
    load,
    raise_for_problems,
)
from airflow_mdbackup.config.problem import Problem
from airflow_mdbackup.config.provider import Guard, Provider, Verify
from airflow_mdbackup.config.settings import providers_file, web_path

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
