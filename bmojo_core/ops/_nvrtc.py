"""CUDA source compiled when first used, by the compiler library that torch itself brings along.

NVRTC turns a source text into machine code for the device at hand in a second or two; the driver
loads it and launches its kernels on torch's current stream. Nothing is built at installation and
nothing is written to disk.

    module = load(source, defines, device)      # cached for the life of the process
    module.launch("kernel", grid, block, shared_bytes, params)

``params`` is one :class:`ctypes.Structure`, passed by value, whose fields mirror the kernel's own
struct. A launch allocates nothing and never waits for the device, so it can be captured into a
CUDA graph (compile before capturing: call once).
"""

from __future__ import annotations

import ctypes
import sys
import threading
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import torch

MAX_DYNAMIC_SHARED_BYTES = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
DEFAULT_SHARED_BYTES = 48 * 1024  # what a launch gets without asking


@lru_cache(maxsize=1)
def _nvrtc() -> ctypes.CDLL:
    """The NVRTC library of torch's own CUDA version: preloaded, on the path, or beside torch."""
    if torch.version.cuda is None:
        raise RuntimeError("the gpu backend needs a torch built with CUDA; this one has none")
    major = torch.version.cuda.split(".")[0]
    name = f"nvrtc64_{major}0_0.dll" if sys.platform == "win32" else f"libnvrtc.so.{major}"
    packages = Path(torch.__file__).resolve().parent.parent / "nvidia"
    folders = (f"cu{major}/lib", "cuda_nvrtc/lib", f"cu{major}/bin/x86_64", "cuda_nvrtc/bin")
    candidates = [str(packages / folder / name) for folder in folders]
    refusals = []
    for candidate in [c for c in candidates if Path(c).exists()] + [name]:
        try:
            return ctypes.CDLL(candidate)
        except OSError as error:
            refusals.append(str(error))
    raise RuntimeError(
        f"{name} was found neither beside torch ({packages}) nor on the library path: {refusals}"
    )


@lru_cache(maxsize=1)
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def _check_driver(status: int, what: str) -> None:
    if status == 0:
        return
    text = ctypes.c_char_p()
    _driver().cuGetErrorString(status, ctypes.byref(text))
    raise RuntimeError(f"CUDA: {what} failed: {(text.value or b'unknown error').decode()}")


def compile_cubin(source: str, options: tuple[str, ...], name: str = "kernels") -> bytes:
    """Machine code of a source text.

    Parameters
    ----------
    source : str
        CUDA C++ without includes of its own.
    options : tuple of str
        NVRTC options; one of them names the architecture (``--gpu-architecture=sm_90``).
    name : str
        What compiler messages call the source.

    Raises
    ------
    RuntimeError
        With the compiler's log when the source does not compile.
    """
    nvrtc, program = _nvrtc(), ctypes.c_void_p()

    def check(status: int) -> None:
        if status == 0:
            return
        size = ctypes.c_size_t()
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC could not compile {name}:\n{log.value.decode()}")

    text = source.encode()
    check(nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, name.encode(), 0, None, None))
    try:
        given = [option.encode() for option in options]
        check(
            nvrtc.nvrtcCompileProgram(program, len(given), (ctypes.c_char_p * len(given))(*given))
        )
        size = ctypes.c_size_t()
        check(nvrtc.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        cubin = ctypes.create_string_buffer(size.value)
        check(nvrtc.nvrtcGetCUBIN(program, cubin))
        return cubin.raw
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def _enter_context(device: int) -> None:
    """Give this thread a CUDA context: autograd's worker threads may not have met one yet."""
    driver, context = _driver(), ctypes.c_void_p()
    _check_driver(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
    if context.value is None:
        _check_driver(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "context")
        _check_driver(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")


@dataclass(frozen=True)
class Module:
    """Loaded machine code on one device."""

    handle: ctypes.c_void_p
    device: int
    functions: dict[str, ctypes.c_void_p] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)

    def _function(self, name: str, shared_bytes: int) -> ctypes.c_void_p:
        driver = _driver()
        if name not in self.functions:
            function = ctypes.c_void_p()
            status = driver.cuModuleGetFunction(ctypes.byref(function), self.handle, name.encode())
            _check_driver(status, f"looking up kernel {name}")
            self.shared[name] = DEFAULT_SHARED_BYTES  # first: another thread may be here, too
            self.functions[name] = function
        if shared_bytes > self.shared[name]:
            status = driver.cuFuncSetAttribute(
                self.functions[name], MAX_DYNAMIC_SHARED_BYTES, ctypes.c_int(shared_bytes)
            )
            _check_driver(status, f"asking for {shared_bytes} bytes of shared memory")
            self.shared[name] = shared_bytes
        return self.functions[name]

    def launch(
        self,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared_bytes: int,
        params: ctypes.Structure,
    ) -> None:
        """Queue one kernel on the device's current stream."""
        with torch.cuda.device(self.device):
            _enter_context(self.device)
            function = self._function(name, shared_bytes)
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            arguments = (ctypes.c_void_p * 1)(ctypes.addressof(params))
            block = (threads, 1, 1)
            status = _driver().cuLaunchKernel(
                function, *grid, *block, shared_bytes, stream, arguments, None
            )
        _check_driver(status, f"launching {name} on grid {grid} with {threads} threads")


_modules: dict[tuple, Module] = {}
_loading = threading.Lock()


def load(source: str, defines: tuple[tuple[str, str], ...], device: int) -> Module:
    """Compile a source with the given macros for a device, once.

    Parameters
    ----------
    source : str
        CUDA C++.
    defines : tuple of (name, value)
        Macros that fix element types and sizes at compile time.
    device : int
        CUDA device index.
    """
    key = (source, defines, device)
    with _loading:
        if key not in _modules:
            major, minor = torch.cuda.get_device_capability(device)
            options = (f"--gpu-architecture=sm_{major}{minor}", "--std=c++17")
            options += tuple(f"-D{name}={value}" for name, value in defines)
            cubin = compile_cubin(source, options)
            with torch.cuda.device(device):
                torch.cuda.current_stream().synchronize()  # torch's context exists from here on
                _enter_context(device)
                handle = ctypes.c_void_p()
                status = _driver().cuModuleLoadData(ctypes.byref(handle), cubin)
                _check_driver(status, "loading the compiled kernels")
            _modules[key] = Module(handle, device)
        return _modules[key]


@lru_cache(maxsize=8)
def read_source(*paths: str) -> str:
    """Concatenate source files of this package, given relative to the ``ops`` folder."""
    here = Path(__file__).parent
    return "\n".join((here / path).read_text() for path in paths)
