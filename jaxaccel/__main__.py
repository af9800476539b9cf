"""``python -m jaxaccel``: the commands."""

import argparse
import os
import sys
from collections.abc import Sequence

import jaxaccel
from jaxaccel._commands._layout import Parser, complain

_DOCTOR = """What is here (machine, packages, devices, settings, caches), what the default device
reaches in matrix products and copies, and what to mend, with the command for it. Takes some
seconds; looks at this machine alone. Status: 0 nothing is broken, 1 something is, 2 bad usage."""
_REPORT = """What an artefact of jx.export.save holds: its signature, its parameters, the transforms
that made it, its files, and whether their hashes hold. Nothing of it is run without --time.
Status: 0 it is whole, 1 it is damaged or no artefact, 2 there is nothing, or bad usage."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the status of the process."""
    options = _parser().parse_args(arguments)
    try:
        status = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        complain(options.command, "interrupted")
        return 130
    except OSError as error:  # of the output alone: whoever reads it has enough, or a full disk
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if isinstance(error, BrokenPipeError):
            return 141
        complain(options.command, error.strerror)
        return 1
    return status


def _parser() -> Parser:
    parser = Parser(
        prog="python -m jaxaccel",
        description="What jaxaccel finds on this machine, and in what it has saved.",
        epilog="`python -m jaxaccel COMMAND --help` tells more of each.",
    )
    parser.add_argument("--version", action="version", version=f"jaxaccel {jaxaccel.__version__}")
    commands = parser.add_subparsers(title="commands", dest="command", required=True)
    doctor = commands.add_parser(
        "doctor", help="what is here, how fast it is, what to mend", description=_DOCTOR
    )
    doctor.add_argument("--json", action="store_true", help="as JSON")
    doctor.add_argument("--quick", action="store_true", help="measure nothing")
    doctor.set_defaults(run=_doctor)
    report = commands.add_parser(
        "report", help="what is in an artefact of jx.export.save", description=_REPORT
    )
    report.add_argument("path", metavar="DIR", help="the folder, or the zip")
    report.add_argument("--json", action="store_true", help="as JSON")
    report.add_argument("--all", action="store_true", help="each parameter, however many")
    report.add_argument("--time", action="store_true", help="load it, and time it at batch 1")
    report.add_argument("--batch", type=_count, metavar="N", help="with --time: at batch N too")
    report.set_defaults(run=_report, parser=report)
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on")
    return int(text)


def _doctor(options: argparse.Namespace) -> int:
    from jaxaccel._commands._doctor import doctor

    return doctor(as_json=options.json, measure=not options.quick)


def _report(options: argparse.Namespace) -> int:
    if options.batch and not options.time:
        options.parser.error("--batch: give --time too")
    try:
        from jaxaccel._commands._report import report
    except Exception as error:  # of JAX, or of what is not installed
        complain("report", f"{error}; `python -m jaxaccel doctor` says what to mend")
        return 1
    batches = [1, *filter(None, [options.batch])] if options.time else []
    return report(options.path, as_json=options.json, every=options.all, batches=batches)


if __name__ == "__main__":
    sys.exit(main())
