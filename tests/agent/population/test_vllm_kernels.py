"""vLLM's compiled CPU kernels, taken in the place of torch's way."""

from typing import Any

import pytest

from agent.population.placement import on_cpu
from agent.population.vllm_arguments import PROVIDER, cpu_arguments, extension

if not on_cpu():
    pytest.skip("a CPU build of vLLM only", allow_module_level=True)

import torch
from vllm import ir
from vllm.config import CompilationConfig, VllmConfig, set_current_vllm_config
from vllm.config.kernel import IrOpPriorityConfig
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.utils.import_utils import resolve_obj_by_qualname

from agent.population import vllm_kernels

EPSILON = 1e-5
ROUNDING = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}  # relative
SHAPES = [(1, 16), (7, 64), (3, 576), (2, 5, 128)]


def normal(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.fixture
def priority() -> Any:
    """Operations are dispatched as in an engine that is started on the CPU."""
    given = cpu_arguments(None)["ir_op_priority"]
    named = IrOpPriorityConfig(**{name: [*first, "native"] for name, first in given.items()})
    named.gelu_and_mul_sparse = ["native"]
    with named.set_priority():
        yield


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.usefixtures("priority")
def test_norms_are_the_exact_ones_to_a_rounding(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, more, weight = normal(shape, dtype), 3 * normal(shape, dtype), normal(shape[-1:], dtype)
    for norm, parts in ((ir.ops.rms_norm, (x,)), (ir.ops.fused_add_rms_norm, (x, more))):
        chosen = norm.dispatch(*parts, weight, EPSILON)
        assert chosen.provider == PROVIDER
        told = chosen.impl_fn(*(part.clone() for part in parts), weight, EPSILON)
        total = torch.stack([part.double() for part in parts]).sum(0)
        root = (total.square().mean(-1, keepdim=True) + EPSILON).sqrt()
        exact = total.to(dtype).double() / root * weight.double()
        wanted = (exact, total) if len(parts) > 1 else (exact,)
        for ours, value in zip(told if len(parts) > 1 else (told,), wanted, strict=True):
            assert ours.dtype == dtype
            torch.testing.assert_close(ours.double(), value, rtol=ROUNDING[dtype], atol=1e-6)


@pytest.mark.usefixtures("priority")
def test_what_a_kernel_cannot_read_goes_torchs_way() -> None:
    x, weight = normal((4, 64), torch.float32), normal((64,), torch.float32)
    odd = x[:, :24].contiguous(), weight[:24]
    for args in (
        (x[:, ::2], weight[::2], EPSILON),
        (x.T.contiguous().T, weight, EPSILON),
        (*odd, EPSILON),
        (x, None, EPSILON),
        (x.to(torch.bfloat16), weight, EPSILON),
        (x, weight, EPSILON, 32),
        (x.view(4, 2, 32), weight.view(2, 32), EPSILON),  # a row of weights for each head
    ):
        assert ir.ops.rms_norm.dispatch(*args).provider == "native"
    strided = x[:, ::2], x[:, ::2].contiguous(), weight[::2].contiguous(), EPSILON
    for args in (strided, (strided[1], *strided[:1], *strided[2:])):
        assert ir.ops.fused_add_rms_norm.dispatch(*args).provider == "native"


@pytest.mark.filterwarnings("ignore:.*script_method:DeprecationWarning")  # torch's own
@pytest.mark.parametrize("dtype", ROUNDING)
def test_the_gate_of_an_mlp_is_the_exact_one_to_a_rounding(dtype: torch.dtype) -> None:
    with set_current_vllm_config(VllmConfig(compilation_config=CompilationConfig(mode=0))):
        layer = SiluAndMul()
    assert type(layer) is vllm_kernels.CompiledSiluAndMul
    for shape in SHAPES:
        x = normal((*shape[:-1], 2 * shape[-1]), dtype)
        one, other = x.double().chunk(2, -1)
        exact = one * torch.sigmoid(one) * other
        told = layer.forward_cpu(x).double()
        torch.testing.assert_close(told, exact, rtol=ROUNDING[dtype], atol=1e-6)
    for x in (normal((3, 40), dtype), normal((4, 128), dtype)[:, ::2]):
        assert torch.equal(layer.forward_cpu(x), SiluAndMul.forward_native(x))


def test_a_worker_on_the_cpu_imports_them() -> None:
    assert resolve_obj_by_qualname(extension(cpu=True)) is vllm_kernels.WeightsExtension
    assert resolve_obj_by_qualname(extension(cpu=False)) is vllm_kernels.WeightsExtension
