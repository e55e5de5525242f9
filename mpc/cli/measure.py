"""`mpc measure`: the PCRs of an enclave image, or of the image that this installation would give."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mpc.cli.files import PATH
from mpc.cli.image import boot, boot_options
from mpc.cli.output import BAD, CAUTION, GOOD, Output, examples, with_output
from mpc.protocol.errors import LocalError

if TYPE_CHECKING:
    from mpc.image.build import Boot


@click.command(
    epilog=examples(
        "mpc measure                               the image that `mpc run` launches",
        "mpc measure enclave.eif --json            as nitro-cli describe-eif prints it",
        "mpc measure --from-source                 what this installation's files must measure",
        "mpc measure enclave.eif --from-source     is this image that source?",
        "mpc measure nitro.eif --from-source --application-only",
        "mpc measure --from-source --backend nitro --kernel bzImage --cmdline '…' --ramdisk boot.cpio",
    )
)
@click.argument("image", type=PATH, required=False)
@click.option("--from-source", is_flag=True, help="Measure this installation's files; with IMAGE: compare.")
@click.option("--variant", default="sql", show_default=True, help="Which image of this installation.")
@click.option(
    "--application-only", is_flag=True, help="Compare the application (PCR2) only, not what a nitro image boots."
)
@boot_options
@with_output
def measure(
    out: Output, /, image: Path | None, from_source: bool, variant: str, application_only: bool, **options: Any
) -> int:
    """Print the measurements (PCRs) of IMAGE, an EIF file, or of this installation's own.

    Exit status: 0 measured; 1 IMAGE is not what this installation gives (--from-source); 2 not an image.
    """
    from mpc.image import build, cache
    from mpc.image.measure import describe

    out.quiet = False  # all that it prints is its result
    chosen = boot(**options)
    if chosen is not None and not from_source:
        raise LocalError("--backend nitro and its options say what --from-source measures; an image says that itself")
    if image is None and from_source:
        pcrs = (build.measure_installation(variant, chosen) if chosen else cache.measure_from_source(variant)).shown()
        _show(out, f"{variant}, from this installation's files", pcrs)
        out.document({"Measurements": {"HashAlgorithm": "Sha384 { ... }", **pcrs}})
        return 0
    path = image or cache.cached_image(variant)[0]
    described = describe(path)
    if from_source:
        return _compare(out, path, variant, described, chosen, application_only=application_only)
    _show(out, str(path), _pcrs(described))
    _about(out, described)
    out.document(described)
    return 0


def _compare(
    out: Output, image: Path, variant: str, described: dict[str, Any], chosen: "Boot | None", *, application_only: bool
) -> int:
    from mpc.image import build, eif, standin

    with eif.opened(image) as opened:
        if chosen is None and not application_only and opened.read(opened.of(eif.Kind.CMDLINE)[0]) != standin.CMDLINE:
            raise LocalError(
                f"{image}: boots a kernel and a ramdisk that are no files of this installation; name them with "
                "--backend nitro, --kernel, --cmdline and --ramdisk, or compare the rest with --application-only"
            )
    part = application_only
    difference = build.compare(image, variant, chosen, application_only=part)
    what = f"the application of {image}" if part else str(image)
    if difference is None:
        out.verdict("same", f"{what} is what this installation's {variant} files give", GOOD)
    else:
        out.verdict("different", f"{what} is not what this installation's {variant} files give", BAD)
        out.facts([("first difference", difference)])
    if part:
        remedy = "compared with --backend nitro, --kernel, --cmdline and --ramdisk"
        out.points([f"Kernel, command line and bootstrap ramdisk were not compared; they are {remedy}."], "!", CAUTION)
    _show(out, "", _pcrs(described))
    compared = "application" if part else "image"
    out.document({"same": difference is None, "compared": compared, "first_difference": difference, **described})
    return 0 if difference is None else 1


def _pcrs(described: dict[str, Any]) -> dict[str, str]:
    return {name: value for name, value in described["Measurements"].items() if name.startswith("PCR")}


def _show(out: Output, title: str, pcrs: dict[str, str]) -> None:
    if title:
        out.line(title, "bold")
    out.line()
    meaning = {"PCR0": "whole image", "PCR1": "kernel, boot", "PCR2": "application", "PCR8": "signer"}
    for name, value in pcrs.items():
        out.facts([(f"{name}  {meaning.get(name, '')}", value)])


def _about(out: Output, described: dict[str, Any]) -> None:
    rows = [
        (label, " ".join(str(described[key]).split()))  # in one line, so that it shows nothing else
        for label, key in (("name", "ImageName"), ("version", "ImageVersion"))
        if key in described
    ]
    signer = described.get("SigningCertificate", {}).get("IssuerName")
    rows.append(("signed", ", ".join(signer.values()) if signer else "by nobody"))
    out.line()
    out.facts(rows)
