"""The version of the package, as a constant: reading the installed metadata takes longer than all of `--help`."""

VERSION = "0.1.0"
