"""Checks an ID token of OpenID Connect: its signature, and for whom it is.

authlib and joserfc, which need some time to load, are imported when a token is checked.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pinaivu_box.errors import SignOnFailed

if TYPE_CHECKING:
    from joserfc.jwk import KeySet

# Only signatures with a private key: "none" is no signature, and HS256 needs a secret of both.
_ALGORITHMS = ("RS256", "RS384", "RS512", "PS256", "PS384", "PS512", "ES256", "ES384", "ES512")
_CLOCKS_DIFFER = 60  # seconds
_MAX_KEYS = 100
_MAX_SUBJECT_CHARACTERS = 255  # OpenID Connect Core, section 2
_KEY_TYPES = ("RSA", "EC")


class UnknownKey(SignOnFailed):
    """No key of the provider's has the id that the token names."""


def key_set(document: Mapping[str, Any]) -> KeySet:
    """The keys of a provider that can sign tokens; others are left out."""
    from joserfc.errors import JoseError
    from joserfc.jwk import JWKRegistry, KeySet

    keys = []
    found = document.get("keys")
    for data in found[:_MAX_KEYS] if isinstance(found, list) else ():
        if isinstance(data, dict) and data.get("kty") in _KEY_TYPES and data.get("use") != "enc":
            try:
                keys.append(JWKRegistry.import_key(data))
            except (JoseError, ValueError, TypeError):
                continue
    return KeySet(keys)


def checked(
    token: str, keys: KeySet, *, issuer: str, client_id: str, nonce: str, access_token: str
) -> dict[str, Any]:
    """The claims of a token that is valid and meant for this client and this login.

    Raises UnknownKey, SignOnFailed.
    """
    from authlib.oidc.core import CodeIDToken
    from joserfc import jwt
    from joserfc.errors import InvalidKeyIdError, JoseError

    try:
        decoded = jwt.decode(token, keys, algorithms=_ALGORITHMS)
        claims = CodeIDToken(
            decoded.claims,
            decoded.header,
            {
                "iss": {"essential": True, "value": issuer},
                "aud": {"essential": True, "value": client_id},
            },
            {"nonce": nonce, "client_id": client_id, "access_token": access_token},
        )
        claims.validate(leeway=_CLOCKS_DIFFER)
    except InvalidKeyIdError as error:
        raise UnknownKey(_invalid(error)) from error
    except (JoseError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise SignOnFailed(_invalid(error)) from error
    subject = claims["sub"]
    if not isinstance(subject, str) or not 0 < len(subject) <= _MAX_SUBJECT_CHARACTERS:
        raise SignOnFailed(_invalid(ValueError("sub")))
    return dict(claims)


def _invalid(error: Exception) -> str:
    why = type(error).__name__.removesuffix("Error")
    return f"The provider's answer is not valid ({why}), so nobody was logged in: try again."
