"""Run the engine that build_engine.py made: compare it with PyTorch's results, time it, print a verdict.

    python run_engine.py --repetitions 200 --json result.json

Needs Python 3.8, numpy, TensorRT, and the CUDA runtime that TensorRT brings. Exit codes: 0 the engine agrees with the
reference, 1 it does not or failed, 2 this bundle, machine or command line is not as it has to be.
"""

from __future__ import annotations

import argparse
import ctypes
import glob
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable

import numpy as np

if TYPE_CHECKING:
    import tensorrt

sys.dont_write_bytecode = True  # a bundle takes no further files
from build_engine import HERE, LIBRARIES, Unfit, check_version, engine_path, find_library, make_logger, read_facts  # noqa: E402

# Names of dtypes in reference.safetensors, and numpy's. bfloat16, which numpy lacks, is held as its 16 bits.
STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"}
STORED.update({f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)})


class Cuda:
    """The few calls of the CUDA runtime that are needed, without any package for them."""

    def __init__(self) -> None:
        self.library = self._load()
        count = ctypes.c_int()
        try:
            self._call("cudaGetDeviceCount", ctypes.byref(count))
        except RuntimeError as error:
            raise Unfit(f"an engine runs on a GPU of NVIDIA, and none can be used here: {error}") from error

    @staticmethod
    def _load() -> ctypes.CDLL:
        names = ["libcudart.so", *(f"libcudart.so.{version}" for version in ("13", "12", "11.0"))]
        for folder in sys.path:  # where pip puts it
            names += sorted(glob.glob(f"{folder}/nvidia/*/lib/libcudart.so.*"), reverse=True)
        for name in [*names, "cudart64_13.dll", "cudart64_12.dll"]:
            try:
                return ctypes.CDLL(name)
            except OSError:
                continue
        raise Unfit("the CUDA runtime (libcudart) cannot be found: add its folder to LD_LIBRARY_PATH")

    def _call(self, name: str, *given: Any) -> None:
        code = getattr(self.library, name)(*given)
        if code:
            text = self.library.cudaGetErrorString
            text.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {text(code).decode()}")

    def stream(self) -> int:
        """A new stream."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(handle))
        return int(handle.value or 0)

    def allocate(self, size: int) -> int:
        """The address of so many bytes on the GPU."""
        pointer = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(max(size, 1)))
        return int(pointer.value or 0)

    def upload(self, address: int, array: np.ndarray) -> None:
        """Host to GPU."""
        source = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cudaMemcpy", ctypes.c_void_p(address), source, ctypes.c_size_t(array.nbytes), 1)

    def download(self, array: np.ndarray, address: int) -> None:
        """GPU to host."""
        target = array.ctypes.data_as(ctypes.c_void_p)
        self._call("cudaMemcpy", target, ctypes.c_void_p(address), ctypes.c_size_t(array.nbytes), 2)

    def synchronize(self, stream: int) -> None:
        """Wait for a stream."""
        self._call("cudaStreamSynchronize", ctypes.c_void_p(stream))


class Session:
    """The engine with its buffers, for inputs of one set of shapes."""

    def __init__(self, trt: Any, engine: bytes, facts: dict[str, Any], inputs: list[np.ndarray], cuda: Any) -> None:
        self.cuda, self.facts = cuda, facts
        self.logger = make_logger(trt, False)
        self.runtime: tensorrt.Runtime = trt.Runtime(self.logger)
        self.engine: tensorrt.ICudaEngine = self.runtime.deserialize_cuda_engine(engine)
        if self.engine is None:
            raise RuntimeError("TensorRT refuses the engine: build it on this device, with this TensorRT")
        self.context: tensorrt.IExecutionContext = self.engine.create_execution_context()
        if self.context is None:
            raise RuntimeError("TensorRT could not make an execution context: free memory of the GPU")
        self.stream = cuda.stream()
        bound = {self.engine.get_tensor_name(index) for index in range(self.engine.num_io_tensors)}
        shapes = {spec["name"]: array.shape for spec, array in zip(facts["inputs"], inputs)}
        self.context.set_optimization_profile_async(pick_profile(facts["profiles"], shapes), self.stream)
        for spec, array in zip(facts["inputs"], inputs):
            if spec["name"] in bound:
                address = cuda.allocate(array.nbytes)
                cuda.upload(address, np.ascontiguousarray(array))
                if not self.context.set_input_shape(spec["name"], tuple(array.shape)):
                    raise RuntimeError(f"the engine refuses {array.shape} for {spec['name']}: build it anew")
                self.context.set_tensor_address(spec["name"], address)
        self.outputs = []
        for spec in facts["outputs"]:
            shape = tuple(self.context.get_tensor_shape(spec["name"]))
            array = np.empty(shape, storage_dtype(spec["dtype"]))
            address = cuda.allocate(array.nbytes)
            self.context.set_tensor_address(spec["name"], address)
            self.outputs.append((array, address))

    def run(self) -> None:
        """Once, until it is done."""
        if not self.context.execute_async_v3(self.stream):
            raise RuntimeError("TensorRT could not run the engine")
        self.cuda.synchronize(self.stream)

    def results(self) -> list[np.ndarray]:
        """What the last run gave."""
        for array, address in self.outputs:
            self.cuda.download(array, address)
        return [array.copy() for array, _ in self.outputs]


def storage_dtype(name: str) -> Any:
    """What holds a dtype in numpy, which lacks bfloat16."""
    return np.uint16 if name == "bfloat16" else np.dtype(name)


def as_float(array: np.ndarray, dtype: str) -> np.ndarray:
    """As float64, to be compared."""
    if dtype == "bfloat16":
        return (array.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return array.astype(np.float64)


def pick_profile(profiles: list[dict[str, Any]], shapes: dict[str, Any]) -> int:
    """The first profile that takes these shapes."""
    for index, profile in enumerate(profiles):
        bounds = [(shapes[name], told[0], told[2]) for name, told in profile["shapes"].items()]
        if all(low <= size <= high for shape, a, b in bounds for size, low, high in zip(shape, a, b)):
            return index
    if profiles:
        raise Unfit(f"no profile takes the reference inputs {shapes}")
    return 0


def relative_error(wanted: np.ndarray, given: np.ndarray) -> float:
    """max|wanted - given| / max|wanted|; infinite where NaN or infinities do not stand in the same places.

    Marks, a thousand times all others and the same in both, are left out, for no error of the others would count.
    """
    if wanted.shape != given.shape:
        return float("inf")
    same = (wanted == given) | (np.isnan(wanted) & np.isnan(given))
    finite = np.isfinite(wanted) & np.isfinite(given)
    if bool((~same & ~finite).any()):
        return float("inf")
    wanted, given = wanted[finite], given[finite]
    if not wanted.size:
        return 0.0
    sizes = np.abs(wanted)
    marks = sizes == sizes.max()
    others = float(sizes[~marks].max()) if not marks.all() else 0.0
    if 0 < 1e3 * others < float(sizes.max()) and np.array_equal(wanted[marks], given[marks]):
        wanted, given = wanted[~marks], given[~marks]
    scale = float(np.abs(wanted).max())
    return float(np.abs(wanted - given).max()) / (scale if scale > 0 else 1.0)


def read_reference(bundle: Path, facts: dict[str, Any]) -> tuple[list[np.ndarray], list[np.ndarray], float]:
    """Inputs, what PyTorch made of them, and how far from that an engine may be.

    The file is of the safetensors format: the length of a header, the header in JSON, and the bytes of every tensor.
    """
    try:
        content = (bundle / "reference.safetensors").read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        header = json.loads(content[8:start].decode("utf-8"))

        def array(name: str) -> np.ndarray:
            told = header[name]
            first, end = told["data_offsets"]
            return np.frombuffer(content[start + first : start + end], STORED[told["dtype"]]).reshape(told["shape"])

        inputs = [array(f"input.{index}") for index in range(len(facts["inputs"]))]
        outputs = [array(f"output.{index}") for index in range(len(facts["outputs"]))]
        return inputs, outputs, float(header["__metadata__"]["tolerance"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Unfit(f"the reference data cannot be read: {error!r}") from error


def measure(run: Callable[[], None], repetitions: int, warmup: int) -> dict[str, float]:
    """Milliseconds of a call, until its results are there."""
    for _ in range(warmup):
        run()
    times = []
    for _ in range(repetitions):
        started = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - started))
    return {"median_ms": float(np.median(times)), "p95_ms": float(np.percentile(times, 95)), "min_ms": min(times)}


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--engine", metavar="FILE", help="by default BUNDLE.engine beside the bundle")
    parser.add_argument("--library", choices=LIBRARIES, help="by default the first that can be imported")
    parser.add_argument("--repetitions", type=int, default=100, metavar="N", help="calls measured")
    parser.add_argument("--warmup", type=int, default=10, metavar="N", help="calls before that")
    parser.add_argument("--json", metavar="FILE", help="the result as JSON")
    return parser


def main(given: list[str] | None = None, bundle: Path = HERE, make_cuda: Callable[[], Any] = Cuda) -> int:
    """Verify, time, and print the verdict."""
    options = arguments().parse_args(given)
    try:
        if options.repetitions < 1 or options.warmup < 0:
            raise Unfit("--repetitions has to be 1 or more, --warmup 0 or more")
        if options.json and not Path(options.json).resolve().parent.is_dir():
            raise Unfit(f"there is no folder {Path(options.json).resolve().parent}")
        facts = read_facts(bundle)
        trt = find_library(options.library)
        notes = check_version(trt, facts)
        path = engine_path(bundle, options.engine)
        if not path.exists():
            raise Unfit(f"there is no engine at {path}: run build_engine.py first")
        inputs, wanted, tolerance = read_reference(bundle, facts)
        cuda = make_cuda()
        session = Session(trt, path.read_bytes(), facts, inputs, cuda)
        session.run()
        errors = {
            spec["name"]: relative_error(as_float(w, spec["dtype"]), as_float(g, spec["dtype"]))
            for spec, w, g in zip(facts["outputs"], wanted, session.results())
        }
        timing = measure(session.run, options.repetitions, options.warmup)
    except Unfit as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (RuntimeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    right = all(found <= tolerance for found in errors.values())
    result = {
        "verdict": "pass" if right else "fail",
        "relative_error": {name: found if np.isfinite(found) else "inf" for name, found in errors.items()},
        "tolerance": tolerance,
        "library": f"{trt.__name__} {trt.__version__}",
        "notes": notes,
        "input_shapes": [list(array.shape) for array in inputs],
        "repetitions": options.repetitions,
        **timing,
    }
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for note in notes:
        print(f"note: {note}")
    for name, found in errors.items():
        print(f"{name}: relative error {found:.3g}, {tolerance:.3g} is allowed")
    print("median {median_ms:.3f} ms, 95% {p95_ms:.3f} ms, least {min_ms:.3f} ms".format(**timing))
    print("PASS: the engine computes what PyTorch did" if right else "FAIL: the engine computes something else")
    return 0 if right else 1


if __name__ == "__main__":
    sys.exit(main())
