"""Compiling a Relax module to machine code: the list of passes, and the schedule of elementwise kernels.

TVM's default pipeline leaves loops unscheduled, which makes them ten times slower than torch. Here the compile fails if
an expensive kernel is left unscheduled, and names it.
"""

from __future__ import annotations

import math
from typing import Any

import tvm
from tvm import relax, s_tir, tirx

PARALLEL_FROM = 16384
"""Number of elements from which an elementwise kernel is divided among threads."""
HEAVY = 2**18
"""A kernel with this many loop iterations must be scheduled. The smaller ones compute the time embedding."""

t = relax.transform
GRAPH_PASSES = (
    t.CanonicalizeBindings(),
    t.EliminateCommonSubexpr(),
    t.DeadCodeElimination(),
    t.FastMathTransform(),
    # A reshape is kept as an operation, which is a view: RewriteDataflowReshape aborts on kernels without a root block.
    t.LegalizeOps(skip_ops=["relax.reshape"]),
    t.AnnotateTIROpPattern(),
    t.FoldConstant(),
    t.FuseOps(),
    t.FuseTIR(),
    t.DeadCodeElimination(),
)
MACHINE_PASSES = (
    t.ToNonDataflow(),
    t.RemovePurityChecking(),
    t.CallTIRRewrite(),
    t.StaticPlanBlockMemory(),
    t.LowerAllocTensor(),
    t.KillAfterLastUse(),
    t.LowerRuntimeBuiltin(),
    t.ComputePrimValue(),
    t.VMShapeLower(),
    t.AttachGlobalSymbol(),
)


class CompileError(RuntimeError):
    """The model cannot be compiled to fast code; the message names the kernel that prevents it."""


def lower(module: tvm.IRModule, target: Any) -> Any:
    """Compile a module to an executable.

    Raises:
        CompileError: an expensive kernel is left unscheduled.
    """
    with target:
        module = tvm.transform.Sequential(GRAPH_PASSES)(module)
        module = schedule_elementwise(module)
        refuse_heavy(module)
        return tvm.compile(module, target=target, relax_pipeline=tvm.transform.Sequential(MACHINE_PASSES))


def schedule_elementwise(module: tvm.IRModule) -> tvm.IRModule:
    """Schedule every kernel that is one elementwise block: its last axis is vectorised, and a large one is parallel."""
    for name, function in list(module.functions.items()):
        if isinstance(function, tirx.PrimFunc) and not _is_scheduled(function):
            try:
                scheduled = _elementwise(function)
            except s_tir.ScheduleError:
                continue
            if scheduled is not None:
                module.update_func(name, scheduled.with_attr("tirx.is_scheduled", True))
    return module


def _elementwise(function: tirx.PrimFunc) -> tirx.PrimFunc | None:
    schedule = s_tir.Schedule(function)
    root = schedule.get_sblock("root")
    for block in schedule.get_child_blocks(root)[:-1]:
        schedule.compute_inline(block)
    (block,) = schedule.get_child_blocks(root)
    if any(axis.iter_type != 0 for axis in schedule.get(block).iter_vars):
        return None  # a reduction
    loops = schedule.get_loops(block)
    outer, inner = schedule.split(loops[-1], [None, math.gcd(int(schedule.get(loops[-1]).extent), 16)])
    schedule.vectorize(inner)
    rest = schedule.fuse(*loops[:-1], outer)
    count, lanes = int(schedule.get(rest).extent), int(schedule.get(inner).extent)
    if count * lanes >= PARALLEL_FROM:
        shares, _ = schedule.split(rest, [math.gcd(count, 32), None])
        schedule.parallel(shares)
    return schedule.mod["main"]


def refuse_heavy(module: tvm.IRModule) -> None:
    """Raise CompileError if a kernel is unscheduled and has `HEAVY` iterations or more."""
    for name, function in module.functions.items():
        if isinstance(function, tirx.PrimFunc) and not _is_scheduled(function):
            iterations = _iterations(function)
            if iterations >= HEAVY:
                raise CompileError(
                    f"kernel {name.name_hint} ({iterations} iterations) is unscheduled: no converter knows the "
                    "operation it came from, and TVM's own loops would be slower than torch"
                )


def _iterations(function: tirx.PrimFunc) -> int:
    """Iterations of the deepest loop nest of a kernel."""

    def deepest(node: Any, around: int) -> int:
        here = around * int(node.extent) if isinstance(node, tirx.For) else around
        parts = [getattr(node, name, None) for name in ("block", "init", "body", "then_case", "else_case")]
        parts += list(getattr(node, "seq", ()))
        return max([here, *(deepest(part, here) for part in parts if part is not None)])

    return deepest(function.body, 1)


def _is_scheduled(function: tirx.PrimFunc) -> bool:
    return bool(function.attrs and "tirx.is_scheduled" in function.attrs)
