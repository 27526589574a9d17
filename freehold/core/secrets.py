"""Which secret of the environment may be sent to which host: allowed by the user, never by a recipe.

A recipe is made to be passed on, and it names variables and addresses. So each pair of them is allowed outside it: by
`--allow-secret VARIABLE@HOST`, in the environment (`FREEHOLD_ALLOW_SECRETS`, pairs with commas between), or in
`~/.config/freehold/secrets.yaml` (`VARIABLE: [HOST, ...]`).
"""

from __future__ import annotations

import os
import urllib.parse
from pathlib import Path

from freehold.core.config import load_yaml
from freehold.core.errors import ConfigError

ALLOW = "FREEHOLD_ALLOW_SECRETS"


def config_file() -> Path | None:
    """Return the user's file of allowed pairs; None in an environment that has no home."""
    home = os.environ.get("XDG_CONFIG_HOME") or (os.environ["HOME"] + "/.config" if os.environ.get("HOME") else "")
    return Path(home) / "freehold" / "secrets.yaml" if home else None


def allowed_pairs() -> set[tuple[str, str]]:
    """Return every (variable, host) that the user allows; ConfigError for a file that is not such a mapping."""
    pairs = {_pair(item) for item in os.environ.get(ALLOW, "").split(",") if item.strip()}
    path = config_file()
    if path is not None and path.is_file():
        for variable, hosts in load_yaml(path).items():
            if not isinstance(hosts, list) or not all(isinstance(host, str) for host in hosts):
                raise ConfigError(
                    "not a list of hosts", where=f"{path}: {variable}", found=hosts, expected="[api.example.com]"
                )
            pairs |= {(variable, host.lower()) for host in hosts}
    return pairs


def allow(items: list[str]) -> None:
    """Allow pairs for this process and those it starts; ConfigError for one that is not VARIABLE@HOST."""
    for item in items:
        _pair(item)
    if items:
        before = os.environ.get(ALLOW, "")
        os.environ[ALLOW] = ",".join([*([before] if before else []), *items])


def secret_for(variable: str, url: str, where: str) -> str:
    """Return the value of a variable that may be sent to a URL's host; empty when the variable is not set.

    Raises ConfigError, which names both, when the user did not allow the pair.
    """
    host = (urllib.parse.urlsplit(url).hostname or "").lower()
    if (variable, host) not in allowed_pairs():
        raise ConfigError(
            "a recipe may not send this secret to this host",
            where=where,
            found=f"{variable} to {host}",
            expected="a pair that you allowed outside the recipe",
            todo=f"if you trust that host with it: --allow-secret {variable}@{host}, or the line "
            f"`{variable}: [{host}]` in {config_file() or '$XDG_CONFIG_HOME/freehold/secrets.yaml'}",
        )
    return os.environ.get(variable, "").strip()


def _pair(item: str) -> tuple[str, str]:
    variable, at, host = item.strip().partition("@")
    if not at or not variable or not host or "/" in host:
        raise ConfigError("not a secret and a host", where="--allow-secret", found=item, expected="VARIABLE@HOST")
    return variable, host.lower()
