"""Signatures of bundles: ed25519 over the bytes of manifest.json, which has a hash of every other file.

Keys are PEM files, as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path
from typing import Any

from qwen_export.errors import BundleError, ParameterError
from qwen_export.extras import needed_for
from qwen_export.manifest import MANIFEST, SIGNATURE

_LARGEST_KEY = 1 << 16


def sign_bundle(bundle: Path, key: Path) -> None:
    """Write the signature of a bundle's manifest. `key` is the private key."""
    with needed_for("signing a bundle"):
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        private = load_pem_private_key(_read(key, "sign"), None)
    except (ValueError, TypeError) as error:
        raise _bad_key(key, "sign", "a private key in PEM without a password", error) from error
    if not isinstance(private, Ed25519PrivateKey):
        raise _bad_key(key, "sign", "an ed25519 key", type(private).__name__)
    signature = private.sign((bundle / MANIFEST).read_bytes())
    (bundle / SIGNATURE).write_text(base64.b64encode(signature).decode() + "\n", encoding="ascii")


def check_key(key: Path) -> None:
    """Raise ParameterError, before any work, for a file that `sign_bundle` could not use."""
    with needed_for("signing a bundle"):
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

    try:
        load_pem_private_key(_read(key, "sign"), None)
    except (ValueError, TypeError) as error:
        raise _bad_key(key, "sign", "a private key in PEM without a password", error) from error


def check_signature(bundle: Path, key: Path | None) -> str:
    """Raise BundleError unless the owner of the public key has signed the manifest as it is. Returns what was found, for people: ""
    without a signature and without a key."""
    if key is None:
        return "signed; give the key of its maker to check that" if (bundle / SIGNATURE).is_file() else ""
    with needed_for("check with a key"):
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        public: Any = load_pem_public_key(_read(key, "key"))
    except ValueError as error:
        raise _bad_key(key, "key", "a public key in PEM", error) from error
    if not isinstance(public, Ed25519PublicKey):
        raise _bad_key(key, "key", "an ed25519 key", type(public).__name__)
    path = bundle / SIGNATURE
    if not path.is_file():
        raise BundleError("the bundle is not signed", where=str(bundle), fix="Get it from its maker again, or check it without {key}.")
    try:
        public.verify(base64.b64decode(path.read_bytes()[:_LARGEST_KEY].strip(), validate=True), (bundle / MANIFEST).read_bytes())
    except (InvalidSignature, binascii.Error, ValueError) as error:
        raise BundleError(
            "the signature is not of this manifest by this key",
            where=str(path),
            got=key.name,
            fix="Do not use the bundle until its maker has confirmed it.",
        ) from error
    return f"signed by the owner of {key.name}"


def _read(key: Path, parameter: str) -> bytes:
    try:
        with key.open("rb") as file:
            return file.read(_LARGEST_KEY)
    except OSError as error:
        raise ParameterError(
            "the key cannot be read", parameter=parameter, where=str(key), got=error.strerror, fix="Check the path."
        ) from error


def _bad_key(key: Path, parameter: str, expected: str, got: object) -> ParameterError:
    return ParameterError(
        "the file is no key that can be used here",
        parameter=parameter,
        where=str(key),
        got=got,
        expected=expected,
        fix="Make a key with `openssl genpkey -algorithm ed25519`; `openssl pkey -pubout` writes its public part.",
    )
