"""From the configuration to DAGs.

======================  ==============================================================================
module                  its DAGs
======================  ==============================================================================
:mod:`.backup`          one for each provider, which backs it up
:mod:`.restore`         one that gets files back
:mod:`.verify`          one for each provider that is verified on a schedule
:mod:`.watchdog`        one that reports backups that did not happen
:mod:`.common`          what they have in common
======================  ==============================================================================
"""
