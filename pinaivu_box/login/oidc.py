"""Single sign-on: who came back from the provider, and whether they may come in.

What a browser has to bring back is in its own cookie, sealed with a key of this process: a login
that began elsewhere, or with another state, leads nowhere.
"""

from __future__ import annotations

import hmac
import re
import secrets
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import nacl.utils
from nacl.encoding import URLSafeBase64Encoder
from nacl.exceptions import CryptoError
from nacl.secret import SecretBox

from pinaivu_box.errors import SignOnFailed, SignOnForbidden
from pinaivu_box.login_config import OidcConfig
from pinaivu_box.secret import Secret

if TYPE_CHECKING:
    from pinaivu_box.login.provider import Provider

LIFE_SECONDS = 600
_MAX_COOKIE_CHARACTERS = 4000
_MAX_CODE_CHARACTERS = 4096
_MAX_GROUPS = 10_000
_NOT_IN_NAMES = re.compile(r"[^a-z0-9._@-]+")
_MAX_NAME_CHARACTERS = 56  # of 64: the rest makes it unique
_AGAIN = "start again from the login page."


class Attempt(msgspec.Struct, frozen=True):
    """A login that has begun; `expires` in Unix seconds, `next` is the page to go to, `link` the
    token of a one-time link that gives the person its account, "" without one."""

    issuer: str
    state: str
    nonce: str
    verifier: str
    redirect_uri: str
    next: str
    link: str
    expires: float


class Person(msgspec.Struct, frozen=True):
    """Who logged in at the provider: `subject` is its name for them for ever.

    `email` is empty unless the provider has verified it.
    """

    issuer: str
    subject: str
    email: str
    username: str
    groups: frozenset[str]


class SignOn:
    """The provider of the settings in force, and the key that seals cookies."""

    def __init__(self) -> None:
        self._box = SecretBox(nacl.utils.random(SecretBox.KEY_SIZE))
        self._provider: Provider | None = None

    def provider(self, config: OidcConfig, secret: Secret | None) -> Provider | None:
        """None without single sign-on."""
        if not config.issuer:
            return None
        known = self._provider
        if known is None or (known.config, known.secret) != (config, secret):
            from pinaivu_box.login.provider import Provider  # loads httpx, for few boxes

            self._provider = known = Provider(config, secret)
        return known

    async def begin(
        self, provider: Provider, redirect_uri: str, next_path: str, link: str = ""
    ) -> tuple[str, str]:
        """The URL that the browser goes to, and its cookie.  Raises SignOnUnavailable."""
        attempt = Attempt(
            issuer=provider.config.issuer,
            state=secrets.token_urlsafe(24),
            nonce=secrets.token_urlsafe(24),
            verifier=secrets.token_urlsafe(48),
            redirect_uri=redirect_uri,
            next=next_path,
            link=link,
            expires=time.time() + LIFE_SECONDS,
        )
        url = await provider.login_url(attempt)
        sealed = self._box.encrypt(msgspec.json.encode(attempt), encoder=URLSafeBase64Encoder)
        return url, sealed.decode()

    async def end(
        self, provider: Provider, cookie: str, parameters: Mapping[str, str]
    ) -> tuple[Person, Attempt]:
        """Who came back, from which login.  Raises SignOnFailed."""
        attempt = self._attempt(provider, cookie, parameters)
        if parameters.get("iss", attempt.issuer) != attempt.issuer:  # RFC 9207
            raise SignOnFailed(f"Another provider has answered: {_AGAIN}")
        code = parameters.get("code", "")
        if "error" in parameters or not 0 < len(code) <= _MAX_CODE_CHARACTERS:
            raise SignOnFailed(f"{provider.config.name} has not logged you in: {_AGAIN}")
        claims = await provider.claims(attempt, code)
        return person_of(claims, attempt.issuer), attempt

    def _attempt(self, provider: Provider, cookie: str, parameters: Mapping[str, str]) -> Attempt:
        try:
            sealed = cookie[:_MAX_COOKIE_CHARACTERS].encode()
            opened = self._box.decrypt(sealed, encoder=URLSafeBase64Encoder)
            attempt = msgspec.json.decode(opened, type=Attempt)
        except (CryptoError, ValueError, TypeError):
            attempt = None
        state = parameters.get("state", "")
        if (
            attempt is None
            or attempt.issuer != provider.config.issuer
            or attempt.expires < time.time()
            or not hmac.compare_digest(attempt.state.encode(), state.encode())
        ):
            raise SignOnFailed(
                f"This login took more than {LIFE_SECONDS // 60} minutes, or began in another "
                f"window: {_AGAIN}"
            )
        return attempt


def person_of(claims: Mapping[str, Any], issuer: str) -> Person:
    def text(name: str) -> str:
        value = claims.get(name)
        return value if isinstance(value, str) else ""

    groups = claims.get("groups", ())
    listed = [groups] if isinstance(groups, str) else groups if isinstance(groups, list) else []
    return Person(
        issuer=issuer,
        subject=claims["sub"],
        email=text("email").strip().lower() if claims.get("email_verified") is True else "",
        username=text("preferred_username").strip(),
        groups=frozenset(one for one in listed[:_MAX_GROUPS] if isinstance(one, str)),
    )


def check_allowed(config: OidcConfig, person: Person) -> None:
    """Raises SignOnForbidden."""
    if config.allowed_domains:
        if not person.email:
            raise SignOnForbidden(
                f"{config.name} has not verified an email address of yours, which this box asks "
                "for: verify it there, then log in again."
            )
        domain = person.email.rpartition("@")[2]
        if domain not in config.allowed_domains:
            raise SignOnForbidden(
                f"Addresses of {domain[:100]} may not log in to this box: use another account of "
                f"{config.name}."
            )
    if config.allowed_groups and not person.groups & set(config.allowed_groups):
        raise SignOnForbidden(
            "You are in none of the groups that may log in to this box: ask who manages it."
        )


def is_admin(config: OidcConfig, person: Person) -> bool | None:
    """None where the provider does not decide about it."""
    if not config.admin_groups:
        return None
    return not person.groups.isdisjoint(config.admin_groups)


def account_names(person: Person) -> Iterator[str]:
    """Names for the account of a person, the best first, without end.

    They are only names: an account belongs to whom it is linked to, whatever it is called.
    """
    wanted = person.email or person.username.replace("@", ".")  # no address that is not verified
    slug = _NOT_IN_NAMES.sub("-", wanted.lower())[:_MAX_NAME_CHARACTERS].strip("-._@") or "user"
    slug = slug if not slug.startswith("acct_") else f"user-{slug}"
    yield slug
    while True:
        yield f"{slug[:_MAX_NAME_CHARACTERS]}-{secrets.token_hex(3)}"
