"""A CUDA device that compiles and never runs: what torch.compile and Triton make of a model, on a machine without one.

Inside `compiling_for((9, 0))` tensors on "cuda" are fake (shapes and dtypes, no data). torch.compile lowers through
Inductor to Triton as on a real GPU, Triton's wheel compiles to machine code for that chip, and every kernel that would
be launched is noted instead. So whether a training step compiles, to which kernels, and how often, is known here; that
they are right or fast is not, and whatever asks for a value (`.item()`) fails, as it would make a GPU's host wait.

PyTorch and Triton ask a driver in some thirty places whether a device is there; these are answered in its place. They
are private and belong to the versions that are pinned: this was seen to work with torch 2.11 (a CUDA build) and 2.13
(a CPU build), triton 3.6 and 3.7. A process that was inside once is good for nothing else: use one of its own.
"""

import contextlib
import ctypes
import functools
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from samtrain_kernels.aot import SHARED_MEMORY_LIMIT, MachineCode, read_machine_code

CHIPS = {
    (8, 0): SimpleNamespace(name="NVIDIA A100", multi_processor_count=108, total_memory=80 * 10**9, L2=40 * 2**20),
    (9, 0): SimpleNamespace(name="NVIDIA H200", multi_processor_count=132, total_memory=141 * 10**9, L2=50 * 2**20),
}
"""What Inductor asks of a device, from the vendor's data sheets."""

# Autograd asks a registered device for its streams, also where tensors are fake; a CPU build has none registered, and
# a CUDA build without a driver refuses. These answers do nothing.
_ANSWERS = r"""
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Hooks : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
  bool compiledWithCuDNN() const override { return true; }
  long versionRuntimeCuDNN() const override { return 91300; }
};
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream) const noexcept override { return getStream(getDevice()); }
};
extern "C" void install() {
  static Hooks hooks;
  static Guard guard;
  *(void**)const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks()) = *(void**)&hooks;
  impl::device_guard_impl_registry[static_cast<size_t>(DeviceType::CUDA)].store(&guard);
}
"""


@dataclass(frozen=True)
class Compiled:
    """One kernel as the compiler left it. by: "inductor", or "triton" for one that is launched by hand (Liger's)."""

    name: str
    by: str
    num_warps: int
    num_stages: int
    shared_bytes: int
    code: MachineCode

    def problem(self, capability: tuple[int, int]) -> str | None:
        """Why it could not be launched on the chip."""
        limit = SHARED_MEMORY_LIMIT[capability]
        return f"{self.shared_bytes} bytes of shared memory of {limit}" if self.shared_bytes > limit else None


@contextlib.contextmanager
def compiling_for(capability: tuple[int, int]) -> Iterator[list[Compiled]]:
    """Inside: fake tensors on "cuda" of a chip of `capability`; yields the list that kernels are added to.

    Raises:
        RuntimeError: no C++ compiler, or a process that holds a real device.
        subprocess.CalledProcessError: this PyTorch's headers refuse our answers.
    """
    if torch.cuda.is_available():
        raise RuntimeError("this machine has a GPU: compile by running there")
    found: list[Compiled] = []
    _answers().install()
    with contextlib.ExitStack() as stack:
        patch = functools.partial(_patch, stack)
        _no_driver(patch, capability)
        _inductor_compiles(patch, found)
        _triton_compiles(patch, found)
        from torch._subclasses.fake_tensor import FakeTensorMode

        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield found


def _patch(stack: contextlib.ExitStack, owner: Any, **answers: Any) -> None:
    for name, answer in answers.items():
        stack.enter_context(mock.patch.object(owner, name, answer, create=not hasattr(owner, name)))


def _says(value: Any) -> Callable[..., Any]:
    """A function of its own for each question: Dynamo tells functions apart by identity."""
    return lambda *_, **__: value


def _no_driver(patch: Callable[..., None], capability: tuple[int, int]) -> None:
    """What PyTorch asks of the driver."""
    import torch._subclasses.fake_tensor as fake
    from torch._dynamo.device_interface import CudaInterface

    major, minor = capability
    chip = CHIPS[capability]
    properties = SimpleNamespace(
        name=chip.name, type="cuda", index=0, major=major, minor=minor, warp_size=32, gcnArchName="",
        multi_processor_count=chip.multi_processor_count, total_memory=chip.total_memory, L2_cache_size=chip.L2,
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, regs_per_multiprocessor=65536,
        shared_memory_per_block=48 * 1024, shared_memory_per_block_optin=SHARED_MEMORY_LIMIT[capability],
        shared_memory_per_multiprocessor=SHARED_MEMORY_LIMIT[capability] + 1024,
    )  # fmt: skip
    patch(
        torch.cuda,
        is_available=_says(True), device_count=_says(1), current_device=_says(0), set_device=_says(None),
        _exchange_device=_says(0), _maybe_exchange_device=_says(0), synchronize=_says(None),
        get_device_properties=_says(properties), get_device_capability=_says(capability),
        get_device_name=_says(chip.name), is_bf16_supported=_says(True), set_rng_state=_says(None),
        get_rng_state=lambda *_: torch.zeros(16, dtype=torch.uint8),
    )  # fmt: skip
    patch(torch.accelerator, is_available=_says(False))  # its streams are asked for otherwise
    patch(torch._C, _cuda_getCurrentRawStream=_says(0))
    interface = {
        "is_available": True, "device_count": 1, "current_device": 0, "set_device": None, "exchange_device": 0,
        "maybe_exchange_device": 0, "get_device_properties": properties, "get_raw_stream": 0,
        "get_compute_capability": 10 * major + minor, "is_bf16_supported": True,
    }  # fmt: skip
    patch(CudaInterface, **{name: staticmethod(_says(value)) for name, value in interface.items()})
    worker = ("get_device_properties", "current_device")
    patch(CudaInterface.Worker, **{name: staticmethod(_says(interface[name])) for name in worker})
    patch(fake, init_gpu_context=_says(None))
    patch(fake.FakeTensorMode, avoid_device_init=True)
    patch(torch.nn.functional, scaled_dot_product_attention=_fused_attention)


def _fused_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """The library kernels a GPU takes: without a device the dispatcher would choose the unfused mathematics."""
    if attn_mask is None:
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        return flash(query, key, value, dropout_p, is_causal, scale=scale)[0]
    mask = attn_mask.expand(*query.shape[:-1], key.shape[-2])
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    return efficient(query, key, value, mask, True, dropout_p, is_causal, scale=scale)[0]


def _inductor_compiles(patch: Callable[..., None], found: list[Compiled]) -> None:
    """Inductor's graphs are lowered and compiled; what is called afterwards is the graph, on fake tensors."""
    from torch._inductor import compile_fx, config
    from torch._inductor.runtime import triton_heuristics

    tuner: Any = triton_heuristics.CachingAutotuner
    precompile = tuner.precompile

    def compile_only(self: Any, *_: Any, **__: Any) -> None:
        precompile(self, warm_cache_only=True)
        for result in self.compile_results:
            found.append(_read(self.fn.__name__, "inductor", result.kernel))

    def inner_compile(graph: Any, inputs: Any, **options: Any) -> Any:
        compile_fx.compile_fx_inner(graph, inputs, **options)

        def run(arguments: list[Any]) -> Any:
            taken = list(arguments)
            arguments.clear()
            return graph(*taken)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(self: Any, graph: Any, inputs: Any) -> Any:
        return compile_fx.compile_fx(graph, inputs, inner_compile=inner_compile, config_patches=self.config)

    patch(tuner, precompile=compile_only)
    patch(torch._TorchCompileInductorWrapper, __call__=backend)
    patch(triton_heuristics.triton_helpers, set_driver_to_gpu=_says(None))
    # Folding runs operations on the device; the static launcher loads machine code into it; caches would leave out the
    # compilation; workers are processes that know nothing of this.
    options = {"joint_graph_constant_folding": False, "compile_threads": 1, "force_disable_caches": True}
    for name in ("use_static_cuda_launcher", "use_static_triton_launcher"):
        options |= {name: False} if hasattr(config, name) else {}
    patch(config, **options)


def _triton_compiles(patch: Callable[..., None], found: list[Compiled]) -> None:
    """Kernels that are launched by hand are compiled for the arguments they were given, and not launched."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    major, minor = torch.cuda.get_device_capability()
    target = GPUTarget("cuda", 10 * major + minor, 32)
    limits = {
        "max_shared_mem": SHARED_MEMORY_LIMIT[major, minor],
        "max_num_regs": 65536,
        "warpSize": 32,
        "multiprocessor_count": CHIPS[major, minor].multi_processor_count,
    }
    stand_in = SimpleNamespace(
        get_current_target=_says(target), get_current_device=_says(0), get_current_stream=_says(0),
        get_active_torch_device=_says(torch.device("cuda", 0)), is_active=_says(True),
        utils=SimpleNamespace(get_device_properties=_says(limits)),
    )  # fmt: skip
    driver.set_active(stand_in)
    run = jit.JITFunction.run

    def stated(value: Any) -> Any:
        return jit.MockTensor(value.dtype, value.shape) if isinstance(value, torch.Tensor) else value

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        named = {name: stated(value) for name, value in kwargs.items()}
        kernel = run(self, *map(stated, args), grid=grid, warmup=True, **named)
        found.append(_read(self.fn.__name__, "triton", kernel))
        return kernel

    patch(jit.JITFunction, run=compile_only)


_machine_code = functools.cache(read_machine_code)  # a kernel that is launched again is not read again


def _read(name: str, by: str, kernel: Any) -> Compiled:
    metadata = kernel.metadata
    return Compiled(
        name, by, metadata.num_warps, metadata.num_stages, metadata.shared, _machine_code(kernel.asm["cubin"])
    )


@functools.cache
def _answers() -> ctypes.CDLL:
    home = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "c++")
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "answers.cpp", Path(folder) / "answers.so"
        source.write_text(_ANSWERS)
        command = [compiler, "-std=c++20", "-shared", "-fPIC", f"-I{home / 'include'}", f"-L{home / 'lib'}"]
        command += [f"-Wl,-rpath,{home / 'lib'}", "-o", str(library), str(source), "-ltorch_cpu", "-lc10"]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            raise RuntimeError(f"{compiler} is not installed; set CXX to a C++ compiler") from None
        return ctypes.CDLL(str(library))
