"""From the configuration to DAGs.

======================  ==============================================================================
module                  its DAGs
======================  ==============================================================================
:mod:`.backup`          one for each provider, which backs it up
:mod:`.restore`         one that restores files
:mod:`.verify`          one for each provider that is verified on a schedule
:mod:`.watchdog`        one that reports stale backups
:mod:`.common`          what they have in common
======================  ==============================================================================
"""
