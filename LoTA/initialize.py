"""An initialisation of A from gradients: the directions of the inputs along which the loss falls fastest.

Touches CustomLoraLinear layers of a model in memory. Beyond the paper, whose A is random (METHOD 4: Kaiming normal,
ternarised). Two rounds of a randomized range finder (Halko, Martinsson and Tropp, 2011, https://arxiv.org/abs/0909.4061)
on H = dL/d(dW) of each layer, which the layer's own backward gives as products with A and B, so that no matrix of a
layer's size is kept. LoRA-GA (https://arxiv.org/abs/2407.05000) starts LoRA from the same gradient.
"""
from contextlib import contextmanager

import torch

from LoTA.layer import CustomLoraLinear
from LoTA.ternary import Threshold, ternarize_


@contextmanager
def _without_effect(layers):
    """The layers compute as the quantized model does, whatever A and B hold; their gradients are H @ B^T, A^T @ H."""
    thresholds = [layer.threshold for layer in layers]
    try:
        for layer in layers:
            name, = layer.active_adapters
            layer.threshold = Threshold(layer.r[name], None)        # |dW| <= r: no step passes it
        yield
    finally:
        for layer, threshold in zip(layers, thresholds, strict=True):
            layer.threshold = threshold


def initialize_from_gradients(model, compute_loss, batches):
    """Sets A [r, in] of every ternary layer of `model` to the ternarised leading left singular directions of H.

    compute_loss: a function from a batch to a loss tensor. batches: a list of at least two. The first half gives
    A^T @ H with the random A, whose directions B takes; the second H @ B^T, whose directions A takes. B is 0
    afterwards, as always: the first forward stays the quantized model.
    """
    layers = [m for m in model.modules() if isinstance(m, CustomLoraLinear)]
    half = len(batches) // 2
    with _without_effect(layers):
        for some, matrix in ((batches[:half], "lora_B"), (batches[half:], "lora_A")):
            model.zero_grad()
            for batch in some:
                compute_loss(batch).backward()
            for layer in layers:
                weight = getattr(layer, matrix)[layer.active_adapters[0]].weight        # B [out, r], A [r, in]
                tall = weight.grad if matrix == "lora_B" else weight.grad.t()
                directions = torch.linalg.svd(tall.float(), full_matrices=False).U
                weight.data.copy_(ternarize_(directions if matrix == "lora_B" else directions.t()))
    model.zero_grad()
    for layer in layers:
        torch.nn.init.zeros_(layer.lora_B[layer.active_adapters[0]].weight)
