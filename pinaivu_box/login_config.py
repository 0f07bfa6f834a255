"""`[login]` of the configuration: who may have an account, and single sign-on."""

from __future__ import annotations

import ipaddress
import re
from typing import Annotated, Literal
from urllib.parse import urlsplit

from msgspec import Meta

from pinaivu_box.config_section import Section
from pinaivu_box.text import NO_CONTROLS

_URL = re.compile(r"https?://[!-~]{1,500}")
_SCOPE = re.compile(r"[!#-\[\]-~]{1,100}")  # RFC 6749, section 3.3
_DOMAIN = re.compile(r"[a-z0-9-]{1,63}(?:\.[a-z0-9-]{1,63})+")


class OidcConfig(Section, frozen=True):
    """A provider of OpenID Connect; off without an `issuer`.

    The client's secret is in an environment variable or a file, never here.  Each list of who is
    allowed has to be met if it is not empty; without any, `allow_everybody` says that this is
    meant.
    """

    issuer: str = ""
    client_id: str = ""
    client_secret_env: str = ""
    client_secret_file: str = ""
    scopes: tuple[str, ...] = ("openid", "email", "profile")
    allowed_domains: tuple[str, ...] = ()
    allowed_groups: tuple[str, ...] = ()
    allow_everybody: bool = False
    admin_groups: tuple[str, ...] = ()
    name: Annotated[str, Meta(min_length=1, max_length=60, pattern=NO_CONTROLS)] = "Single sign-on"


class LoginConfig(Section, frozen=True):
    signup: Literal["closed", "invite", "open"] = "closed"
    oidc: OidcConfig = OidcConfig()


def check(login: LoginConfig) -> None:
    """Raises ValueError."""
    oidc = login.oidc
    if not oidc.issuer:
        return
    if not is_safe_url(oidc.issuer) or urlsplit(oidc.issuer).query:
        raise ValueError(
            f"login.oidc.issuer is '{oidc.issuer[:200]}': it must be a URL with https://, or with "
            "http:// on this machine"
        )
    if not oidc.client_id:
        raise ValueError("login.oidc.client_id is missing: the provider gives one to each client")
    if oidc.client_secret_env and oidc.client_secret_file:
        raise ValueError(
            "login.oidc has both client_secret_env and client_secret_file: leave one out"
        )
    restricted = bool(oidc.allowed_domains or oidc.allowed_groups)
    if not restricted and not oidc.allow_everybody:
        raise ValueError(
            "login.oidc lets everybody in who has an account at the provider: set allowed_domains "
            "or allowed_groups, or allow_everybody = true if that is meant"
        )
    if restricted and oidc.allow_everybody:
        raise ValueError(
            "login.oidc has allow_everybody beside allowed_domains or allowed_groups: leave one out"
        )
    if "openid" not in oidc.scopes or not all(map(_SCOPE.fullmatch, oidc.scopes)):
        raise ValueError('login.oidc.scopes must be words, and one of them "openid"')
    for domain in oidc.allowed_domains:
        if not _DOMAIN.fullmatch(domain):
            raise ValueError(
                f"login.oidc.allowed_domains has '{domain}', which is no domain in small letters, "
                "such as example.org"
            )


def is_safe_url(url: str) -> bool:
    """Whether it is an HTTPS URL without a password, or one of this machine."""
    try:
        parts = urlsplit(url)
        named = bool(parts.hostname) and parts.port != 0 and "@" not in parts.netloc
    except ValueError:
        return False
    if not named or not _URL.fullmatch(url) or parts.fragment:
        return False
    return parts.scheme == "https" or _is_loopback(parts.hostname or "")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
