"""The `alignlens` command. Each verb lives in a file of `analyses/commands`; nothing heavy is
imported before the command line has been understood."""

import logging
import sys
import warnings
from typing import Annotated

import typer

from analyses.commands import (
    bisect,
    capture,
    circuit,
    diff,
    drift,
    export,
    import_vector,
    inspect,
    lens,
    mechanism_diff,
    models,
    offsets,
    patch,
    probe,
    report,
    scan,
    serve_args,
    shift,
    steer,
    subspace,
    sweep,
    tradeoff,
    verify,
)

app = typer.Typer(
    name="alignlens",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # square brackets in help are text, and rich takes its time
    context_settings={"help_option_names": ["-h", "--help"]},
    help="What alignment changed in a language model, where it lives, how far it drifted.",
    epilog="Start with: alignlens report",
)


@app.callback()
def options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""


app.command("report")(report.report)
app.command("shift")(shift.shift)
app.command("subspace")(subspace.subspace)
app.command("drift")(drift.drift)
app.command("bisect")(bisect.bisect)
app.command("diff")(diff.diff)
app.command("patch")(patch.patch)
app.command("circuit")(circuit.circuit)
app.command("lens")(lens.lens)
app.command("mechanism-diff")(mechanism_diff.mechanism_diff)
app.command("capture")(capture.capture)
app.command("probe")(probe.probe)
app.command("scan")(scan.scan)
app.command("offsets")(offsets.offsets)
app.command("tradeoff")(tradeoff.tradeoff)
app.command("steer")(steer.steer)
app.command("sweep")(sweep.sweep)
app.command("export")(export.export)
app.command("verify")(verify.verify)
app.command("serve-args")(serve_args.serve_args)
app.command("import")(import_vector.import_vector)
app.command("inspect")(inspect.inspect)
app.command("models")(models.models)


def main() -> None:
    """Run a command; a user's mistake is one sentence on stderr and exit code 2."""
    debug = "--debug" in sys.argv
    if not debug:
        warnings.filterwarnings("ignore", category=FutureWarning)  # of libraries, about libraries
        warnings.formatwarning = lambda message, *_args, **_named: f"warning: {message}\n"
        # where these are installed, loading any model imports them, and they log what they lack
        for library in ("torchao", "torch.utils._pytree", "bitsandbytes"):
            logging.getLogger(library).setLevel(logging.ERROR)
    arguments = [a for a in sys.argv[1:] if a != "--debug"]  # allowed anywhere
    try:
        app(args=arguments)
    except KeyboardInterrupt:
        _say("stopped; run the same command again to go on")
        raise SystemExit(130) from None
    except (ValueError, TypeError, KeyError, OSError, RuntimeError, MemoryError) as error:
        if debug:
            raise
        text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
        _say(f"error: {text or type(error).__name__}")
        raise SystemExit(2) from None


def _say(text: str) -> None:
    sys.stderr.write(text + "\n")


if __name__ == "__main__":
    main()
