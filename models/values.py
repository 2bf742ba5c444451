"""What several models need around their parameters' values: precision, device, the store."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import pyro
import torch
from torch import Tensor


class Optimum(NamedTuple):
    """The best parameters for given data.

    Attributes:
        params: Parameters by name.
        log_likelihood: Their total log likelihood in nats, a scalar.
    """

    params: dict[str, Tensor]
    log_likelihood: Tensor


def as_default(value: Tensor) -> Tensor:
    """Brings a tensor to torch's default precision and device.

    Args:
        value: Any tensor.

    Returns:
        Tensor of the same shape.
    """
    return value.to(device=torch.get_default_device(), dtype=torch.get_default_dtype())


def normal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Standard normal numbers that are the same with every default precision and device.

    Args:
        shape: Their shape.
        generator: A generator of the CPU.

    Returns:
        Numbers in double precision on the CPU.
    """
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def stored(initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values in Pyro's parameter store, without making parameters there.

    Args:
        initial: Values of those parameters that the store does not have yet, by name.

    Returns:
        Constrained values by name, detached.
    """
    store = pyro.get_param_store()
    return {
        name: store[name].detach() if name in store else value for name, value in initial.items()
    }


def parameters(net: Any) -> dict[str, Tensor]:
    """A program's parameters, from Pyro's store or made there on first use.

    Args:
        net: An object with `initial` values and `constraints`, both by name.

    Returns:
        Constrained values by name, in the order of the constraints.
    """
    return {
        name: pyro.param(name, lambda name=name: net.initial[name], constraint=constraint)
        for name, constraint in net.constraints.items()
    }


def second_generator(seed: int) -> torch.Generator:
    """A generator for truth and data, whose numbers are not those of a start with this seed.

    Args:
        seed: The seed.

    Returns:
        A generator of the CPU.
    """
    generator = torch.Generator(device="cpu").manual_seed(seed)
    # Of smaller ranges the numbers are not the same in every release of torch.
    other = torch.randint(2**40, (), generator=generator, device="cpu")
    return generator.manual_seed(int(other) % 2**31)


def uniform(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Uniform numbers that are the same with every default precision and device.

    Args:
        shape: Their shape.
        generator: A generator of the CPU.

    Returns:
        Numbers in double precision on the CPU.
    """
    return torch.rand(tuple(shape), generator=generator, dtype=torch.float64, device="cpu")


def eye(size: int, like: Tensor) -> Tensor:
    """The identity matrix, in the precision and on the device of a tensor.

    Args:
        size: Rows of the matrix.
        like: The tensor.

    Returns:
        Matrix of shape [size, size].
    """
    return torch.eye(size, dtype=like.dtype, device=like.device)
