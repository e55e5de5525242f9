"""The command `mpc`, also installed as `enclave-mpc`: it finds the command's module and turns errors into a line.

Exit status: 0 done, 1 refused (a peer, a document, a contract), 2 misuse or a file that cannot be used, 130 Ctrl-C.
"""

import json
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Sequence
from importlib import import_module
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn, cast

import click

from mpc.cli.output import printable
from mpc.protocol.errors import LocalError, MpcError

# Name → where it is, and its line in the help: nothing is imported for that.
COMMANDS = {
    "run": ("mpc.cli.run:run", "Run a whole session on this machine, one process for each party."),
    "check": ("mpc.cli.check:check", "Say what a scenario would disclose, to whom and under which rules."),
    "init": ("mpc.cli.init:init", "Copy a scenario to start from."),
    "verify": ("mpc.cli.verify:verify", "Verify a receipt or an attestation document, offline."),
    "inspect": ("mpc.cli.inspect:inspect", "Show what a file says, without verifying it."),
    "measure": ("mpc.cli.measure:measure", "Print the measurements (PCRs) of an enclave image."),
    "image": ("mpc.cli.image:image", "Build enclave images."),
    "fuzz": ("mpc.cli.fuzz:fuzz", "Attack a scenario's rounds in memory, and check ten invariants."),
    "explore": ("mpc.cli.explore:explore", "Visit every state of a small session, and check ten invariants."),
    "doctor": ("mpc.cli.doctor:doctor", "Say what this machine lacks, and how to mend it."),
}
BUG = "this is a bug; with MPC_DEBUG=1 in the environment its traceback is shown"


class LazyGroup(click.Group):
    """A group whose commands are imported when they are called."""

    def list_commands(self, _: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, _: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, attribute = COMMANDS[cmd_name][0].split(":")
        return cast(click.Command, getattr(import_module(module), attribute))

    def format_commands(self, _: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, about) for name, (_, about) in COMMANDS.items()])


def _version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        click.echo(f"enclave-mpc {installed_version()}")
        ctx.exit()


def installed_version() -> str:
    from importlib import metadata  # 25 ms that help does not need

    try:
        return metadata.version("enclave-mpc")
    except metadata.PackageNotFoundError:
        return "(a checkout that is not installed)"


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Start with: mpc run salaries. Each command's --help has examples.",
)
@click.option("-q", "--quiet", is_flag=True, help="Results and errors only.")
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Print the version and exit."
)
def mpc(quiet: bool) -> None:
    """Compute together on data that nobody may show, in an enclave that everybody has verified."""


def execute(arguments: Sequence[str], program: str = "mpc") -> int:
    """Run one command line and give its exit status; raises nothing."""
    try:
        status = mpc.main(list(arguments), prog_name=program, standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except SystemExit as error:
        return error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException as error:
        if os.environ.get("MPC_DEBUG"):
            traceback.print_exc()
        return _report(error, "--json" in arguments)
    return status if isinstance(status, int) else 0


def main() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        cast(TextIOWrapper, stream).reconfigure(errors="replace")  # where a terminal is not UTF-8
    program = Path(sys.argv[0]).name
    status = execute(sys.argv[1:], program if program == "enclave-mpc" else "mpc")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # nothing is left to interrupt, and the status is this one
    sys.exit(status)


def _report(error: BaseException, as_json: bool) -> int:
    """One line for a person, one document for a machine; gives the exit status."""
    causes = list(_leaves(error))
    if any(isinstance(cause, KeyboardInterrupt | click.Abort) for cause in causes):
        return 130
    told = next((cause for cause in causes if isinstance(cause, MpcError)), causes[0])
    if isinstance(told, click.exceptions.NoArgsIsHelpError):
        told.show()
        return 2
    text, status = _words(told)
    sys.stderr.write(f"mpc: {'refused: ' if status == 1 else ''}{printable(text)}\n")
    if as_json:
        said: dict[str, object] = {"status": "refused" if status == 1 else "error", "reason": text}
        if isinstance(told, MpcError):
            said |= {"step": told.step, "peer": told.peer}
        sys.stdout.write(json.dumps(said) + "\n")
    return status


def _words(error: BaseException) -> tuple[str, int]:
    if isinstance(error, MpcError):
        return str(error), 2 if isinstance(error, LocalError) else 1
    if isinstance(error, click.UsageError):
        path = error.ctx.command_path if error.ctx else "mpc"
        return f"{error.format_message().rstrip('.')} (see: {path} --help)", 2
    if isinstance(error, click.ClickException):
        return error.format_message(), 2
    if isinstance(error, OSError) and error.filename is not None:
        return f"{os.fsdecode(error.filename)}: {error.strerror}", 2
    frame = traceback.extract_tb(error.__traceback__)[-1:]
    place = f" in {Path(frame[0].filename).name}, line {frame[0].lineno}" if frame else ""
    return f"{type(error).__name__}{place}: {BUG}", 2  # not its text, which may quote data


def _leaves(error: BaseException) -> Iterator[BaseException]:
    """The errors in a group of errors, which is what concurrent tasks raise."""
    if isinstance(error, BaseExceptionGroup):
        for member in error.exceptions:
            yield from _leaves(member)
    else:
        yield error


if __name__ == "__main__":
    main()
