"""A recipe sends a secret only to a host that the user allowed for it, outside the recipe."""

import pytest

from freehold.core import secrets
from freehold.core.errors import ConfigError
from freehold.stages.rephrase.config import EndpointTeacher

URL = "https://api.example.com/v1"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hush\n")
    monkeypatch.delenv(secrets.ALLOW, raising=False)
    return tmp_path


def ask(url=URL):
    return secrets.secret_for("AWS_SECRET_ACCESS_KEY", url, "rephrase.teacher")


def test_unknown_pair_is_refused_by_name():
    with pytest.raises(ConfigError, match="(?s)AWS_SECRET_ACCESS_KEY to api.example.com.*--allow-secret") as caught:
        ask()
    assert "hush" not in str(caught.value)


def test_pair_is_allowed_by_flag_for_that_host_only(monkeypatch):
    monkeypatch.setenv(secrets.ALLOW, "OTHER@api.example.com")
    secrets.allow(["AWS_SECRET_ACCESS_KEY@API.example.com"])
    assert ask() == "hush"
    with pytest.raises(ConfigError, match="to evil.example.com"):
        ask("https://evil.example.com/?api.example.com")
    with pytest.raises(ConfigError, match="VARIABLE@HOST"):
        secrets.allow(["AWS_SECRET_ACCESS_KEY"])


def test_pair_is_allowed_by_the_users_file(home):
    path = home / "freehold/secrets.yaml"
    path.parent.mkdir()
    path.write_text("AWS_SECRET_ACCESS_KEY: [api.example.com]\n")
    assert ask() == "hush"
    path.write_text("AWS_SECRET_ACCESS_KEY: api.example.com\n")
    with pytest.raises(ConfigError, match="not a list of hosts"):
        ask()


def test_environment_without_a_home_has_no_file(monkeypatch):
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.delenv("HOME", raising=False)
    assert secrets.config_file() is None
    with pytest.raises(ConfigError):
        ask()


def test_password_in_an_address_is_refused():
    with pytest.raises(ValueError, match="without a name and password"):
        EndpointTeacher(url="http://user:pa55@host/v1", model="m", licence="MIT", licence_evidence="LICENSE")
