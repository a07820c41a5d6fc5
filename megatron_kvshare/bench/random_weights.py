"""Weights for timing: as a model is initialised, but drawn where it is, tensor by tensor."""

from __future__ import annotations

import torch

from megatron_kvshare.checkpoint.tensors import TensorInfo
from megatron_kvshare.costs.weights import Init
from megatron_kvshare.spec.model_spec import ModelSpec


class RandomWeights:
    """See :class:`megatron_kvshare.checkpoint.tensors.TensorSource`."""

    def __init__(self, spec: ModelSpec, device: torch.device, dtype: torch.dtype) -> None:
        self._weights = {weight.name: weight for weight in spec.weights}
        self._settings = spec.model
        self._generator = torch.Generator(device).manual_seed(0)
        self._device = device
        self.tensors = {
            weight.name: TensorInfo(weight.shape, dtype) for weight in self._weights.values()
        }

    def read(self, name: str) -> torch.Tensor:
        """Another draw each time it is asked for."""
        weight, dtype = self._weights[name], self.tensors[name].dtype
        tensor = torch.empty(weight.shape, dtype=dtype, device=self._device)
        if weight.init is Init.ONES:
            return tensor.fill_(1.0)
        std = weight.initial_std(self._settings.init_method_std, self._settings.num_layers)
        return tensor.normal_(0.0, std, generator=self._generator)
