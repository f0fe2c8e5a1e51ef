"""Build the engine of this bundle on the device that it is for. Needs Python 3.8, numpy and TensorRT 10 or newer.

    python build_engine.py                 # writes BUNDLE.engine beside the bundle
    python run_engine.py                   # checks it against PyTorch's results, and times it

TensorRT for RTX can also build ahead of time, on a machine without a GPU: --compute-capability sm86, once for each.
Exit codes: 0 built, 1 TensorRT could not build it, 2 this bundle, machine or command line is not as it has to be.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import tensorrt

HERE = Path(__file__).resolve().parent
LIBRARIES = ("tensorrt", "tensorrt_rtx")


class Unfit(Exception):
    """This bundle, machine or command line is not as it has to be."""


def read_facts(bundle: Path) -> dict[str, Any]:
    """What the bundle says about its model; its files are checked against the manifest's hashes first."""
    try:
        files = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))["files"]
        facts = json.loads((bundle / "tensorrt.json").read_text(encoding="utf-8"))
        hashes = {str(name): record["sha256"] for name, record in files.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Unfit(f"this is no whole bundle: {error}") from error
    for name, wanted in hashes.items():
        digest = hashlib.sha256()
        try:
            with (bundle / name).open("rb") as file:
                for block in iter(lambda: file.read(1 << 20), b""):
                    digest.update(block)
        except OSError as error:
            raise Unfit(f"a file of the bundle is missing: {error}") from error
        if digest.hexdigest() != wanted:
            raise Unfit(f"{name} was altered or truncated: copy the bundle again")
    if facts.get("build_on") != "device":
        raise Unfit("this bundle holds an engine already; it needs no building")
    return facts


def engine_path(bundle: Path, given: str | None) -> Path:
    """Where the engine is: beside the bundle, since a bundle takes no further files."""
    return Path(given) if given else bundle.parent / f"{bundle.name}.engine"


def find_library(name: str | None) -> Any:
    """Import TensorRT, or TensorRT for RTX."""
    problems = []
    for candidate in [name] if name else LIBRARIES:
        try:
            module = importlib.import_module(candidate)
        except (ImportError, OSError) as error:
            problems.append(f"{candidate}: {error}")
            continue
        if hasattr(module, "Builder"):
            return module
        problems.append(f"{candidate}: it has no Builder")
    raise Unfit("no TensorRT can be imported ({}); on Jetson it comes with JetPack".format("; ".join(problems)))


def make_logger(trt: Any, verbose: bool) -> Any:
    """Warnings and errors of the library, or everything."""
    return trt.Logger(trt.Logger.VERBOSE if verbose else trt.Logger.WARNING)


def check_version(trt: Any, facts: dict[str, Any]) -> list[str]:
    """Refuse a library that cannot work; say what was not tried."""
    found = str(trt.__version__)
    name = trt.__name__.partition(".")[0]
    least = facts["needs"].get(name, "0")
    if _numbers(found) < _numbers(least):
        raise Unfit(f"{name} {found} is too old: this bundle needs {least} or newer, for strongly typed networks")
    if facts["version"] and (name, found) != (facts["library"], facts["version"]):
        return [f"this is {name} {found}; the model was read by {facts['library']} {facts['version']} before"]
    return []


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".")[:2] if part.isdigit())


def build(trt: Any, bundle: Path, facts: dict[str, Any], options: argparse.Namespace) -> bytes:
    """The serialized engine."""
    logger = make_logger(trt, options.verbose)
    builder: tensorrt.Builder = trt.Builder(logger)
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network: tensorrt.INetworkDefinition = builder.create_network(0 if flag is None else 1 << int(flag))
    parser: tensorrt.OnnxParser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(bundle / "model.onnx")):
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        raise RuntimeError("the parser refuses the model: " + "; ".join(map(_told, errors)))
    config: tensorrt.IBuilderConfig = builder.create_builder_config()
    configure(trt, config, facts["options"], options)
    set_targets(trt, config, options.compute_capability or [])
    for told in facts["profiles"]:
        profile: tensorrt.IOptimizationProfile = builder.create_optimization_profile()
        for name, shapes in told["shapes"].items():
            profile.set_shape(name, *[tuple(shape) for shape in shapes])  # type: ignore[arg-type,unused-ignore]
        if config.add_optimization_profile(profile) < 0:
            raise RuntimeError(f"the profile is refused: {told['sizes']}")
    cache: tensorrt.ITimingCache | None = None
    if options.timing_cache:
        path = Path(options.timing_cache)
        cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
        if not config.set_timing_cache(cache, False):
            raise Unfit(f"{path} is of another device or version: give another file")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise RuntimeError("TensorRT could not build the engine; its errors are above")
    if cache is not None:
        Path(options.timing_cache).write_bytes(bytes(config.get_timing_cache().serialize()))
    return bytes(plan)


def configure(trt: Any, config: tensorrt.IBuilderConfig, told: dict[str, Any], options: argparse.Namespace) -> None:
    """Set what the bundle asks for; what the library lacks is an error."""
    for name in ("sparse_weights", "version_compatible"):
        if told[name]:
            config.set_flag(_known(trt.BuilderFlag, name.upper()))
    if hasattr(trt.BuilderFlag, "TF32"):
        (config.set_flag if told["tf32"] else config.clear_flag)(trt.BuilderFlag.TF32)
    if told["hardware_compatibility"] != "none":
        config.hardware_compatibility_level = _known(
            trt.HardwareCompatibilityLevel, told["hardware_compatibility"].upper()
        )
    if told["optimization_level"] is not None:
        config.builder_optimization_level = told["optimization_level"]
    workspace = told["workspace_bytes"] if options.workspace_mib is None else options.workspace_mib << 20
    if workspace:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)


def set_targets(trt: Any, config: Any, targets: list[str]) -> None:
    """Build for other GPUs than this machine's, which TensorRT for RTX alone can, and its type stubs leave out."""
    if targets:
        config.num_compute_capabilities = len(targets)
    for index, name in enumerate(targets):
        if not config.set_compute_capability(_known(trt.ComputeCapability, name.upper()), index):
            raise RuntimeError(f"the library refuses the compute capability {name}")


def _known(kind: Any, name: str) -> Any:
    if not hasattr(kind, name):
        raise Unfit(f"this TensorRT has no {kind.__name__}.{name}")
    return getattr(kind, name)


def _told(error: tensorrt.ParserError) -> str:
    name = error.node_name() if hasattr(error, "node_name") else ""
    return f"{name}: {error.desc().strip().splitlines()[0]}"


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--output", metavar="FILE", help="the engine; by default BUNDLE.engine beside the bundle")
    parser.add_argument("--library", choices=LIBRARIES, help="by default the first that can be imported")
    parser.add_argument("--compute-capability", action="append", metavar="SM", help="ahead of time (TensorRT for RTX)")
    parser.add_argument("--timing-cache", metavar="FILE", help="read before the build and written after it")
    parser.add_argument("--workspace-mib", type=int, metavar="N", help="most scratch memory that a layer may take")
    parser.add_argument("--verbose", action="store_true", help="everything that TensorRT says")
    return parser


def check_options(trt: Any, bundle: Path, options: argparse.Namespace) -> Path:
    """Refuse what cannot work before minutes are spent on it; gives where the engine will be."""
    output = engine_path(bundle, options.output)
    if output.resolve().parent == bundle.resolve():
        raise Unfit("the engine may not lie inside the bundle, whose files are all listed: give another --output")
    for path in [output] + ([Path(options.timing_cache)] if options.timing_cache else []):
        if not path.resolve().parent.is_dir():
            raise Unfit(f"there is no folder {path.resolve().parent}")
    if options.workspace_mib is not None and options.workspace_mib < 1:
        raise Unfit("--workspace-mib has to be 1 or more")
    if options.timing_cache and trt.__name__ == "tensorrt_rtx":
        raise Unfit("TensorRT for RTX keeps no timing cache; leave --timing-cache out")
    targets = options.compute_capability or []
    members = getattr(getattr(trt, "ComputeCapability", None), "__members__", {})
    known = [name.lower() for name in members if name.startswith("SM")]
    if targets and not known:
        raise Unfit("this TensorRT builds for the GPU that it runs on; leave --compute-capability out")
    for name in targets:
        if name.lower() not in known:
            raise Unfit(f"this TensorRT does not build for {name}: {', '.join(known)}")
    if len({name.lower() for name in targets}) < len(targets):
        raise Unfit("--compute-capability names one twice")
    return output


def main(given: list[str] | None = None, bundle: Path = HERE) -> int:
    """Build, and say what was built."""
    options = arguments().parse_args(given)
    try:
        facts = read_facts(bundle)
        trt = find_library(options.library)
        for note in check_version(trt, facts):
            print(f"note: {note}")
        output = check_options(trt, bundle, options)
        started = time.perf_counter()
        print(f"building with {trt.__name__} {trt.__version__}; this can take minutes", flush=True)
        plan = build(trt, bundle, facts, options)
        output.write_bytes(plan)
    except Unfit as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"built {output}: {len(plan):,} bytes in {time.perf_counter() - started:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
