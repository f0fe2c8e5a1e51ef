"""The ``fxcompress`` command.

Standard output carries the result, for people or (``--json``) as exactly one JSON document; progress and errors go to
standard error. Exit codes: 0 done, 1 failed, 2 wrong usage or input, 130 interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.main

import fxcompress
from fxcompress import latency_screens, screens
from fxcompress.analysis.cost import cost, node_costs
from fxcompress.backends.bundle import MANIFEST, read_manifest
from fxcompress.backends.bundle_writer import check_output
from fxcompress.backends.registry import backend_class, backend_names
from fxcompress.capture import capture
from fxcompress.compiled import Compiled
from fxcompress.compiler import compile as compile_model
from fxcompress.deployment import verify_bundle
from fxcompress.errors import OptionError, PreconditionError
from fxcompress.footprint import footprint
from fxcompress.graph.info import info
from fxcompress.graph.printer import format_graph
from fxcompress.latency import race
from fxcompress.model_specs import SPEC_FORMS, examples_for, load_checkpoint, load_model
from fxcompress.options import parse_options
from fxcompress.passes.registry import pass_class, pass_names
from fxcompress.recipes import Recipe, dynamic_shapes_of, read_recipe
from fxcompress.reporting.console import print_report
from fxcompress.reporting.model import Report

__all__ = ["app", "main"]

app = typer.Typer(
    name="fxcompress",
    help="Compress PyTorch models: capture one, rewrite it with passes, build an engine, and see what was done.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    add_completion=False,
)

Inputs = Annotated[
    list[str] | None,
    typer.Option("--input", "-i", metavar="SPEC", help="Shape of an example input: 1x3x224x224, ids=2x16:int64."),
]
Dynamic = Annotated[
    bool | None, typer.Option("--dynamic/--no-dynamic", help="Leave the batch size free (default), or fix all sizes.")
]
Shapes = Annotated[
    str | None,
    typer.Option("--dynamic-shapes", metavar="JSON", help='Sizes to leave free: {"x": {"0": "batch", "2": "height"}}.'),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document; errors too.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks and other packages' warnings.")]
# fmt: off
ModelOrNone = Annotated[str | None, typer.Argument(metavar="MODEL", help=SPEC_FORMS + ".")]
Passes = Annotated[list[str] | None, typer.Option("--pass", "-p", metavar="PASS", help="In order: fuse_modules, 'name(option=value)'.")]  # noqa: E501
RecipeFile = Annotated[Path | None, typer.Option("--recipe", "-r", metavar="FILE", help="YAML with these options.")]
BackendName = Annotated[str | None, typer.Option("--backend", "-b", metavar="NAME", help="Build this engine.")]
BackendOptions = Annotated[list[str] | None, typer.Option("--backend-option", "-B", metavar="NAME=VALUE", help="Of the engine: threads=2.")]  # noqa: E501
Output = Annotated[Path | None, typer.Option("--output", "-o", metavar="DIR", help="For the engine's bundle, or the saved graph.")]  # noqa: E501
Checkpoint = Annotated[Path | None, typer.Option("--checkpoint", metavar="FILE", help="Weights, as .safetensors.")]
Verify = Annotated[bool | None, typer.Option("--verify/--no-verify", help="Compare outputs at every step (default).")]
Reports = Annotated[list[Path] | None, typer.Option("--report", metavar="FILE", help="Also write the report: .json or .html.")]  # noqa: E501
# fmt: on


@app.command("compile")
def _compile(
    model: ModelOrNone = None,
    passes: Passes = None,
    recipe: RecipeFile = None,
    backend: BackendName = None,
    backend_options: BackendOptions = None,
    output: Output = None,
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    dynamic_shapes: Shapes = None,
    checkpoint: Checkpoint = None,
    verify: Verify = None,
    reports: Reports = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Rewrite a model with passes, and build an engine or save the graph."""
    told = (read_recipe(recipe) if recipe is not None else Recipe()).overridden(
        model=model,
        passes=passes,
        backend=backend,
        backend_options=backend_options,
        output=output,
        inputs=inputs,
        dynamic=dynamic,
        dynamic_shapes=dynamic_shapes,
        checkpoint=checkpoint,
        verify=verify,
    )
    # All that can be wrong about the command is found before the model is made.
    steps, lowering, given = told.make_passes(), told.make_backend(), told.make_inputs()
    if told.model is None:
        raise OptionError("which model?", where="MODEL", remedy=f"name one: {SPEC_FORMS}")
    if told.output is not None:
        check_output(told.output)
    elif lowering is not None:
        raise OptionError("the engine needs a place", where="--output", remedy=f"add --output MODEL.{lowering.name}")
    for report in reports or ():
        screens.check_report(report)
    with screens.working(f"load {told.model}"):
        source = load_model(told.model)
        if told.checkpoint is not None:
            load_checkpoint(source.model, told.checkpoint)
            source = dataclasses.replace(source, weights=f"weights of {told.checkpoint}")
    with screens.working():
        compiled = compile_model(
            source.model,
            steps,
            examples_for(source, given, needed=lowering is not None),
            dynamic_shapes=told.dynamic_shapes,
            backend=lowering,
            output=told.output,
            verify=told.verify,
        )
    for report in reports or ():
        compiled.report.save(report)
    show = screens.compiled_json if as_json else screens.compiled_screen
    show(compiled, source, told.output, reports or [])


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(metavar="MODEL|BUNDLE", help=SPEC_FORMS + ", or of an engine.")],
    inputs: Inputs = None,
    dynamic: Dynamic = None,
    dynamic_shapes: Shapes = None,
    batch: Annotated[int, typer.Option(min=1, help="Batch size that costs are counted at.")] = 1,
    graph: Annotated[bool, typer.Option("--graph/--no-graph", help="Print the graph.")] = True,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show a model's graph and what it costs, or what a bundle holds."""
    console, document = screens.console(), {}
    if (Path(model) / MANIFEST).exists():
        manifest = read_manifest(model)
        document = {"bundle": model, "manifest": json.loads(manifest.to_json())}
        if not as_json:
            screens.bundle_screen(model, manifest, console)
        if manifest.kind == "engine":
            if as_json:
                screens.print_json(document)
            return
    given = Recipe().overridden(inputs=inputs).make_inputs()
    shapes = dynamic_shapes_of(dynamic, dynamic_shapes)
    with screens.working(f"capture {model}"):
        source = load_model(model)
        examples = examples_for(source, given)
        captured = (
            source.model.module
            if isinstance(source.model, Compiled)
            else capture(source.model, examples, dynamic_shapes=shapes)
        )
        rows, total = screens.costs_by_kind(node_costs(captured, batch=batch)), cost(captured, batch=batch)
    notes = list(info(captured).notes)
    if examples is None and total.macs is None:
        notes.append("shapes are unknown without example inputs: give them with --input")
    if as_json:
        document |= {"model": source.spec, "weights": source.weights, "graph": format_graph(captured)}
        document |= {"layers": rows, "total": dataclasses.asdict(total), "batch": batch, "notes": notes}
        screens.print_json(document)
        return
    if graph:
        console.print(format_graph(captured), soft_wrap=True)
    screens.cost_screen(rows, total, batch, console)
    for note in notes:
        console.print(f"note: {note}")
    screens.weights_screen(source, console)


@app.command()
def benchmark(
    candidates: Annotated[list[str], typer.Argument(metavar="BUNDLE|MODEL...", help="The first is compared with.")],
    threads: Annotated[int | None, typer.Option(min=1, help="For all of them; default: PyTorch's.")] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Batch size; default: 1, or that of --input.")] = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-n", min=2, help="Calls measured of each.")] = 50,
    warmup: Annotated[int, typer.Option(min=0, help="Calls before those of each turn.")] = 5,
    options: BackendOptions = None,
    memory: Annotated[bool, typer.Option(help="Measure memory too, each candidate in a process of its own.")] = True,
    inputs: Inputs = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure latency and memory of engines, saved graphs and models (in eager PyTorch), in turns in one run."""
    given = Recipe().overridden(inputs=inputs).make_inputs()
    told = parse_options(options or (), where="--backend-option")
    with screens.working(f"measure {', '.join(candidates)}"):
        asked: dict[str, Any] = {"threads": threads, "options": told}
        found = race(candidates, inputs=given, batch=batch, repetitions=repetitions, warmup=warmup, **asked)
        asked["threads"] = found.result.threads
        measured = found.candidates if memory else ()
        taken = {item.name: footprint(item.spec, found.inputs, **asked) for item in measured}
    if as_json:
        screens.print_json(latency_screens.latency_json(found, taken))
    else:
        latency_screens.latency_screen(found, taken, screens.console())


@app.command()
def verify(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Of an engine, with reference data.")],
    options: BackendOptions = None,
    repetitions: Annotated[int, typer.Option("--repetitions", "-n", min=2, help="Calls measured.")] = 50,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a deployed engine: every file's hash, outputs against the reference in the bundle, latency here."""
    told = parse_options(options or (), where="--backend-option")
    with screens.working(f"verify {bundle}"):
        found = verify_bundle(bundle, told, repetitions=repetitions)
    if as_json:
        screens.print_json(found.to_dict())
    else:
        latency_screens.verified_screen(str(bundle), found, screens.console())


@app.command()
def report(
    path: Annotated[Path, typer.Argument(metavar="FILE|BUNDLE", help="A report's JSON, or a saved graph.")],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write it as one HTML page.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show the report of an earlier compile again, or turn it into an HTML page."""
    if html is not None:
        screens.check_report(html)
    if (path / MANIFEST).exists():
        manifest = read_manifest(path)
        if manifest.kind == "engine":
            raise PreconditionError(
                "an engine's bundle holds no report",
                where=str(path),
                remedy="fxcompress inspect shows what it holds; compile with --report report.json to keep the report",
            )
        path = path / "report.json"
    found = Report.load(path)
    if html is not None:
        found.save(html)
    if as_json:
        screens.print_json(found.to_dict())
    elif html is None:
        print_report(found, screens.console())
    else:
        screens.console().print(f"written: {html}")


@app.command()
def passes(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the passes with their options."""
    screens.listing("pass", {name: pass_class(name) for name in pass_names()}, as_json)


@app.command()
def backends(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the backends with their options."""
    screens.listing("backend", {cls.name: cls for cls in map(backend_class, backend_names())}, as_json)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fxcompress {fxcompress.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_version, help="Show the version.")
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: without the program's name; None takes the command line's.

    Returns:
        the exit code.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    as_json, debug = "--json" in given, "--debug" in given
    try:
        with nullcontext() if debug else screens.quiet():
            code = typer.main.get_command(app).main(given, prog_name="fxcompress", standalone_mode=not as_json)
        return int(code or 0)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 0
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        if debug:
            raise
        return screens.fail(error, as_json)


if __name__ == "__main__":
    sys.exit(main())
