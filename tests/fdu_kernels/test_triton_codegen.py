"""What the Triton kernels compile to, without a GPU: registers, spills, 16-byte accesses, 64-bit offsets.

The launches are recorded on meta tensors, so that exactly what a call would launch is compiled, at any size.
"""

from __future__ import annotations

import functools
import itertools
import os
import re

import bench_compiled
import pytest
import torch
from compiled import GPUS, Launch, Recorder, compile_once
from kernel_testing import pairs
from torch import Tensor

import fdu_kernels as fk
from fdu_kernels import build
from fdu_kernels.calls import ExpectationCall, GaussianCall
from fdu_kernels.kernels import triton as backend
from fdu_kernels.kernels.triton import tuning
from fdu_kernels.kernels.triton.tuning import Target

triton = pytest.importorskip("triton")
pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET", "0") != "0", reason="TRITON_INTERPRET: nothing is compiled"),
    pytest.mark.quick(gpu=["sm_90"], dtype=[torch.bfloat16], dtypes=[(torch.bfloat16, torch.float32)]),
]

BUDGET = {
    "gaussian_on_chip": {1: 96, 2: 96, 4: 128, 8: 200, 16: 128, 32: 64},
    "gaussian_distance": {8: 96},
    "gaussian_gradient": {8: 96},
    "gaussian_finish": {4: 64},
    "expectation_kernel": {4: 128},
    "expectation_total": {16: 64},
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


on_every_gpu = functools.partial(pytest.mark.parametrize, indirect=["gpu"], ids=str)


@pytest.fixture
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


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """The launches of the calls of a test."""
    from fdu_kernels.kernels.triton import expectation, gaussian

    recorded: list[Launch] = []
    for name in BUDGET:
        module = gaussian if name.startswith("gaussian") else expectation
        monkeypatch.setattr(module, name, Recorder(getattr(module, name), recorded))
    return recorded


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled stays beside the built kernels: Triton takes it from there while its source is the same."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(build.cache_folder() / "triton"))


def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def resources(launch: Launch, gpu: str) -> tuple[int, int]:
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
    (code,) = launch.code(gpu)
    return code.registers, code.spilled + len(re.findall(r"\b(?:ld|st)\.local", compiled.asm["ptx"]))


def check(launch: Launch, gpu: str) -> str:
    """The assembly, after a look at the threads and their registers."""
    maker, _, warp_size = GPUS[gpu]
    threads = launch.options["num_warps"] * warp_size
    assert threads <= 1024 and ("maxnreg" not in launch.options or maker == "cuda")
    registers, spilled = resources(launch, gpu)
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


SIZES = [256, 1024, 4096, 8192, 16384, 32768]
DTYPES = [torch.bfloat16, torch.float32]


@on_every_gpu("gpu, dtype, size, profile", pairs(list(GPUS), [*DTYPES, torch.float16], SIZES, list(PROFILES)))
def test_on_chip(launches: list[Launch], gpu: str, dtype: torch.dtype, size: int, profile: str) -> None:
    record(meta(2, size, dtype=dtype), profile if size <= 16384 else "closed", forward=False)
    (launch,) = launches
    assert launch.name == "gaussian_on_chip"
    # Besides: the loss, and sigma, weight, scale.
    check_width(check(launch, gpu), gpu, *((2, 1, 4) if size > 256 else (0, 0, 4)))


@on_every_gpu(
    "gpu, dtype, mask_dtype, channels, profile",
    pairs(list(GPUS), DTYPES, [torch.bool, torch.float32], [1, 4], list(PROFILES)),
)
def test_on_chip_with_masks(
    launches: list[Launch], gpu: str, dtype: torch.dtype, mask_dtype: torch.dtype, channels: int, profile: str
) -> None:  # fmt: skip
    record(meta(2, 4, 64, 64, dtype=dtype), profile, meta(2, channels, 64, 64, dtype=mask_dtype), forward=False)
    (launch,) = launches
    assert launch.name == "gaussian_on_chip"
    # Beside four elements of float32, four bytes of a mask.
    check_width(check(launch, gpu), gpu, 4, 2, 12 if dtype == torch.float32 else 4)


ODD = {
    "odd": (meta(2, 4, 45, 45), "table", None),
    "a mask per element": (meta(2, 4096), "closed", meta(2, 4096, dtype=torch.float32)),
    "odd, masked": (meta(2, 8101), "table", meta(8101, dtype=torch.float32)),
    "sliced, masked": (meta(2, 4, 32, 64)[..., ::2], "table", meta(2, 1, 32, 32, dtype=torch.bool)),
}


@on_every_gpu("gpu, dtype, case", pairs(list(GPUS), DTYPES, list(ODD)))
def test_on_chip_at_odd_sizes_and_strides(launches: list[Launch], gpu: str, dtype: torch.dtype, case: str) -> None:
    pred, profile, mask = ODD[case]
    record(torch.empty_strided(pred.shape, pred.stride(), dtype=dtype, device="meta"), profile, mask, forward=False)
    (launch,) = launches
    assert launch.name == "gaussian_on_chip"
    check(launch, gpu)


@on_every_gpu("gpu, dtype, case", pairs(list(GPUS), DTYPES, [*PROFILES, "odd"]))
def test_split_samples(launches: list[Launch], gpu: str, dtype: torch.dtype, case: str) -> None:
    odd = case == "odd"
    sides = (127, 129) if odd else (128, 128)
    record(meta(2, 15 if odd else 16, *sides, dtype=dtype), "closed" if odd else case)
    assert [launch.name for launch in launches] == [
        "gaussian_distance", "gaussian_gradient", "gaussian_distance", "gaussian_finish", "gaussian_gradient",
    ]  # fmt: skip
    for launch in launches:
        assembly = check(launch, gpu)
        if launch.name == "gaussian_finish":
            continue
        # Guarded and unguarded blocks; at odd sizes only the second have 16 bytes.
        factor = 1 if odd else 2
        stores = factor if launch.name == "gaussian_gradient" else 0
        check_width(assembly, gpu, 2 * factor, stores, 60 if odd else 6)


@on_every_gpu("gpu, walk", pairs(list(GPUS), ["dense", "channels last", "sliced"]))
def test_split_samples_with_masks_and_strides(launches: list[Launch], gpu: str, walk: str) -> None:
    mask = meta(2, 1, 128, 128, dtype=torch.bool)
    if walk == "sliced":
        record(meta(2, 16, 128, 256)[..., ::2], "table", mask, each=False)
    else:
        layout = torch.channels_last if walk == "channels last" else torch.contiguous_format
        record(meta(2, 16, 128, 128).to(memory_format=layout), "closed", mask, forward=False)
    for launch in launches:
        assembly = check(launch, gpu)
        if walk != "sliced":
            # A mask that is one for all channels is read byte by byte where these lie side by side.
            check_width(assembly, gpu, 4, 0, 6 if walk == "dense" else 24)


@on_every_gpu("gpu, dtype, case", pairs(list(GPUS), DTYPES, ["forward", "value and gradient", "backward", "odd"]))
def test_expectation(launches: list[Launch], gpu: str, dtype: torch.dtype, case: str) -> None:
    function, _ = fk.get_divergence("kl").critic_functions("log_ratio")
    v, mask = meta(64, 1, 64, 64, dtype=dtype), meta(64, 64, dtype=torch.bool)
    if case == "forward":
        backend.expectation_forward(ExpectationCall(v, function))
    elif case == "value and gradient":
        backend.expectation_value_and_grad(ExpectationCall(v, function, mask=mask))
    elif case == "backward":
        call = ExpectationCall(v, function, mask=mask, reduction="none")
        backend.expectation_backward(call, meta(*v.shape, dtype=torch.float32))
    else:
        backend.expectation_value_and_grad(ExpectationCall(meta(65, 63, dtype=dtype), function, meta(65), None, "none"))
    for launch in launches:
        assembly = check(launch, gpu)
        if case != "odd" and launch.name == "expectation_kernel":
            check_width(assembly, gpu, 1, 0 if launch.arguments[0][2] is None else 1, 8)


MOST_INSTRUCTIONS = {"variational, jensen_shannon": 36, "variational, kl": 28}
"""Per element in the hot loop; AMD's scalar instructions do not count."""


@pytest.mark.parametrize("gpu", GPUS)
def test_hot_loops_are_short(gpu: str) -> None:
    rows = list(bench_compiled.triton_rows([gpu]))
    assert {row["loop"] for row in rows} == set(MOST_INSTRUCTIONS) and len(rows) == 4
    for row in rows:
        assert 3 < row["instructions"] <= MOST_INSTRUCTIONS[row["loop"]] and row["special"] <= 2, row


@on_every_gpu(
    "gpu, dtypes, case",
    pairs(list(GPUS), list(itertools.permutations(DTYPES)), [4096, 16384, 2**18, "odd, masked", "channels last"]),
)
def test_pairs_of_dtypes(launches: list[Launch], gpu: str, dtypes: tuple[torch.dtype, ...], case: int | str) -> None:
    shape = (2, 4, 255, 255) if case == "odd, masked" else (2, 4, 64, 64) if case == "channels last" else (2, case)
    pred, target = (meta(*shape, dtype=dtype) for dtype in dtypes)
    if case == "odd, masked":
        record(pred, target=target, mask=meta(2, 1, 255, 255, dtype=torch.bool))
    elif case == "channels last":
        record(pred, "table", target=target.to(memory_format=torch.channels_last))
    else:
        record(pred, target=target)
    for launch in launches:
        assembly = check(launch, gpu)
        if isinstance(case, int) and launch.name != "gaussian_finish":
            # bfloat16 in 16 bytes, float32 beside it in twice as many.
            check_width(assembly, gpu, 3, 0 if launch.name == "gaussian_distance" else 1, 6)


def test_no_divergence_and_no_number_compiles_anew(launches: list[Launch], sm_90: str) -> None:
    pred = meta(2, 4, 32, 32)
    compile_once.cache_clear()
    for alpha in (0.3, 0.5, 2.0, 3.0):
        profile = fk.get_divergence("alpha", alpha=alpha).gaussian_profile
        call = GaussianCall(pred, pred, profile, alpha, None, None, "sum", "sum", 2 * alpha)
        backend.gaussian_value_and_grad(call, None)
    for name in ("kl", "squared_hellinger", "mse"):
        backend.gaussian_value_and_grad(GaussianCall(pred, pred, fk.get_divergence(name).gaussian_profile), None)
    for launch in launches:
        launch.compiled(sm_90)
    assert compile_once.cache_info().misses == 1
    launches.clear()
    for name in ("kl", "pearson_chi2", "jensen_shannon", "le_cam", "hockey_stick"):
        backend.expectation_value_and_grad(ExpectationCall(meta(64, 16), fk.get_divergence(name).ratio_function("q")))
    for launch in launches:
        launch.compiled(sm_90)
    assert compile_once.cache_info().misses == 2
    launches.clear()
    for name in ("kl", "pearson_chi2", "squared_hellinger", "jensen_shannon", "le_cam", "total_variation"):
        for function in fk.get_divergence(name).critic_functions("log_ratio"):
            backend.expectation_value_and_grad(ExpectationCall(meta(64, 16), function))
    for launch in launches:
        launch.compiled(sm_90)
    assert compile_once.cache_info().misses == 4  # and one for exponentials, one for the softplus


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


WIDE_SHAPES = {
    "one sample": meta(1, 2**31 + 24),
    "three": meta(3, 2**30, 3),
    "many": meta(65536, 65537),
    "strided": meta(2, 2**29, 2, 4)[..., ::2],
    "transposed": meta(2, 2**31, 2).transpose(1, 2),
}


@pytest.mark.quick(case=["one sample", "strided"])
@pytest.mark.parametrize("case", WIDE_SHAPES)
def test_offsets_past_two_to_the_31(launches: list[Launch], sm_90: str, case: str) -> None:
    pred = WIDE_SHAPES[case]
    record(pred, mask=meta(*[1] * (pred.ndim - 1), pred.shape[-1], dtype=torch.bool), each=False)
    record(pred, each=False)
    for launch in launches:
        check(launch, sm_90)
        # Workspaces hold at most one number a program.
        assert launch.programs < 2**31
        assert not narrow_offsets(str(launch.compiled(sm_90).asm["ttir"])), launch.name


@pytest.mark.slow
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
