"""The Triton kernels equal torch's own: run by Triton's interpreter, and compiled without a GPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

INTERPRETED = """
import torch
from bag_factory import make_graphs
from dasmil.nn.neighbour_sums import EmbeddingBags
from dasmil.nn.triton_sums import TritonSums

torch.manual_seed(0)
(graph,) = make_graphs([30])
lists = graph.union
for width, heads, dtype in ((6, 1, torch.float32), (6, 3, torch.float32), (600, 2, torch.float16)):
    x = torch.randn(len(lists), width).to(dtype)
    alpha = torch.rand(len(lists.index), heads).to(dtype)
    grad = torch.randn(len(lists), heads, width).to(dtype)
    for name, tensors in (
        ("of_neighbours", (x, alpha)), ("of_features", (grad, x)), ("of_seers", (grad, alpha))
    ):
        found = getattr(TritonSums, name)(*tensors, lists)
        expected = getattr(EmbeddingBags, name)(*(t.float() for t in tensors), lists)
        close = dict(rtol=1e-5, atol=1e-5) if dtype == torch.float32 else dict(rtol=2e-3, atol=0.1)
        torch.testing.assert_close(found.float(), expected, **close)
        print(name, width, heads, dtype)
"""

COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from dasmil.nn import triton_sums as sums

SIZES = {"WIDTH": 384, "HEADS": 3, "ROWS": 4, "BLOCK": 512}
rows = {"x", "grad", "alpha"}
for kernel in (sums.sum_neighbours, sums.dot_features, sums.sum_seers):
    for kind in ("fp32", "bf16"):
        signature = {}
        for name in kernel.arg_names:
            precise = name == "result" and kernel is sums.dot_features
            of_rows = name in rows or name == "result" and not precise
            signature[name] = f"*{kind}" if of_rows else "*fp32" if precise else "*i32"
            if name in SIZES:
                signature[name] = "constexpr"
        source = ASTSource(kernel, signature, constexprs=SIZES)
        for capability in (75, 80, 90):
            compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
            print(kernel.__name__, kind, capability, len(compiled.asm["cubin"]))
"""


def run(program: str, tmp_path: Path, **environment: str) -> list[str]:
    tests = Path(__file__).resolve().parents[1]
    paths = os.pathsep.join([str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")])
    settings = {**environment, "PYTHONPATH": paths, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=os.environ | settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def test_the_kernels_equal_torchs_own(tmp_path: Path) -> None:
    assert len(run(INTERPRETED, tmp_path, TRITON_INTERPRET="1")) == 9


@pytest.mark.slow
def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    assert len(run(COMPILED, tmp_path)) == 18
