"""How hot loops are found in listings, and what report.py predicts from them."""

from __future__ import annotations

import bench_compiled
import compiled
import pytest
import report
import torch

NVIDIA = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;
        /*0010*/                   LDG.E.128.CONSTANT R4, desc[UR8][R2.64] ;
        /*0020*/              @!P0 BRA 0x50 ;
        /*0030*/                   LDG.E.128 R12, desc[UR8][R2.64] ;
        /*0040*/                   FMUL R4, R4, R12 ;
        /*0050*/                   MUFU.EX2 R5, R4 ;
        /*0060*/                   MUFU.RCP R6, R5 ;
        /*0070*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*0080*/               @P1 BRA 0x10 ;
        /*0090*/                   STG.E desc[UR8][R2.64], R4 ;
        /*00a0*/                   EXIT ;
        /*00b0*/                   BRA 0xb0 ;
"""
TABLE = """
        /*0000*/                   BRX R14 -0x2df0 ;
        /*0010*/                   FADD R1, R1, R2 ;
        /*0020*/                   BRA 0x50 ;
        /*0030*/                   FMUL R1, R1, R2 ;
        /*0040*/                   STG.E.128 desc[UR8][R2.64], R4 ;
        /*0050*/                   EXIT ;
"""
AMD = """
        s_load_dwordx2 s[0:1], s[4:5], 0x0
.LBB0_1: ; a loop
        global_load_dwordx4 v[0:3], v[4:5], off
        s_cbranch_scc1 .LBB0_3
        v_mul_f32_e32 v0, v1, v2
.LBB0_3:
        v_exp_f32_e32 v0, v0
        global_store_dwordx4 v[4:5], v[0:3], off
        s_cbranch_vccnz .LBB0_1
        s_endpgm
        s_nop 0
"""


def test_the_way_round_a_loop_leaves_out_what_is_rare() -> None:
    code = compiled.Code("a_kernel", 40, 0, *compiled.nvidia_instructions(NVIDIA))
    way = code.around({compiled.LOAD: 1, compiled.STORE: 1})
    assert [text.split()[0] for text in way] == [
        "LDG.E.128.CONSTANT", "@!P0", "MUFU.EX2", "MUFU.RCP", "STG.E.128", "@P1",
    ]  # fmt: skip
    assert len(code.around({compiled.LOAD: 2})) == 8
    assert code.around({compiled.LOAD: 3}) == [] == code.around({r"\bHMMA\b": 1})


def test_what_may_come_after() -> None:
    code = compiled.Code("a_kernel", 40, 0, *compiled.nvidia_instructions(NVIDIA))
    assert code.after("MUFU.RCP")[0].startswith("LDG") and code.after("MUFU.RCP")[-1] == "EXIT"
    assert code.after(r"STG\.E ") == ["EXIT"] and code.after("HMMA") == []


def test_jumps_by_a_table() -> None:
    code = compiled.Code("a_kernel", 40, 0, *compiled.nvidia_instructions(TABLE))
    assert code.following[0] == (1, 3)
    assert [text.split()[0] for text in code.through()] == ["BRX", "FMUL", "STG.E.128", "EXIT"]


def test_the_way_through_takes_all_accesses() -> None:
    code = compiled.Code("a_kernel", 40, 0, *compiled.nvidia_instructions(NVIDIA))
    assert len(code.through()) == 11 and code.through()[-1] == "EXIT"


def test_amd_loops() -> None:
    code = compiled.Code("a_kernel", 40, 0, *compiled.amd_instructions(AMD))
    way = code.around({compiled.AMD_LOAD: 1, compiled.AMD_STORE: 1})
    assert [text.split()[0] for text in way] == [
        "global_load_dwordx4", "s_cbranch_scc1", "v_exp_f32_e32", "global_store_dwordx4", "s_cbranch_vccnz",
    ]  # fmt: skip


def test_a_row_counts_per_element() -> None:
    loop = bench_compiled.Loop("variational, kl", "", 0, (1, 1), 128)
    code = compiled.Code("a_kernel", 65, 0, *compiled.nvidia_instructions(NVIDIA))
    row = bench_compiled.row_of("cuda", loop, "sm_90", torch.float32, code, 1)
    assert row["instructions"] == 6 / 4 and row["special"] == 2 / 4
    assert row["threads"] == 7 * 128 and row["in_flight"] == 7 * 128 * 16
    amd = bench_compiled.row_of(
        "triton", loop, "gfx942", torch.bfloat16, compiled.Code("", 65, 0, *compiled.amd_instructions(AMD)), 1
    )
    assert amd["instructions"] == 3 / 8 and amd["special"] == 1 / 8 and "threads" not in amd


def test_pipes() -> None:
    row = {"loop": "variational, kl", "gpu": "sm_90", "dtype": "float32", "instructions": 32.0, "special": 1.0}
    found = dict(report.pipes(row))
    assert set(found) == {"H100", "H200"}
    # A quarter of a cycle per element of 8 bytes.
    assert found["H100"] == pytest.approx(0.9 * 0.25 * 3.0e12 / (8 * 132 * 1.755e9))
    assert dict(report.pipes({**row, "special": 8.0}))["H100"] == pytest.approx(2 * found["H100"])
    assert report.pipes({**row, "gpu": "gfx942"}) == []
