"""``toolchain bundle``, ``install``, ``rollback`` and ``compile-on-device``: artifacts that travel."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from runtimes import install as installing
from toolchain import console
from toolchain.bundle import bundle as make_bundle
from toolchain.platforms import PLATFORMS
from toolchain.signing import SigningKey
from toolchain.tables import table

bundling = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

Json = Annotated[bool, typer.Option("--json", help="print the result as one line of JSON")]
Root = Annotated[Path, typer.Argument(help="the folder of versions", show_default=False)]
Keep = Annotated[int, typer.Option(help="versions that stay, at least 2")]


@bundling.command()
def bundle(
    artifact: Annotated[Path, typer.Argument(help="the folder that a build wrote", show_default=False)],
    platform: Annotated[str, typer.Option("--for", help=", ".join(PLATFORMS), show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help=".tar.zst, .tar.gz or .tar", show_default=False)],
    sign: Annotated[Path | None, typer.Option(help="a private key in PEM to sign with", show_default=False)] = None,
    certificate: Annotated[
        Path | None, typer.Option(help="the certificate of that key: signs with it", show_default=False)
    ] = None,
    chain: Annotated[
        list[Path] | None, typer.Option(help="certificates between it and the root; repeat", show_default=False)
    ] = None,
    ort_format: Annotated[
        bool | None,
        typer.Option("--ort-format/--no-ort-format", help="add ORT format", show_default="where it is usual"),
    ] = None,
    json: Json = False,
) -> None:
    """Packs what of an artifact a kind of device can run into one file."""
    key = None if sign is None else SigningKey(key=sign, certificate=certificate, chain=tuple(chain or ()))
    if key is None and (certificate is not None or chain):
        raise typer.BadParameter("a certificate signs nothing without its key: add --sign KEY.pem")
    with console.status("bundling") as on_status:
        done = make_bundle(
            artifact, output, platform=platform, key=key, with_ort_format=ort_format, on_status=on_status
        )
    if json:
        choices = [{"variant": c.variant.name, "fate": c.fate, "why": c.why} for c in done.choices]
        console.print_json(
            {"path": str(done.path), "size": done.size, "unpacked": done.unpacked, "digest": done.digest,
             "platform": done.platform, "variants": choices, "ort_format": done.ort_format, "signed": done.signed}
        )  # fmt: skip
        return
    rows: list[tuple[str, ...]] = [(c.variant.name, str(c.variant.target), c.fate, c.why or "-") for c in done.choices]
    if done.ort_format:
        rows.append(("in ORT format", "ort-cpu", "added", f"needs ONNX Runtime {done.ort_format} or later"))
    console.out.print(table((f"{artifact} for {platform}", ("variant", "target", "goes along", "why"), rows)))
    note = PLATFORMS[platform].note
    if note:
        console.out.print(Text(f"{platform}: {note}"))
    signed = "signed" if done.signed else "not signed: devices cannot tell who made it (--sign KEY.pem)"
    console.out.print(
        Text(f"wrote {done.path}, {done.size / 1e6:,.1f} MB, {done.unpacked / 1e6:,.1f} MB unpacked; {signed}")
    )


@bundling.command()
def install(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="what `toolchain bundle` wrote", show_default=False)],
    to: Annotated[Path, typer.Option(help="the folder of its versions", show_default=False)],
    verify: Annotated[
        Path | None, typer.Option(help="the public key whose signature there has to be", show_default=False)
    ] = None,
    root_certificate: Annotated[
        list[Path] | None, typer.Option(help="or: who vouches for the certificate that signed", show_default=False)
    ] = None,
    keep: Keep = installing.KEEP,
    json: Json = False,
) -> None:
    """Unpacks a bundle, tests it here, and puts it into service; the version before is kept."""
    signer = None
    if verify is not None or root_certificate:
        signer = installing.Signer(key=verify, roots=tuple(root_certificate or ()))
    with console.status(f"installing {path.name}"):
        done = installing.install(path, to, signer=signer, keep=keep)
    _show(done, json)


@bundling.command()
def rollback(
    root: Root,
    to: Annotated[
        int | None, typer.Option(help="this version; also forward again", show_default="the one before")
    ] = None,
    json: Json = False,
) -> None:
    """Puts the version before back into service."""
    _show(installing.rollback(root, to=to), json)


@bundling.command(name="compile-on-device")
def compile_on_device(root: Root, keep: Keep = installing.KEEP, json: Json = False) -> None:
    """Builds here the engines that a bundle brought as graphs, tests them, and puts them into service."""
    with console.status("building") as on_status:
        done = installing.compile_here(root, keep=keep, on_status=on_status)
    _show(done, json)


def _show(done: installing.Installed, json: bool) -> None:
    if json:
        console.print_json({
            "root": str(done.root), "version": done.version, "name": done.name, "digest": done.digest,
            "signed_by": done.signed_by, "tested": done.tested, "removed": done.removed,
        })  # fmt: skip
        return
    if done.tested:
        rows = [
            (
                t.variant,
                "not here" if t.why_not else "passed",
                t.why_not or ("-" if t.error is None else f"{t.error:.1e}"),
            )
            for t in done.tested
        ]
        console.out.print(table(("Self-test", ("variant", "result", "error"), rows)))
    if done.signed_by:
        console.out.print(Text(f"signed by {done.signed_by}"))
    console.out.print(Text(f"version {done.version} of {done.name} is in service: runtimes.load({str(done.root)!r})"))
