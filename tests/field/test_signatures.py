"""The manifest has a digest, and may have a signature."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from qwen_export.bundles.packaging import package
from qwen_export.bundles.signatures import check_signature, sign_bundle
from qwen_export.commands.cli import main
from qwen_export.errors import BundleError, ParameterError
from qwen_export.manifest import DIGEST, MANIFEST, SIGNATURE, load_manifest, manifest_digest, write_manifest
from qwen_export.runtimes import load
from tests.support.manifests import edit_manifest


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, Path]:
    """A private and its public key."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    private = Ed25519PrivateKey.generate()
    paths = tmp_path / "private.pem", tmp_path / "public.pem"
    paths[0].write_bytes(private.private_bytes(form.Encoding.PEM, form.PrivateFormat.PKCS8, form.NoEncryption()))
    paths[1].write_bytes(private.public_key().public_bytes(form.Encoding.PEM, form.PublicFormat.SubjectPublicKeyInfo))
    return paths


def test_one_changed_character_of_an_offset_is_found(bundle_copy: Path) -> None:
    """It would give other logits, with every other file whole."""
    path = bundle_copy / MANIFEST
    path.write_text(path.read_text().replace('"offset": 65536', '"offset": 61440', 1))
    with pytest.raises(BundleError, match=r"manifest was changed or damaged.*manifest\.sha256"):
        load(bundle_copy)


def test_a_manifest_without_its_digest_is_refused(bundle_copy: Path) -> None:
    (bundle_copy / DIGEST).unlink()
    with pytest.raises(BundleError, match="digest of the manifest is missing"):
        load(bundle_copy)


def test_check_and_inspect_show_the_digest(tiny_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    digest = manifest_digest(tiny_bundle)
    assert (tiny_bundle / DIGEST).read_text() == f"{digest}  {MANIFEST}\n"
    for command in ("check", "inspect"):
        main([command, str(tiny_bundle)])
        assert digest in capsys.readouterr().out


def test_an_interrupted_rewrite_leaves_a_whole_bundle(bundle_copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment: the digest accepts the manifest that is there."""
    import os

    manifest, replace = load_manifest(bundle_copy), os.replace
    for survivors in range(3):
        count = 0

        def stopped(source: object, target: object, allowed: int = survivors) -> None:
            nonlocal count
            count += 1
            if count > allowed:
                raise KeyboardInterrupt
            replace(source, target)  # type: ignore[arg-type]

        monkeypatch.setattr(os, "replace", stopped)
        with pytest.raises(KeyboardInterrupt):
            write_manifest(bundle_copy, manifest.__class__(**{**manifest.__dict__, "source": {"architecture": f"changed {survivors}"}}))
        monkeypatch.setattr(os, "replace", replace)
        load_manifest(bundle_copy)


def test_a_signature_is_checked_with_the_key(
    tiny_bundle: Path, tmp_path: Path, keys: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    private, public = keys
    signed = package(tiny_bundle, tmp_path / "signed", sign=private)
    main(["check", str(signed), "--key", str(public), "--json"])
    assert json.loads(capsys.readouterr().out)["manifest"]["signature"] == "signed by the owner of public.pem"
    edit_manifest(signed, lambda manifest: manifest.update(producer="another maker"))
    load(signed)
    with pytest.raises(BundleError, match="signature is not of this manifest"):
        check_signature(signed, public)
    with pytest.raises(BundleError, match="not signed"):
        check_signature(tiny_bundle, public)


def test_what_changes_a_manifest_removes_its_signature(bundle_copy: Path, keys: tuple[Path, Path]) -> None:
    sign_bundle(bundle_copy, keys[0])
    write_manifest(bundle_copy, load_manifest(bundle_copy))
    assert not (bundle_copy / SIGNATURE).exists()


@pytest.mark.parametrize("content", [b"", b"-----BEGIN", b"\xff" * 100, b"-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
def test_a_file_that_is_no_key(bundle_copy: Path, tmp_path: Path, content: bytes) -> None:
    key = tmp_path / "key.pem"
    key.write_bytes(content)
    with pytest.raises(ParameterError, match="no key that can be used"):
        sign_bundle(bundle_copy, key)
    with pytest.raises(ParameterError, match="no key that can be used"):
        check_signature(bundle_copy, key)
    with pytest.raises(ParameterError, match="cannot be read"):
        check_signature(bundle_copy, tmp_path / "nowhere")


@pytest.mark.parametrize("signature", [b"", b"AAAA", b"\xff\xfe", b"not base64!"])
def test_a_damaged_signature(bundle_copy: Path, keys: tuple[Path, Path], signature: bytes) -> None:
    (bundle_copy / SIGNATURE).write_bytes(signature)
    with pytest.raises(BundleError, match="signature is not of this manifest"):
        check_signature(bundle_copy, keys[1])
