"""The commands: their names, arguments and help. Importing them takes no time."""
