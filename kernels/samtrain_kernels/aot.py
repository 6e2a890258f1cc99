"""Compile kernels for a GPU that is not there, and read what the compiler made of them.

Triton's wheel brings the whole CUDA tool chain down to machine code, so a machine without a GPU can tell registers,
spills, shared memory and whether the tensor cores are used. It cannot tell speed, nor that the machine code is right.

Not for the interpreter: run it in a process without TRITON_INTERPRET.
"""

import hashlib
import importlib
import inspect
import re
import subprocess
import tempfile
import tokenize
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from samtrain_kernels.dispatch import is_interpreted
from samtrain_kernels.settings import CONTEXT_KERNELS, KernelSetting, PatchSetting

SHARED_MEMORY_LIMIT = {(8, 0): 163 * 1024, (9, 0): 227 * 1024}
"""Bytes one block may use, by compute capability (CUDA C programming guide, compute capabilities)."""

_NO_CODE = (tokenize.COMMENT, tokenize.NL)


@dataclass(frozen=True)
class AotCase:
    """One kernel, with one setting, as its launcher would compile it.

    kernel: its name in `settings`. function: the `@triton.jit` function.
    signature: argument -> type, in the order of the arguments: "*bf16", "*i64", "i32", "fp32", "constexpr".
    constexprs: the value of every constexpr.
    variant: what tells it from other cases of the same setting ("frozen", "biases, ragged patches").
    divisible_by_16: the arguments that are multiples of 16 in real calls (all pointers, most strides): Triton
        specialises on it and loads wider.
    """

    kernel: str
    setting: KernelSetting | PatchSetting
    function: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    variant: str = ""
    divisible_by_16: tuple[str, ...] = ()


@dataclass(frozen=True)
class MachineCode:
    """registers: of a thread. Spills are counted in the program text, not by execution."""

    registers: int
    spill_loads: int
    spill_stores: int


@dataclass(frozen=True)
class AotReport:
    """What the compiler made of a case. Counts are of instructions in the program text, not of executions."""

    kernel: str
    variant: str
    setting: dict[str, int]
    head_dim: int | None
    dtype: str
    capability: tuple[int, int]
    registers: int
    spill_loads: int
    spill_stores: int
    shared_bytes: int
    mma_sync: int
    wgmma: int
    async_copies: int

    def problems(self) -> list[str]:
        """Why this setting must not ship; empty when nothing speaks against it."""
        found = []
        # float32 products run outside the tensor cores (there they would be TF32): a slow path for checking, where a
        # few spilled registers of a rare variant are shown in the table and borne.
        is_fast_path = self.dtype != "float32" or self.kernel not in CONTEXT_KERNELS
        if is_fast_path and (self.spill_loads or self.spill_stores):
            found.append(f"spills registers ({self.spill_loads} loads, {self.spill_stores} stores)")
        if self.shared_bytes > SHARED_MEMORY_LIMIT[self.capability]:
            limit = SHARED_MEMORY_LIMIT[self.capability]
            found.append(f"needs {self.shared_bytes} bytes of shared memory, the chip has {limit}")
        if is_fast_path and self.kernel in CONTEXT_KERNELS and not (self.mma_sync or self.wgmma):
            found.append("uses no tensor core")
        return found


def aot_cases(
    kernel: str, setting: KernelSetting | PatchSetting, *, head_dim: int | None, dtype: torch.dtype
) -> list[AotCase]:
    """All variants of a kernel at a setting, from the kernel's own module."""
    cases: list[AotCase] = (
        kernel_module(kernel).aot_cases(kernel, setting, head_dim=head_dim, dtype=dtype)
        if kernel in CONTEXT_KERNELS
        else kernel_module(kernel).aot_cases(kernel, setting, dtype=dtype)
    )
    return cases


def compile_case(case: AotCase, *, capability: tuple[int, int], head_dim: int | None, dtype: torch.dtype) -> AotReport:
    """Compile one case for a compute capability and read the machine code.

    Raises:
        RuntimeError: under TRITON_INTERPRET, where there is nothing to compile.
    """
    if is_interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: nothing is compiled there; unset it before Python starts")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    names = list(inspect.signature(case.function.fn).parameters)
    if list(case.signature) != names:
        raise ValueError(f"{case.kernel}: the case's signature {list(case.signature)} is not the kernel's {names}")
    source = ASTSource(
        case.function,
        signature=dict(case.signature),
        constexprs={(names.index(name),): value for name, value in case.constexprs.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in case.divisible_by_16},
    )
    target = GPUTarget("cuda", capability[0] * 10 + capability[1], 32)
    compiled = triton.compile(source, target=target, options=case.setting.options)
    ptx = compiled.asm["ptx"]
    code = read_machine_code(compiled.asm["cubin"])
    return AotReport(
        kernel=case.kernel,
        variant=case.variant,
        setting=asdict(case.setting),
        head_dim=head_dim,
        dtype=str(dtype).removeprefix("torch."),
        capability=capability,
        **asdict(code),
        shared_bytes=compiled.metadata.shared,
        mma_sync=ptx.count("mma.sync.aligned"),
        wgmma=ptx.count("wgmma.mma_async"),
        async_copies=len(re.findall(r"\bcp\.async\.c[ag]\.", ptx)),
    )


def source_digest(kernel: str) -> str:
    """Changes with the code of the kernel's module, not with its comments: tells an old table from a fresh one.

    Of tokens, which every Python reads alike; `ast.dump` differs from version to version.
    """
    path = kernel_module(kernel).__file__
    assert path is not None
    with tokenize.open(path) as file:
        kept = [t.string for t in tokenize.generate_tokens(file.readline) if t.type not in _NO_CODE]
    return hashlib.sha256("".join(kept).encode()).hexdigest()[:16]


def kernel_module(kernel: str) -> ModuleType:
    """The module that holds the Triton code of a kernel. Imports triton."""
    package = "context_attention" if kernel in CONTEXT_KERNELS else "image_mix"
    return importlib.import_module(f"samtrain_kernels.{package}.triton")


def read_machine_code(cubin: bytes) -> MachineCode:
    """By the cuobjdump of Triton's wheel."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, code = (
            subprocess.run([tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    registers = max(int(n) for n in re.findall(r"REG:(\d+)", usage))
    return MachineCode(registers, len(re.findall(r"\bLDL\b", code)), len(re.findall(r"\bSTL\b", code)))
