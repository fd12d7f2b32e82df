"""Every Triton kernel compiles for Ampere and Hopper, also where there is no GPU.

In a process of its own: the interpreter, which the other tests use, replaces the compiler. The
compiler takes long. Of attention's pairs of a shape and a tiling one GPU gets every second, the
other GPU the rest, so that each compiles every shape and every tiling. Of the variants of any other
kernel, both GPUs get the first, and each gets every second of the rest.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = """
import collections
import dataclasses
import sys

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compiledllm.kernels import arrange_triton as arrange
from compiledllm.kernels import chunked_delta_rule_triton as chunks
from compiledllm.kernels import delta_rule_triton as delta
from compiledllm.kernels import fixed_order_triton as fixed_order
from compiledllm.kernels import logprobs_triton as logprobs
from compiledllm.kernels import moe_routing_triton as routing
from compiledllm.kernels import moe_triton as moe
from compiledllm.kernels import decode_attention_triton as decode
from compiledllm.kernels import step_inputs_triton as inputs
from compiledllm.kernels import paged_attention_triton as attention
from compiledllm.kernels import prefill_attention_triton as prefill
from compiledllm.kernels import penalties_triton as penalties
from compiledllm.kernels import rotate_store_triton as rotation
from compiledllm.kernels import sampling_triton as sampling
from compiledllm.kernels import gated_norm_triton as gated_norm
from compiledllm.kernels import short_convolution_triton as convolution
from compiledllm.kernels import skinny_triton as skinny
from compiledllm.kernels import state_space_triton as spaces

CAPABILITY = int(sys.argv[1])
TYPES = {
    "block_tables": "*i32", "seq_lens": "*i32", "query_start_loc": "*i32", "slot_mapping": "*i64",
    "partial_out": "*fp32", "partial_stats": "*fp32", "arrivals": "*i32", "max_extra": "i32",
    "even_extra": "i32", "min_tiles": "i32",
    "scale": "fp32", "window": "i32", "soft_cap": "fp32",
    "query_stride": "i32", "table_stride": "i32", "value_offset": "i64",
    "num_rows": "i32", "key_stride": "i32", "value_stride": "i32", "temperatures": "*fp32",
    "seeds": "*i64", "positions": "*i64", "best_scores": "*fp32", "best_ids": "*i32",
    "eps": "fp32", "token_stride": "i32", "num_outputs": "i32", "x_stride": "i32",
    "weight_stride": "i32", "out_stride": "i32", "items": "*i32", "block_experts": "*i32",
    "num_items": "i32", "num_experts": "i32", "num_blocks": "i32",
    "expert_ids": "*i32", "ids": "*i32", "weights": "*fp32", "alpha": "fp32", "limit": "fp32",
    "vocab": "i32", "row_stride": "i32", "num_chunks": "i32", "rows": "*i64", "top_k": "*i32",
    "top_p": "*fp32", "min_p": "*fp32", "peaks": "*fp32", "masses": "*fp32",
    "chosen": "*i64", "best": "*fp32", "counts": "*i32", "named_ids": "*i64",
    "shared_logit": "*fp32",
    "packed": "*i32", "num_named": "i32", "group_peaks": "*fp32",
    "tokens": "*i64", "groups": "*i32", "index": "*i64", "slots": "*i64", "amounts": "*fp32",
    "last_token_ids": "*i64", "num_computed_tokens": "*i64", "group_table": "*i32",
    "input_ids": "*i64", "lengths": "*i64", "indices": "*i64", "max_blocks": "i32",
    "sample_rows": "*i64", "drawn": "*i64", "padding_row": "i32", "num_samples": "i32",
    "num_best": "i32",
    "num_tokens": "i32", "kv_scales": "*fp32", "log_decay_rate": "*fp32",
    "step_bias": "*fp32", "a_stride": "i32", "b_stride": "i32", "gate_stride": "i32",
    "num_heads": "i32", "factors": "*fp32", "state_stride": "i32", "channels": "i32",
    "num_inputs": "i32", "num_units": "i32", "snapshots": "*i64", "skip": "*fp32",
    "step_stride": "i32",
}
FLOATS = {
    "query", "key", "value", "kv_cache", "out", "logits", "qkv", "q_weight", "k_weight", "cos",
    "sin", "x", "weight", "bias", "sinks", "inverses", "scores", "state",
    "a", "b", "c", "step", "gate",
}


decode.num_multiprocessors = lambda: 132  # of an H100; there may be no GPU here


turns = collections.Counter()  # of each kernel


def check(kernel, dtype, tiling=None, num_warps=4, max_shared=99 * 1024, **constants):
    if kernel not in (decode._decode_kernel, prefill._prefill_kernel):
        turns[kernel] += 1
        if turns[kernel] > 1 and (turns[kernel] + (CAPABILITY >= 90)) % 2:
            return
    # A kernel that knows scales of the KV cache is also compiled for a cache in FP8.
    if "HAS_KV_SCALES" in kernel.arg_names and "HAS_KV_SCALES" not in constants:
        check(kernel, dtype, tiling, num_warps, HAS_KV_SCALES=False, **constants)
        constants["HAS_KV_SCALES"] = True
        if CAPABILITY < 90:  # no FP8 before 89
            return
    constants["OVERLAP"] = CAPABILITY >= 90
    if tiling is not None:
        constants |= {name.upper(): size for name, size in dataclasses.asdict(tiling).items()}
    names = kernel.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    types = TYPES | {name: "*" + dtype for name in FLOATS}
    if constants.get("HAS_KV_SCALES"):
        types["kv_cache"] = "*fp8e4nv"
    if kernel is sampling._row_kernel:
        types["out"] = "*i64"
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": num_warps}
    if tiling is not None:
        options = {"num_warps": tiling.num_warps, "num_stages": getattr(tiling, "num_stages", 3)}
        options["maxnreg"] = getattr(tiling, "max_registers", None)
    source = ASTSource(fn=kernel, signature=signature, constexprs=values)
    target = GPUTarget("cuda", CAPABILITY, 32)
    compiled = triton.compile(source, target=target, options=options)
    assert compiled.metadata.shared <= max_shared, (kernel.__name__, compiled.metadata.shared)


def every_second(*tilings):
    # From the first on or from the second on, alternating with shapes, dtypes and GPUs.
    return tilings[(index + (dtype == "fp32") + (CAPABILITY >= 90)) % 2 :: 2]


for experts, rows, tile in ((128, 16, 128), (32, 128, 1024), (128, 64, 1024)):
    check(routing._sort_kernel, "fp32", EXPERTS=experts, ROWS=rows, TILE=tile)
check(penalties._penalize_kernel, "fp32", IN_PROMPT=1 << 30, CHUNK=2048)
check(penalties._count_kernel, "fp32")
for kernel in (inputs._gather_kernel, inputs._unpack_kernel, inputs._last_tokens_kernel):
    check(kernel, "fp32", BLOCK_SIZE=16, CHUNK=1024, TOKENS=128)
check(inputs._scatter_kernel, "fp32", ROWS=128)
GATES = ((False, False), (True, False), (True, True), (False, True))
SHAPES = {"bf16": ((128, False), (80, True), (256, False)), "fp32": ((128, False),)}
for dtype, of_torch in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
    turn = 2 * (dtype == "fp32") + (CAPABILITY >= 90)
    check(attention._store_kernel, dtype, WIDTH=1024, PADDED=1024)
    check(sampling._chunk_kernel, dtype, CHUNK=4096, GROUP=64)
    check(logprobs._chunk_kernel, dtype, CHUNK=4096)
    check(logprobs._row_kernel, dtype, NAMED=128, CHUNKS=64, CANDIDATES=2048)
    check(
        sampling._row_kernel, dtype, num_warps=16, CHUNKS=64, PER_CHUNK=64,
        GROUPS=256 if turn in (0, 3) else 64, GROUP=64,  # 256 take the compiler long
        KEY_BITS=8 * of_torch.itemsize,
    )
    for experts, top_k, renormalize in ((128, 8, True), (64, 4, False), (8, 2, True)):
        check(
            routing._route_kernel, dtype, num_warps=1, TOP_K=top_k, RENORMALIZE=renormalize,
            EXPERTS=experts, PLACES=2 * top_k if renormalize else top_k, IS_SIGMOID=renormalize,
            HAS_BIAS=renormalize, HAS_SHARED=renormalize, HAS_SHARED_LOGIT=experts == 128,
            NUM_GROUPS=8 if renormalize else 1, TOP_GROUPS=4, GROUPS=8,
        )
    for rows in (1, 8, 16, 32) if dtype == "bf16" else ():
        kernel = skinny._few_rows_kernel if rows > 1 else skinny._one_row_kernel
        tiling = skinny.tiling_for(rows, 6144, 3072)
        check(
            kernel, dtype, tiling, NUM_INPUTS=3072, HAS_BIAS=True,
            PADDED_OUTPUTS=max(16, tiling.outputs), ROWS=rows,
        )
    # Every tiling for every dtype and GPU, of which each takes another turn of the gates.
    for index, items in enumerate((8, 512, 1500, 4000, 60000)):
        tiling = moe.rule_for(items, 128, of_torch)
        gated, clamped = GATES[(index + turn) % len(GATES)]
        check(
            moe._grouped_kernel, dtype, tiling, NUM_OUTPUTS=768,
            NUM_INPUTS=2880 if clamped else 2048, ITEMS_PER_ROW=8, IS_SORTED=items > 8,
            IS_GATED=gated, HAS_BIAS=clamped, HAS_LIMIT=clamped and gated,
            IS_GELU=gated and not clamped,
        )
    arranged = ((8, True, 0), (256, False, 1), (64, True, 2)) if dtype == "bf16" else ()
    for rows, gated, order in arranged:
        check(
            arrange._arrange_kernel, dtype, ITEMS_PER_ROW=1 if gated else 4, HAS_EXPERTS=gated,
            ORDER=order, IS_GATED=gated, HAS_LIMIT=gated, IS_GELU=False,
            ROWS=rows, COLUMNS=arrange._COLUMNS,
        )
    check(fixed_order._rms_norm_kernel, dtype, SIZE=576, PADDED=1024)
    for rows, outputs in ((8, 1024), (8, 6144), (500, 1024)):
        tiling = fixed_order.tiling_for(rows, outputs, of_torch)
        check(fixed_order._linear_kernel, dtype, tiling, NUM_INPUTS=3072, HAS_BIAS=True)
    for gated in (False, True):
        check(
            rotation._rotate_store_kernel, dtype, NUM_HEADS=16, NUM_KV_HEADS=8, HEAD_DIM=128,
            ROTARY_DIM=128, HAS_NORM=True, PLUS_ONE=gated, HAS_GATE=gated, HEADS=8, PADDED_DIM=128,
            NORMS_VALUES=False, KEYS_ARE_VALUES=False,
        )
    of_gemma = ((8, 256), (4, 512), (0, 512)) if turn == 1 else ()
    for num_kv_heads, dim in of_gemma:
        check(
            rotation._rotate_store_kernel, dtype, NUM_HEADS=32, NUM_KV_HEADS=num_kv_heads,
            HEAD_DIM=dim, ROTARY_DIM=dim, HAS_NORM=True, PLUS_ONE=False, HAS_GATE=False,
            HEADS=2048 // dim, PADDED_DIM=dim, NORMS_VALUES=num_kv_heads > 0,
            KEYS_ARE_VALUES=num_kv_heads == 4,
        )
    for width in (3, 4):
        shape = {"WIDTH": width, "PADDED": 4, "HAS_BIAS": width == 3, "IS_SILU": width == 4}
        check(convolution._step_kernel, dtype, CHANNELS=256, **shape)
        shape |= {"TOKENS": 16, "HAS_SNAPSHOTS": True}
        check(convolution._ragged_kernel, dtype, CHANNELS=128, **shape)
    dim = 128 if dtype == "bf16" else 64  # float32 takes the compiler long
    shape = {"NUM_HEADS": 32, "GROUP": 2, "KEY_DIM": dim, "VALUE_DIM": dim, "EPS": 1e-6}
    shape["HAS_SNAPSHOTS"] = True
    check(gated_norm._gated_norm_kernel, dtype, DIM=dim, PADDED=dim, HEADS=8)
    for programs in (32, 2048):
        check(delta._step_kernel, dtype, delta.step_tiling(dim, torch.float32, programs), **shape)
    check(chunks._chunk_kernel, dtype, chunks.chunk_tiling(of_torch), **shape)
    for max_shared in (99 * 1024, 227 * 1024) if CAPABILITY == 90 else (99 * 1024,):
        tiling = chunks.scan_tiling(of_torch, dim, max_shared)
        check(chunks._scan_kernel, dtype, tiling, max_shared=max_shared, **shape)
    shape |= {"STATE_DIM": dim, "HEAD_DIM": 64, "GROUP": 32}
    check(spaces._step_kernel, dtype, spaces.step_tiling(64), **shape)
    tiling = spaces.scan_tiling(of_torch, dim, 64)
    check(spaces._scan_kernel, dtype, tiling, max_shared=99 * 1024, **shape)
    for index, (head_dim, window) in enumerate(SHAPES[dtype]):
        shape = {
            "GROUP": 4, "NUM_HEADS": 32, "HEAD_DIM": head_dim, "BLOCK_SIZE": 16,
            "TOKEN_STRIDE": 8 * head_dim, "HAS_WINDOW": window, "HAS_SOFT_CAP": window,
            "IN_CHUNKS": window and CAPABILITY >= 90, "HAS_SINKS": window,
            "PADDED_DIM": triton.next_power_of_2(head_dim),
        }
        for programs, tokens in every_second((8, 1), (100, 4), (1024, 1)):
            tiling = decode.decode_tiling(head_dim, 4 * tokens, of_torch, programs)
            check(
                decode._decode_kernel, dtype, tiling, MAX_ROWS=512, TOKENS=tokens,
                SUM_LANES=4 * tokens, AT_ONCE=2, **shape  # an unrolled loop's turns are alike
            )
        for queries, fixed in every_second((0, False), (0, True), (10**6, False)):
            tiling = prefill.prefill_tiling(head_dim, 4, of_torch, queries)
            check(prefill._prefill_kernel, dtype, tiling, FIXED_ORDER=fixed, **shape)
    if dtype == "bf16" and int(sys.argv[1]) == 90:
        max_shared = 227 * 1024
        tiling = prefill.tiling_of_wide_heads(4, of_torch, max_shared)
        shape |= {"HEAD_DIM": 512, "TOKEN_STRIDE": 1024, "PADDED_DIM": 512, "HAS_KV_SCALES": False}
        shape |= {"FIXED_ORDER": False}
        check(prefill._prefill_kernel, dtype, tiling, max_shared=max_shared, **shape)
"""


@pytest.mark.parametrize("compute_capability", [80, 90])
def test_every_kernel_compiles(compute_capability: int) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_DISABLE_LINE_INFO"] = "1"
    command = [sys.executable, "-c", PROGRAM, str(compute_capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
