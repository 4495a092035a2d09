"""Compiled kernels of vLLM's CPU build that its own dispatch leaves out.

    rms_norm       x w / sqrt(mean(x^2) + eps), also of x + residual
    silu_and_mul   silu(a) b, of x = (a, b)

vLLM 0.32 compiles both for the CPU, and takes torch's way there all the same: up to ten operations
for one, a seventh of the time of SmolLM2's short answers on two cores. They are offered to it by
its own means, a provider of an operation and a class from out of its tree; nothing of it is
changed. They compute in float32 and round the result; the sum with a residual is rounded before it
is scaled. Torch's way rounds the scaled value before it is weighted: answers differ by that.

vLLM imports this module in every worker, where it looks for ``WeightsExtension``; who starts an
engine imports it before the engine's configuration is made, which names the provider.
"""

from typing import Any

import torch

from agent.population.vllm import replaceable
from agent.population.vllm_arguments import PROVIDER
from agent.population.worker import WeightsExtension

__all__ = ["WeightsExtension"]

MULTIPLE = 16  # of elements, which the kernels read at a time
OPERATIONS, SiluAndMul = replaceable()


def fits(x: torch.Tensor, width: int) -> bool:
    """Whether the kernels can read x (..., n) in rows of this width."""
    return width % MULTIPLE == 0 and x.is_contiguous()


def _fits_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> bool:
    if variance_size is not None or weight is None or weight.dtype != x.dtype:
        return False
    return weight.shape == x.shape[-1:] and weight.is_contiguous() and fits(x, x.shape[-1])


def _fits_sum(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> bool:
    alike = x_residual.shape == x.shape and x_residual.dtype == x.dtype
    return alike and x_residual.is_contiguous() and _fits_norm(x, weight, epsilon, variance_size)


@OPERATIONS.rms_norm.register_impl(PROVIDER, supports_args=_fits_norm)  # type: ignore[untyped-decorator]
def rms_norm(
    x: torch.Tensor, weight: torch.Tensor | None, epsilon: float, variance_size: int | None = None
) -> torch.Tensor:
    """x (..., n) w (n,) / sqrt(mean(x^2) + epsilon), along the last axis."""
    out = torch.empty_like(x)
    torch.ops._C.rms_norm(out, x, weight, epsilon)
    return out


@OPERATIONS.fused_add_rms_norm.register_impl(PROVIDER, supports_args=_fits_sum, inplace=True)  # type: ignore[untyped-decorator]
def fused_add_rms_norm(
    x: torch.Tensor,
    x_residual: torch.Tensor,
    weight: torch.Tensor | None,
    epsilon: float,
    variance_size: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(x + residual), x + residual), each in the memory of its argument."""
    torch.ops._C.fused_add_rms_norm(x, x_residual, weight, epsilon)
    return x, x_residual


@SiluAndMul.register_oot
class CompiledSiluAndMul(SiluAndMul):  # type: ignore[misc, valid-type]
    """silu(a) b of x = (a, b) (..., 2 n)."""

    def forward_cpu(self, x: torch.Tensor) -> Any:
        """By the compiled kernel where it can read x."""
        half = x.shape[-1] // 2
        if not fits(x, half):
            return self.forward_native(x)
        out = x.new_empty((*x.shape[:-1], half))
        torch.ops._C.silu_and_mul(out, x)
        return out
