"""What the Triton kernels compile to, without a GPU: registers, spills, 16-byte accesses, 64-bit offsets.

The launches are recorded on meta tensors, so that exactly what a call would launch is compiled, at any size.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.kernels import triton as backend
from fdu_kernels.kernels.triton import tuning
from fdu_kernels.kernels.triton.tuning import Target

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET: nothing is compiled"),
    pytest.mark.quick(gpu=["sm_90"], dtype=[torch.bfloat16], dtypes=[(torch.bfloat16, torch.float32)]),
]

GPUS = {
    **{f"sm_{number}": ("cuda", number, 32) for number in (80, 90, 100)},
    **{name: ("hip", name, 64) for name in ("gfx942", "gfx950")},
}
"""Triton's name of the maker, its name of the device, threads of a warp."""
NAMES = {
    torch.bool: "u1", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
}  # fmt: skip
BUDGET = {
    "gaussian_on_chip": {1: 96, 2: 96, 4: 128, 8: 200, 16: 128, 32: 64},
    "gaussian_distance": {8: 96},
    "gaussian_gradient": {8: 96},
    "gaussian_finish": {4: 64},
    "expectation_kernel": {4: 128},
    "expectation_total": {8: 64},
}
"""Registers a thread by kernel and threads / 32. 64 is all that a program of 32 warps has, 128 of 16."""
AMD_BUDGET = {**BUDGET, "gaussian_on_chip": {**BUDGET["gaussian_on_chip"], 32: 128}, "expectation_kernel": {4: 144}}
"""There it is twice as much."""
AMD_LANES = {"expectation_kernel": 128}
"""Scalars, of which the kernel has more than there are scalar registers, that the compiler keeps in the 64 lanes of a
vector register; two such registers at most. They are not written to memory."""
WIDE = {
    "cuda": {"load": r"ld\.global\S*\.v4\.b32\b", "store": r"st\.global\S*\.v4\.b32\b"},
    "hip": {kind: rf"(?:global|buffer)_{kind}_dwordx4\b" for kind in ("load", "store")},
}
"""Accesses of 16 bytes."""
NARROW = {
    "cuda": r"(?:ld|st)\.global(?!\S*\.v[248])\S*\.b(?:8|16|32)\b",
    "hip": r"(?:global|buffer)_(?:load|store)_(?:[us]?byte|[us]?short|dword)(?:_d16)?(?:_hi)?\b",
}
"""Of one element."""


@pytest.fixture(params=GPUS)
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the launches of a test are for."""
    return targeted(request.param, monkeypatch)


@pytest.fixture
def sm_90(monkeypatch: pytest.MonkeyPatch) -> str:
    return targeted("sm_90", monkeypatch)


def targeted(gpu: str, monkeypatch: pytest.MonkeyPatch) -> str:
    maker, _, warp_size = GPUS[gpu]
    monkeypatch.setattr(tuning, "target_of", lambda device: Target(maker, warp_size))
    return gpu


@dataclasses.dataclass(frozen=True)
class Launch:
    """A kernel, as a call would launch it."""

    kernel: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, int]

    @property
    def name(self) -> str:
        return str(self.kernel.fn.__name__)

    def compiled(self, gpu: str) -> Any:
        """Its code, with the types and divisibilities that the launch would have found."""
        signature: dict[str, Any] = {}
        constants: dict[tuple[int, ...], Any] = {}
        attributes: dict[tuple[int, ...], Any] = {}
        assert len(self.kernel.params) == len(self.arguments)
        for i, (parameter, argument) in enumerate(zip(self.kernel.params, self.arguments, strict=True)):
            if parameter.is_constexpr:
                constants[(i,)] = argument
                signature[parameter.name] = "constexpr"
            else:
                specialize = not parameter.do_not_specialize
                signature[parameter.name] = _type(argument, (i,), specialize, constants, attributes, gpu)
        return _compiled(self.kernel, *map(_Hashable, (signature, constants, attributes, self.options)), gpu)


class _Hashable:
    """A dictionary as part of a key of the cache."""

    def __init__(self, content: dict[Any, Any]) -> None:
        self.content, self.key = content, repr(sorted(content.items(), key=repr))

    def __hash__(self) -> int:
        return hash(self.key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Hashable) and self.key == other.key


@functools.cache
def _compiled(
    kernel: Any, signature: _Hashable, constants: _Hashable, attributes: _Hashable, options: _Hashable, gpu: str
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    source = ASTSource(kernel, signature.content, constants.content, attributes.content)
    return triton.compile(source, target=GPUTarget(*GPUS[gpu]), options=options.content)


def _type(
    argument: Any,
    path: tuple[int, ...],
    specialize: bool,
    constants: dict[tuple[int, ...], Any],
    attributes: dict[tuple[int, ...], Any],
    gpu: str,
) -> Any:
    if isinstance(argument, tuple):
        return tuple(_type(item, (*path, i), True, constants, attributes, gpu) for i, item in enumerate(argument))
    if argument is None or (isinstance(argument, int) and argument == 1 and specialize):
        constants[path] = argument
        return "constexpr"
    if isinstance(argument, float):
        return "fp32"
    if isinstance(argument, int):
        if specialize and argument % 16 == 0:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= argument < 2**31 else "i64"
    assert isinstance(argument, Tensor)
    attributes[path] = [["tt.divisibility", 16]]
    if GPUS[gpu][0] == "hip" and argument.untyped_storage().nbytes() < 2**31:
        attributes[path].append(["tt.pointer_range", 32])
    return "*" + NAMES[argument.dtype]


class Recorder:
    """Stands for a kernel and keeps what it is launched with."""

    def __init__(self, kernel: Any, launches: list[Launch]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int]) -> Any:
        def launch(*arguments: Any, **options: int) -> None:
            self.launches.append(Launch(self.kernel, grid[0], arguments, options))

        return launch


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of the calls of a test."""
    from fdu_kernels.kernels.triton import expectation, gaussian

    recorded: list[Launch] = []
    for name in BUDGET:
        module = gaussian if name.startswith("gaussian") else expectation
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    return recorded


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
    yield
    patch.undo()


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def resources(launch: Launch, gpu: str, folder: Path) -> tuple[int, int]:
    """Registers a thread, and what is spilled or on a stack."""
    compiled = launch.compiled(gpu)
    if GPUS[gpu][0] == "hip":
        found = {
            key: int(number) for key, number in re.findall(r"^[ -]*\.(\w+): +(\d+)$", compiled.asm["amdgcn"], re.M)
        }
        assert found["sgpr_spill_count"] <= AMD_LANES.get(launch.name, 0), (launch.name, gpu, found)
        return found["vgpr_count"] + found["agpr_count"], found["vgpr_spill_count"] + found[
            "private_segment_fixed_size"
        ]
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [str(tool), "--dump-resource-usage", str(cubin)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = {key: int(number) for key, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    spilled = len(re.findall(r"\b(?:ld|st)\.local", compiled.asm["ptx"]))
    return found["REG"], found["STACK"] + found["LOCAL"] + spilled


def check(launch: Launch, gpu: str, folder: Path) -> str:
    """The assembly, after a look at the threads and their registers."""
    maker, _, warp_size = GPUS[gpu]
    threads = launch.options["num_warps"] * warp_size
    assert threads <= 1024 and ("maxnreg" not in launch.options or maker == "cuda")
    registers, spilled = resources(launch, gpu, folder)
    print("REGISTERS", gpu, launch.name, threads, registers)  # seen with -s
    assert spilled == 0, (launch.name, gpu, spilled)
    budget = BUDGET if maker == "cuda" else AMD_BUDGET
    assert registers <= budget[launch.name][threads // 32], (launch.name, threads, gpu, registers)
    return str(launch.compiled(gpu).asm["ptx" if maker == "cuda" else "amdgcn"])


def check_width(assembly: str, gpu: str, loads: int, stores: int, narrow: int) -> None:
    """At least as many 16-byte accesses, and at most ``narrow`` of one element."""
    maker = GPUS[gpu][0]
    found = {kind: len(re.findall(pattern, assembly)) for kind, pattern in WIDE[maker].items()}
    few = re.findall(NARROW[maker], assembly)
    assert found["load"] >= loads and found["store"] >= stores and len(few) <= narrow, (found, few)


PROFILES = {"closed": "squared_hellinger", "table": "jensen_shannon"}


def record(
    pred: Tensor,
    profile: str = "closed",
    mask: Tensor | None = None,
    each: bool = True,
    forward: bool = True,
    target: Tensor | None = None,
) -> None:
    """Value-and-grad, and also forward and backward; with per-sample numbers or without any."""
    numbers = meta(len(pred), dtype=torch.float32) if each else None
    sigma, scale = (numbers, meta(dtype=torch.float32)) if numbers is not None else (1.0, 1.0)
    h = fk.get_divergence(PROFILES[profile]).gaussian_profile
    target = pred if target is None else target
    call = GaussianCall(pred, target, h, sigma, numbers, mask, grad_scale=scale)
    backend.gaussian_value_and_grad(call, None)
    if forward:
        backend.gaussian_forward(call)
        backend.gaussian_backward(call, meta(len(pred), dtype=torch.float32))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_on_chip(launches: list[Launch], dtype: torch.dtype, gpu: str, tmp_path: Path) -> None:
    sizes = [256, 1024, 4096, 8192, 16384, 32768] if dtype != torch.float16 else [16384]
    for size in sizes:
        for profile in PROFILES:
            if profile == "closed" or size <= 16384:
                record(meta(2, size, dtype=dtype), profile, forward=False)
    assert {launch.name for launch in launches} == {"gaussian_on_chip"}
    for launch in launches:
        assembly = check(launch, gpu, tmp_path)
        # Besides: the loss, and sigma, weight, scale.
        check_width(assembly, gpu, *((2, 1, 4) if launch.arguments[0][0].numel() > 512 else (0, 0, 4)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_on_chip_with_masks_odd_sizes_and_strides(
    launches: list[Launch], dtype: torch.dtype, gpu: str, tmp_path: Path
) -> None:
    for mask_dtype in (torch.bool, torch.float32):
        for mask_shape in ((2, 1, 64, 64), (2, 4, 64, 64)):
            for profile in PROFILES:
                mask = meta(*mask_shape, dtype=mask_dtype)
                record(meta(2, 4, 64, 64, dtype=dtype), profile, mask, forward=False)
    masked = len(launches)
    record(meta(2, 4, 45, 45, dtype=dtype), "table", forward=False)
    record(meta(2, 4096, dtype=dtype), "closed", meta(2, 4096, dtype=torch.float32), forward=False)
    record(meta(2, 8101, dtype=dtype), "table", meta(8101, dtype=torch.float32), forward=False)
    record(meta(2, 4, 32, 64, dtype=dtype)[..., ::2], "table", meta(2, 1, 32, 32, dtype=torch.bool), forward=False)
    assert {launch.name for launch in launches} == {"gaussian_on_chip"}
    for i, launch in enumerate(launches):
        assembly = check(launch, gpu, tmp_path)
        if i < masked:
            # Beside four elements of float32, four bytes of a mask.
            check_width(assembly, gpu, 4, 2, 12 if dtype == torch.float32 else 4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_split_samples(launches: list[Launch], dtype: torch.dtype, gpu: str, tmp_path: Path) -> None:
    record(meta(2, 16, 128, 128, dtype=dtype), "closed")
    record(meta(2, 16, 128, 128, dtype=dtype), "table")
    odd = len(launches)
    record(meta(2, 16, 127, 129, dtype=dtype), "closed")
    assert [launch.name for launch in launches[:5]] == [
        "gaussian_distance", "gaussian_gradient", "gaussian_distance", "gaussian_finish", "gaussian_gradient",
    ]  # fmt: skip
    for i, launch in enumerate(launches):
        assembly = check(launch, gpu, tmp_path)
        if launch.name == "gaussian_finish":
            continue
        # Guarded and unguarded blocks; at odd sizes only the second have 16 bytes.
        factor = 1 if i >= odd else 2
        check_width(
            assembly, gpu, 2 * factor, factor if launch.name == "gaussian_gradient" else 0, 6 if i < odd else 60
        )


def test_split_samples_with_masks_and_strides(launches: list[Launch], gpu: str, tmp_path: Path) -> None:
    mask = meta(2, 1, 128, 128, dtype=torch.bool)
    record(meta(2, 16, 128, 128), "closed", mask)
    masked = len(launches)
    record(meta(2, 16, 128, 128).to(memory_format=torch.channels_last), "closed", mask)
    last = len(launches)
    record(meta(2, 16, 128, 256)[..., ::2], "table", mask, each=False)
    for i, launch in enumerate(launches):
        assembly = check(launch, gpu, tmp_path)
        if i < last and launch.name != "gaussian_finish":
            # A mask that is one for all channels is read byte by byte where these lie side by side.
            check_width(assembly, gpu, 4, 0, 6 if i < masked else 24)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_expectation(launches: list[Launch], dtype: torch.dtype, gpu: str, tmp_path: Path) -> None:
    function, _ = fk.get_divergence("kl").critic_functions("log_ratio")
    v, mask = meta(64, 1, 64, 64, dtype=dtype), meta(64, 64, dtype=torch.bool)
    backend.expectation_forward(ExpectationCall(v, function))
    backend.expectation_value_and_grad(ExpectationCall(v, function, mask=mask))
    call = ExpectationCall(v, function, mask=mask, reduction="none")
    backend.expectation_backward(call, meta(*v.shape, dtype=torch.float32))
    odd = len(launches)
    backend.expectation_value_and_grad(ExpectationCall(meta(65, 63, dtype=dtype), function, meta(65), None, "none"))
    for i, launch in enumerate(launches):
        assembly = check(launch, gpu, tmp_path)
        if i < odd and launch.name == "expectation_kernel":
            check_width(assembly, gpu, 1, 0 if launch.arguments[0][2] is None else 1, 8)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_pairs_of_dtypes(launches: list[Launch], dtypes: tuple[torch.dtype, ...], gpu: str, tmp_path: Path) -> None:
    for size in (4096, 16384, 2**18):
        pred, target = (meta(2, size, dtype=dtype) for dtype in dtypes)
        record(pred, target=target)
    odd = len(launches)
    pred, target = (meta(2, 4, 255, 255, dtype=dtype) for dtype in dtypes)
    record(pred, target=target, mask=meta(2, 1, 255, 255, dtype=torch.bool))
    pred, target = (meta(2, 4, 64, 64, dtype=dtype) for dtype in dtypes)
    record(pred, "table", target=target.to(memory_format=torch.channels_last))
    for i, launch in enumerate(launches):
        assembly = check(launch, gpu, tmp_path)
        if i < odd and launch.name != "gaussian_finish":
            # bfloat16 in 16 bytes, float32 beside it in twice as many.
            check_width(assembly, gpu, 3, 0 if launch.name == "gaussian_distance" else 1, 6)


def test_no_divergence_and_no_number_compiles_anew(launches: list[Launch], sm_90: str) -> None:
    pred = meta(2, 4, 32, 32)
    _compiled.cache_clear()
    for alpha in (0.3, 0.5, 2.0, 3.0):
        profile = fk.get_divergence("alpha", alpha=alpha).gaussian_profile
        call = GaussianCall(pred, pred, profile, alpha, None, None, "sum", "sum", 2 * alpha)
        backend.gaussian_value_and_grad(call, None)
    for name in ("kl", "squared_hellinger", "mse"):
        backend.gaussian_value_and_grad(GaussianCall(pred, pred, fk.get_divergence(name).gaussian_profile), None)
    for launch in launches:
        launch.compiled(sm_90)
    assert _compiled.cache_info().misses == 1
    launches.clear()
    for name in ("kl", "pearson_chi2", "jensen_shannon", "le_cam", "hockey_stick"):
        backend.expectation_value_and_grad(ExpectationCall(meta(64, 16), fk.get_divergence(name).ratio_function("q")))
    for launch in launches:
        launch.compiled(sm_90)
    assert _compiled.cache_info().misses == 2


def narrow_offsets(ttir: str) -> list[str]:
    """Additions to data pointers that are not in 64 bits, other than of a lane within its block."""
    lanes = set(re.findall(r"(%\S+) = tt\.make_range", ttir))
    moves = re.findall(r"tt\.addptr (%\S+), (%\S+) : \S+, (\S+)", ttir)
    assert moves
    workspaces = ("%partials", "%mask_partials", "%row", "%losses", "%coefficients")
    return [
        f"{pointer} + {offset} : {kind}"
        for pointer, offset, kind in moves
        if "i64" not in kind and offset not in lanes and not pointer.startswith(workspaces)
    ]


@pytest.mark.parametrize(
    "pred",
    [
        meta(1, 2**31 + 24),
        meta(3, 2**30, 3),
        meta(65536, 65537),
        meta(2, 2**29, 2, 4)[..., ::2],
        meta(2, 2**31, 2).transpose(1, 2),
    ],
    ids=["one sample", "three", "many", "strided", "transposed"],
)
def test_offsets_past_two_to_the_31(launches: list[Launch], sm_90: str, pred: Tensor, tmp_path: Path) -> None:
    record(pred, mask=meta(*[1] * (pred.ndim - 1), pred.shape[-1], dtype=torch.bool), each=False)
    record(pred, each=False)
    for launch in launches:
        check(launch, sm_90, tmp_path)
        # Workspaces hold at most one number a program.
        assert launch.programs < 2**31
        assert not narrow_offsets(str(launch.compiled(sm_90).asm["ttir"])), launch.name


def test_wide_expectations(launches: list[Launch], sm_90: str) -> None:
    function = fk.get_divergence("kl").ratio_function("q")
    for v in (meta(2**31 + 16), meta(2, 2**31, 2)[..., 0]):
        backend.expectation_value_and_grad(ExpectationCall(v, function))
    for launch in launches:
        assert not narrow_offsets(str(launch.compiled(sm_90).asm["ttir"])), launch.name


def test_gradients_are_rounded_to_nearest(launches: list[Launch], sm_90: str) -> None:
    for dtype, instruction in ((torch.bfloat16, "cvt.rn.bf16"), (torch.float16, "cvt.rn.f16")):
        record(meta(2, 1024, dtype=dtype), forward=False)
        assert instruction in launches[-1].compiled(sm_90).asm["ptx"]
