"""A stand-in for the ``tensorrt`` module: it records what is asked, and runs "engines" with ONNX Runtime on the CPU.

It has the part of the API that is used here and nothing more, so that a call to anything else fails.
"""

from __future__ import annotations

import ctypes
import enum
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime

_KINDS = {1: "FLOAT", 10: "HALF", 16: "BF16", 6: "INT32", 7: "INT64", 3: "INT8", 9: "BOOL", 11: "DOUBLE"}


class BuilderFlag(enum.Enum):
    SPARSE_WEIGHTS = 1
    VERSION_COMPATIBLE = 2
    REFIT = 3
    STRIP_PLAN = 4
    TF32 = 5


class HardwareCompatibilityLevel(enum.Enum):
    NONE = 0
    AMPERE_PLUS = 1


class NetworkDefinitionCreationFlag(enum.IntEnum):
    EXPLICIT_BATCH = 0
    STRONGLY_TYPED = 1


class MemoryPoolType(enum.Enum):
    WORKSPACE = 0


class ProfilingVerbosity(enum.Enum):
    LAYER_NAMES_ONLY = 0


class Severity(enum.Enum):
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class Logger(ILogger):
    WARNING, VERBOSE = Severity.WARNING, Severity.VERBOSE

    def __init__(self, severity: Severity) -> None:
        self.severity = severity


class _Tensor:
    is_shape_tensor = False

    def __init__(self, value: onnx.ValueInfoProto) -> None:
        self.name = value.name
        told = value.type.tensor_type
        self.shape = [dim.dim_value or -1 for dim in told.shape.dim]
        self.dtype = enum.Enum("DataType", {_KINDS[told.elem_type]: 0})[_KINDS[told.elem_type]]


class _Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.model: bytes = b""
        self.inputs: list[_Tensor] = []
        self.outputs: list[_Tensor] = []

    num_layers = 1
    num_inputs = property(lambda self: len(self.inputs))
    num_outputs = property(lambda self: len(self.outputs))

    def get_input(self, index: int) -> _Tensor:
        return self.inputs[index]

    def get_output(self, index: int) -> _Tensor:
        return self.outputs[index]


class OnnxParser:
    def __init__(self, network: _Network, logger: ILogger) -> None:
        self.network = network
        self.num_errors = 0

    def parse_from_file(self, path: str) -> bool:
        model = onnx.load(path)
        self.network.model = model.SerializeToString()
        self.network.inputs = [_Tensor(value) for value in model.graph.input]
        self.network.outputs = [_Tensor(value) for value in model.graph.output]
        return True


class _Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, Any] = {}

    def set_shape(self, name: str, least: Any, usual: Any, greatest: Any) -> None:
        self.shapes[name] = (tuple(least), tuple(usual), tuple(greatest))


class _Cache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content + b"+"


class _Config:
    def __init__(self) -> None:
        self.flags: set[BuilderFlag] = {BuilderFlag.TF32}
        self.profiles: list[_Profile] = []
        self.pools: dict[MemoryPoolType, int] = {}
        self.hardware_compatibility_level = HardwareCompatibilityLevel.NONE
        self.builder_optimization_level = 3
        self.profiling_verbosity: Any = None
        self.cache: _Cache | None = None

    def set_flag(self, flag: BuilderFlag) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: BuilderFlag) -> None:
        self.flags.discard(flag)

    def set_memory_pool_limit(self, pool: MemoryPoolType, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: _Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> _Cache:
        return _Cache(content)

    def set_timing_cache(self, cache: _Cache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        return cache.content != b"of another device"

    def get_timing_cache(self) -> _Cache:
        assert self.cache is not None
        return self.cache


class Builder:
    made: ClassVar[list[_Config]] = []
    networks: ClassVar[list[_Network]] = []
    refuses: ClassVar[str | None] = None

    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def create_network(self, flags: int) -> _Network:
        self.networks.append(_Network(flags))
        return self.networks[-1]

    def create_builder_config(self) -> _Config:
        self.made.append(_Config())
        return self.made[-1]

    def create_optimization_profile(self) -> _Profile:
        return _Profile()

    def build_serialized_network(self, network: _Network, config: _Config) -> bytes | None:
        if self.refuses is not None:
            self.logger.log(Severity.ERROR, self.refuses)
            return None
        return network.model


class _Context:
    """Reads and writes memory at the addresses it is given, as the real one does."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}
        self.profile: int | None = None

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self.profile = profile
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shapes[name] = tuple(shape)
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        zeros = {n: np.zeros(shape, self.engine.dtypes[n]) for n, shape in self.shapes.items()}
        return dict(zip(self.engine.outputs, (a.shape for a in self.engine.run(zeros)), strict=True))[name]

    def execute_async_v3(self, stream: int) -> bool:
        feeds = {n: _at(self.addresses[n], shape, self.engine.dtypes[n]).copy() for n, shape in self.shapes.items()}
        for name, result in zip(self.engine.outputs, self.engine.run(feeds), strict=True):
            _at(self.addresses[name], result.shape, result.dtype)[...] = result + self.engine.wrong_by
        return True


class Engine:
    wrong_by = 0.0

    def __init__(self, plan: bytes) -> None:
        self.session = onnxruntime.InferenceSession(plan, providers=["CPUExecutionProvider"])
        kinds = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(float16)": np.float16}
        self.dtypes = {item.name: kinds[item.type] for item in self.session.get_inputs()}
        self.outputs = [item.name for item in self.session.get_outputs()]

    def run(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        return list(self.session.run(self.outputs, feeds))

    @property
    def num_io_tensors(self) -> int:
        return len(self.dtypes) + len(self.outputs)

    def get_tensor_name(self, index: int) -> str:
        return [*self.dtypes, *self.outputs][index]

    def create_execution_context(self) -> _Context:
        return _Context(self)


class Runtime:
    def __init__(self, logger: Any) -> None:
        self.logger = logger

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        return Engine(plan) if plan else None


def _at(address: int, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), dtype).reshape(shape)


class Cuda:
    """The CUDA runtime of ``run_engine.py``, on the CPU's memory."""

    def __init__(self) -> None:
        self.held: list[Any] = []

    def stream(self) -> int:
        return 7

    def allocate(self, size: int) -> int:
        self.held.append(ctypes.create_string_buffer(max(size, 1)))
        return ctypes.addressof(self.held[-1])

    def upload(self, address: int, array: np.ndarray) -> None:
        ctypes.memmove(address, array.ctypes.data, array.nbytes)

    def download(self, array: np.ndarray, address: int) -> None:
        ctypes.memmove(array.ctypes.data, address, array.nbytes)

    def synchronize(self, stream: int) -> None:
        assert stream == 7


def module(version: str = "10.13.0.35") -> ModuleType:
    """The module, afresh."""
    made = ModuleType("tensorrt")
    made.__version__ = version  # type: ignore[attr-defined]
    made.__spec__ = ModuleSpec("tensorrt", None)  # torch looks for the library by its spec
    Builder.made, Builder.networks, Builder.refuses = [], [], None
    Engine.wrong_by = 0.0
    for item in (
        Builder,
        BuilderFlag,
        HardwareCompatibilityLevel,
        ILogger,
        Logger,
        MemoryPoolType,
        NetworkDefinitionCreationFlag,
        OnnxParser,
        ProfilingVerbosity,
        Runtime,
    ):
        setattr(made, item.__name__, item)
    return made
