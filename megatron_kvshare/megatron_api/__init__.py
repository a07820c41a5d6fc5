"""The only package that imports ``megatron.core`` (L2).

Version differences and the CPU backend live here, so that the rest of the code reads as plain
PyTorch.
"""

import warnings

# megatron-core announces at import that optional GPU packages are missing (`kvshare doctor` says it
# once, with what they would bring) and its distributed optimizer asks views for gradients.
for _message in (
    "Transformer Engine and Apex are not installed",
    "Apex is not installed",
    "full scope is deprecated",
    "The .grad attribute of a Tensor that is not a leaf",
):
    warnings.filterwarnings("ignore", message=_message)
