"""The commands: their names, arguments and help. Imports nothing that takes time."""
