"""The errors a user can cause; each says where, what was found, what was expected, and what to do."""


class FreeholdError(Exception):
    """A mistake of the user's or of the user's machine, described so that it can be corrected.

    Our own bugs are never wrapped in this class: they propagate with their traceback.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        expected: object = None,
        todo: str | None = None,
    ) -> None:
        self.what, self.where, self.found, self.expected, self.todo = what, where, found, expected, todo
        lines = [what]
        for label, value in (("where", where), ("found", found), ("expected", expected), ("to do", todo)):
            if value is not None:
                lines.append(f"  {label + ':':<10}{value}")
        super().__init__("\n".join(lines))

    def to_dict(self) -> dict[str, str | None]:
        """Return what, where, found, expected and todo as text: the form for programs (`--json`)."""
        fields = ("what", "where", "found", "expected", "todo")
        return {name: None if (value := getattr(self, name)) is None else str(value) for name in fields}


class ConfigError(FreeholdError):
    """A recipe or an override that does not say something we can do."""


class ArtifactError(FreeholdError):
    """An artifact folder that is missing, unfinished, damaged, or of another kind or version."""


class DataError(FreeholdError):
    """Text, shards or packages that cannot be read as what they claim to be."""


class LicenceError(FreeholdError):
    """Rows that the policy does not let through the gate."""


class CheckpointError(FreeholdError):
    """A checkpoint that is damaged, incomplete, or of another model."""


class ExportError(FreeholdError):
    """A model the target runtime cannot express, or an export whose proof failed."""


class RequestError(FreeholdError):
    """A request to the server or the engine that cannot be answered as asked."""


class ProofError(FreeholdError):
    """A key, signature, log or signed folder that cannot be trusted: verification fails closed."""
