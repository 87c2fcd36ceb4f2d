# SPDX-License-Identifier: Apache-2.0
"""The compiled CPU kernels against the reference in float64: every instruction set that runs here, width, group size."""

from __future__ import annotations

import itertools
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from tiny import relative_rms
from torch import Tensor

from transformers_mcmoe.kernels import arena, cpu, reference
from transformers_mcmoe.plan import ExpertWidths
from transformers_mcmoe.quantization import WIDTHS, dequantize, pack
from transformers_mcmoe.quantization.grid import Quantized, group_size_for, num_groups

CSRC = Path(cpu.__file__).parent / "csrc"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# most that rounding the result to its dtype takes
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 4e-3, torch.float16: 5e-4}
needs_library = pytest.mark.skipif(cpu.library() is None, reason="installed without the CPU kernels (no C++ compiler)")


def _random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _matrix(out: int, columns: int, bits: int, group_size: int, seed: int = 0, middle: bool = False) -> Tensor:
    """A random packed matrix; zeros are no integers, anywhere among the codes or in their middle."""
    generator = torch.Generator().manual_seed(seed)
    size = group_size_for(columns, group_size)
    n = num_groups(columns, size)
    codes = torch.randint(0, 2**bits, (out, n, size), dtype=torch.uint8, generator=generator)
    scale = (torch.rand(out, n, generator=generator) * 0.1 + 0.01).half().float()
    place = torch.rand(out, n, generator=generator)
    zero = ((0.45 + 0.1 * place if middle else place) * (2**bits - 1)).half().float()
    return pack(Quantized(codes, scale, zero, bits, columns))


@pytest.fixture(params=cpu.instruction_sets())
def isa(request, monkeypatch):
    monkeypatch.setenv("MCMOE_MODE", "exact")
    with cpu.using(request.param):
        yield request.param


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _linear(x: Tensor, qweight: Tensor, bits: int, bias: Tensor | None = None) -> Tensor:
    group = (qweight.shape[2] - 4) * 8 // bits
    return cpu.packed_linear(x, arena.pack_matrix(qweight, bits), bias, qweight.shape[0], bits, group, x.shape[-1])


@needs_library
class TestLinear:
    @pytest.mark.parametrize("group_size", [32, 64, 96, 128, 256])
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_exact(self, isa: str, bits: int, group_size: int):
        for (out, columns), dtype in itertools.product([(1, 96), (33, 256), (48, 200), (95, 576)], DTYPES):
            qweight = _matrix(out, columns, bits, group_size)
            dense = dequantize(qweight, bits, columns, torch.float64)
            for tokens in (1, 2, 3, 7, 8, 21):
                x = _random(tokens, columns, seed=tokens).to(dtype)
                y = _linear(x, qweight, bits)
                assert y.dtype == dtype
                error, expected = y.double() - x.double() @ dense.T, x.double() @ dense.T
                # a single number can be a small difference of large ones
                size = expected if out > 1 else x.double().abs() @ dense.T.abs()
                assert error.norm() <= (1e-6 + ROUNDING[dtype]) * size.norm()

    @pytest.mark.parametrize("mode", cpu.MODES)
    @pytest.mark.parametrize("bits", WIDTHS)
    def test_large_tiles(self, isa: str, bits: int, mode: str, monkeypatch: pytest.MonkeyPatch):
        """Matrix tiles of 16 to 128 tokens, groups of odd numbers of units, and one that is too large for them."""
        monkeypatch.setenv("MCMOE_MODE", mode)
        for tokens, columns, group_size in [(64, 288, 96), (130, 512, 128), (300, 96, 32), (70, 1024, 1024)]:
            qweight = _matrix(40, columns, bits, group_size, middle=True)
            x = _random(tokens, columns).to(torch.bfloat16)
            expected = x.double() @ dequantize(qweight, bits, columns, torch.float64).T
            error = relative_rms(_linear(x, qweight, bits), expected)
            assert error <= ROUNDING[torch.bfloat16] + (1e-6 if mode == "exact" else 1.5e-2)

    @pytest.mark.parametrize("bits", WIDTHS)
    def test_int8(self, isa: str, bits: int, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("MCMOE_MODE", "int8")
        for tokens, group_size in itertools.product((1, 2, 5, 40), (32, 128)):
            qweight = _matrix(96, 512, bits, group_size, middle=True)  # weights around 0, as models have them
            x = _random(tokens, 512)
            expected = x.double() @ dequantize(qweight, bits, 512, torch.float64).T
            assert relative_rms(_linear(x, qweight, bits), expected) <= 1e-2

    @pytest.mark.parametrize("tokens", [1, 2, 4, 9])
    def test_exact_beside_extreme_activations(self, isa: str, tokens: int):
        """Sinks, tiny and vanishing groups, and numbers that are none."""
        qweight = _matrix(64, 512, 2, 128, middle=True)
        dense = dequantize(qweight, 2, 512, torch.float64)
        x = _random(tokens, 512)
        x[:, 3], x[:, 128:256], x[:, 256:384] = 1e4, 0.0, x[:, 256:384] * 1e-38
        assert relative_rms(_linear(x, qweight, 2), x.double() @ dense.T) <= 1e-6
        assert not _linear(torch.zeros(tokens, 512), qweight, 2).any()
        for value in (torch.nan, torch.inf):
            x[0, 300] = value
            y = _linear(x, qweight, 2)
            assert not y[0].isfinite().any()
            assert y[1:].isfinite().all()

    def test_int8_rounds_as_stated(self, isa: str, monkeypatch: pytest.MonkeyPatch):
        """Each group of a token is rounded to 127 steps of its largest magnitude, ties to even."""
        monkeypatch.setenv("MCMOE_MODE", "int8")
        qweight = _matrix(40, 256, 3, 64)
        x = _random(9, 256)
        groups = x.view(9, 4, 64)
        step = groups.abs().amax(-1, keepdim=True) / 127
        rounded = ((groups * (1 / step)).round() * step).view(9, 256)
        expected = rounded.double() @ dequantize(qweight, 3, 256, torch.float64).T
        assert relative_rms(_linear(x, qweight, 3), expected) <= 1e-4  # a value next to a tie may go the other way

    def test_many_tokens_and_two_threads(self, isa: str, threads):
        qweight, bias = _matrix(200, 384, 2, 128), _random(200, seed=3)
        x = _random(300, 384)
        expected = x.double() @ dequantize(qweight, 2, 384, torch.float64).T + bias.double()
        results = []
        for count in (1, 2):
            threads(count)
            results.append(_linear(x, qweight, 2, bias))
        assert relative_rms(results[0], expected) <= 1e-6
        assert torch.equal(*results)

    def test_every_output_is_written(self, isa: str):
        qweight = _matrix(70, 96, 3, 32)
        blocks = arena.pack_matrix(qweight, 3)
        x, y = _random(11, 96), torch.full((11, 70), float("nan"))
        cpu.library().mcmoe_linear(
            blocks.data_ptr(), 70, 96, 3, 32, 0, x.data_ptr(), 0, 11, None, y.data_ptr(), torch.get_num_threads()
        )
        assert relative_rms(y, x @ dequantize(qweight, 3, 96).T) <= 1e-6

    def test_zeros_and_no_tokens(self, isa: str, monkeypatch: pytest.MonkeyPatch):
        qweight = _matrix(16, 64, 4, 64)
        for mode in cpu.MODES:
            monkeypatch.setenv("MCMOE_MODE", mode)
            assert torch.equal(_linear(torch.zeros(3, 64), qweight, 4), torch.zeros(3, 16))
            assert _linear(torch.zeros(0, 64), qweight, 4).shape == (0, 16)


def _experts(num: int, hidden: int, inner: int, gated: bool, dropped: int, group_size: int):
    """Packed matrices [gate,] up, down of each expert at mixed widths, and their table."""
    gate_up = [0 if e == dropped else WIDTHS[e % 5] for e in range(num)]
    down = [0 if e == dropped else WIDTHS[(e + 2) % 5] for e in range(num)]
    sizes = [(inner, hidden)] * (2 if gated else 1) + [(hidden, inner)]
    matrices = [
        [
            _matrix(rows, columns, down[e] if n == len(sizes) - 1 else gate_up[e], group_size, 10 * e + n, middle=True)
            for n, (rows, columns) in enumerate(sizes)
        ]
        if gate_up[e]
        else []
        for e in range(num)
    ]
    layout, size = arena.layout(sizes, ExpertWidths(tuple(gate_up), tuple(down)), group_size)
    return matrices, layout, size


@needs_library
class TestMoe:
    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize(("hidden", "inner", "group_size"), [(64, 96, 32), (192, 200, 128), (576, 416, 96)])
    def test_equals_the_reference(self, isa: str, threads, hidden: int, inner: int, group_size: int, gated: bool):
        matrices, layout, size = _experts(6, hidden, inner, gated, 2, group_size)
        blocks, flat = arena.pack_experts(matrices, layout, size), [m for own in matrices for m in own]
        for tokens in (1, 5, 40, 300) if hidden == 192 else (2, 33):
            x = _random(tokens, hidden) / 40
            # ids beyond the last expert, a dropped expert, an expert twice
            index = torch.randint(0, 8, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
            weights = _random(tokens, 3, seed=1)
            options = (inner, "silu", gated)
            expected = reference.moe_mlp(
                x.double(), index, weights.double(), reference.Layer(flat, layout, [], [], *options)
            )
            threads(1)
            y = cpu.moe_mlp(x, index, weights, blocks, layout, *options)
            assert relative_rms(y, expected) <= 2e-6
            threads(2)
            assert torch.equal(cpu.moe_mlp(x, index, weights, blocks, layout, *options), y)

    @pytest.mark.parametrize("mode", cpu.MODES)
    def test_lower_precision(self, isa: str, mode: str, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setenv("MCMOE_MODE", mode)
        matrices, layout, size = _experts(5, 256, 384, True, 4, 128)
        blocks, flat = arena.pack_experts(matrices, layout, size), [m for own in matrices for m in own]
        for dtype, tokens in itertools.product(DTYPES, (1, 40)):
            x, weights = (_random(tokens, 256) / 40).to(dtype), torch.rand(tokens, 2)
            index = torch.stack((torch.arange(tokens) % 5, torch.full((tokens,), 3)), dim=1)
            y = cpu.moe_mlp(x, index, weights, blocks, layout, 384, "silu", True)
            expected = reference.moe_mlp(
                x.double(), index, weights, reference.Layer(flat, layout, [], [], 384, "silu", True)
            )
            assert y.dtype == dtype
            assert relative_rms(y, expected) <= (2e-2 if mode == "int8" else 2e-6 + 2.5 * ROUNDING[dtype])

    @pytest.mark.parametrize("activation", cpu.ACTIVATIONS)
    def test_activations(self, isa: str, activation: str):
        matrices, layout, size = _experts(2, 64, 64, True, -1, 64)
        blocks, flat = arena.pack_experts(matrices, layout, size), [m for own in matrices for m in own]
        x, index, weights = _random(4, 64), torch.tensor([[0, 1]] * 4), torch.rand(4, 2)
        y = cpu.moe_mlp(x, index, weights, blocks, layout, 64, activation, True)
        expected = reference.moe_mlp(
            x.double(), index, weights, reference.Layer(flat, layout, [], [], 64, activation, True)
        )
        assert relative_rms(y, expected) <= 2e-6

    @pytest.mark.parametrize("gated", [True, False])
    @pytest.mark.parametrize(("hidden", "inner", "group_size"), [(64, 96, 32), (192, 200, 128), (576, 432, 96)])
    def test_factors(self, isa: str, threads, hidden: int, inner: int, group_size: int, gated: bool):
        """Experts with a matrix, with factors of several ranks and widths in its place or beside it, and a dropped one."""
        widths = ExpertWidths((2, 0, 0, 3, 0, 1), (4, 0, 0, 2, 0, 8), (0, 32, 0, 40, 160, 8), 4)
        sizes = [(inner, hidden)] * (2 if gated else 1) + [(hidden, inner)]
        layout, size = arena.layout(sizes, widths, group_size)
        nothing = torch.empty(0, dtype=torch.uint8)
        matrices, factors = [], []
        for e in range(6):
            own = [(widths.of_role("down" if n == len(sizes) - 1 else "gate_up")[e], *s) for n, s in enumerate(sizes)]
            if e not in widths.kept:
                own = []
            rank = widths.rank_of(e)
            matrices.append(
                [_matrix(*s, bits, group_size, 10 * e + n) if bits else nothing for n, (bits, *s) in enumerate(own)]
            )
            shapes = [shape for _, rows, columns in own for shape in ((rank, columns), (rows, rank))]
            factors.append(
                [_matrix(*s, 4, group_size, 70 + 10 * e + n) if rank else nothing for n, s in enumerate(shapes)]
            )
        blocks = arena.pack_experts(matrices, layout, size, factors)
        flat, thin = [m for own in matrices for m in own], [m for own in factors for m in own]
        for tokens in (1, 5, 40, 300) if hidden == 192 else (2, 33):
            x = _random(tokens, hidden) / 40
            index = torch.randint(0, 7, (tokens, 3), generator=torch.Generator().manual_seed(tokens))
            weights, options = _random(tokens, 3, seed=1), (inner, "silu", gated)
            layer = reference.Layer(flat, layout, thin[::2], thin[1::2], *options)
            expected = reference.moe_mlp(x.double(), index, weights.double(), layer)
            threads(1)
            y = cpu.moe_mlp(x, index, weights, blocks, layout, *options)
            assert relative_rms(y, expected) <= 4e-6
            threads(2)
            assert torch.equal(cpu.moe_mlp(x, index, weights, blocks, layout, *options), y)

    def test_nobody_is_routed(self, isa: str):
        matrices, layout, size = _experts(3, 64, 64, True, 1, 64)
        blocks = arena.pack_experts(matrices, layout, size)
        x, weights = _random(5, 64), torch.rand(5, 2)
        for value in (1, 3, -1, 99):  # the dropped expert, and no expert's id
            y = cpu.moe_mlp(x, torch.full((5, 2), value), weights, blocks, layout, 64, "silu", True)
            assert torch.equal(y, torch.zeros_like(x))


def test_settings_are_checked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MCMOE_MODE", "int4")
    with pytest.raises(ValueError, match="MCMOE_MODE is 'int4'; set it to one of"):
        cpu.mode()
    monkeypatch.setenv("MCMOE_ISA", "reference")
    assert cpu.library.__wrapped__() is None


@needs_library
def test_unknown_instruction_set(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MCMOE_ISA", "avx9")
    before = cpu.instruction_set()
    with pytest.raises(ValueError, match="MCMOE_ISA is 'avx9', which cannot run here; choose one of"):
        cpu.library.__wrapped__()
    with pytest.raises(ValueError, match="'avx9' cannot run here"), cpu.using("avx9"):
        pass
    assert cpu.instruction_set() == before


# what every build has, and a main that checks it without Python
SOURCES = [
    str(CSRC / f"{name}.cpp")
    for name in ("api", "drive", "layout", "linear", "moe", "pruning", "rounding", "isa_scalar", "selftest")
]


@pytest.mark.slow
@pytest.mark.parametrize("sanitizer", ["address,undefined", "thread"])
def test_sanitizers(tmp_path: Path, sanitizer: str):
    """Drivers, layout and the plain kernels under a sanitizer."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    flags = [
        "-std=c++17",
        "-O0",
        "-g",
        f"-fsanitize={sanitizer}",
        "-fno-sanitize-recover=all",
        "-DMCMOE_STD_THREADS",
        "-DMCMOE_ONLY_SCALAR",
    ]
    program = tmp_path / "selftest"
    subprocess.run([compiler, *flags, *SOURCES, "-lpthread", "-o", str(program)], check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_neon(tmp_path: Path):
    """The ARM kernels on an emulated processor."""
    compiler, emulator = shutil.which("aarch64-linux-gnu-g++"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("no ARM compiler or emulator: apt install g++-aarch64-linux-gnu qemu-user")
    flags = ["-std=c++17", "-O1", "-DMCMOE_STD_THREADS"]
    objects = []
    for source in [*SOURCES, str(CSRC / "isa_neon.cpp")]:
        own = ["-march=armv8.2-a+dotprod"] if "neon" in source else []
        objects.append(str(tmp_path / f"{Path(source).stem}.o"))
        subprocess.run([compiler, *flags, *own, "-c", source, "-o", objects[-1]], check=True)
    program = tmp_path / "selftest"
    subprocess.run([compiler, "-static", *objects, "-lpthread", "-o", str(program)], check=True)
    for name in ("neon", "scalar"):
        done = subprocess.run([emulator, "-cpu", "max", str(program), name], capture_output=True, text=True)
        assert done.returncode == 0, name + done.stderr[-3000:]
