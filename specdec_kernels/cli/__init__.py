"""The command line: ``specdec generate``, ``specdec bench``, ``specdec doctor``."""
