"""`mpc image`: build enclave images."""

from pathlib import Path

import click

from mpc.cli.files import PATH
from mpc.cli.output import GOOD, Output, examples, with_output


@click.group()
def image() -> None:
    """Build enclave images."""


@image.command(epilog=examples("mpc image build", "mpc image build --variant core -o core.eif"))
@click.option("--variant", default="sql", show_default=True, help="Which image: what kind of program it runs.")
@click.option("-o", "--output", type=PATH, metavar="FILE", help="Write the image here, and not into the cache.")
@with_output
def build(out: Output, variant: str, output: Path | None) -> int:
    """Build the image of the local backend from this installation's files, the same bytes each time.

    Exit status: 0 built; 2 a file is missing or was changed, or the image cannot be written.
    """
    from mpc.image import build as builder
    from mpc.image import cache

    path, pcrs = (output, builder.build(variant, output)) if output else cache.cached_image(variant)
    out.verdict("built", f"{path}", GOOD)
    out.line()
    out.facts(pcrs.shown().items())
    out.document({"image": str(path), "variant": variant, "bytes": path.stat().st_size, "Measurements": pcrs.shown()})
    return 0
