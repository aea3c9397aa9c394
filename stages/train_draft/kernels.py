"""Which kernels a run uses: on a GPU deterministic ones, and compiled ones where they give what the plain ones give."""

import os

import torch
from torch import Tensor

from pipeline.drafts import Draft, lay_blocks, pack
from pipeline.drafts.fused import DISABLED, Kernels, kernels_of, use_kernels
from pipeline.errors import first_line
from pipeline.matrix_products import onednn_is_faster
from pipeline.runs.recipe import TrainSection
from pipeline.tensors import free_cached_memory
from stages.train_draft.memory import FakeRows

LOSS = "the loss"
ROWS, ANCHORS = 512, 24  # of the trial step
# By how much the loss, and each gradient, may differ, relative to its norm. A kernel that is wrong is off by its own
# size; two right ones in bfloat16 differ by 1 % in a draft of two layers.
NEAR = {"float32": (1e-4, 1e-3), "bfloat16": (1e-2, 1e-1)}


def machine_facts(device: torch.device) -> dict[str, str]:
    """Return what a run's exact bits depend on besides versions: the device, on a CPU the number of threads and which
    library multiplies."""
    if device.type == "cuda":
        return {"device": torch.cuda.get_device_name(device), "kernels": kernels_of(device)}
    products = "oneDNN" if onednn_is_faster() else "torch"
    return {"device": device.type, "threads": str(torch.get_num_threads()), "products": products}


def use_deterministic_kernels(device: torch.device) -> None:
    """Make PyTorch use deterministic CUDA kernels. CPU kernels are deterministic for a given number of threads."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with this
        # Strictly: where it only warns, attention's backward splits its sums over keys in no fixed order.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a pass over memory that is overwritten anyway


def compile_if_equal(draft: Draft, train: TrainSection) -> str:
    """Compile the draft's kernels from now on, if a step of random states has the same loss and gradients with them as
    without; return in words what is used."""
    use_kernels(None)  # a run before this one in the process may have compiled them
    try:
        plain = trial_step(draft, train)
        use_kernels(Kernels())
        differs = difference(trial_step(draft, train), plain, NEAR[train.dtype])
    except Exception as error:  # a compiler raises errors of many kinds, or memory lacks, and a run does without it
        differs = first_line(error)
    draft.zero_grad()
    free_cached_memory(draft.device)
    if differs:
        use_kernels(None)
        return f"kernels: plain, since the compiled ones cannot be used here: {differs}"
    return f"kernels: compiled; {DISABLED[0]}=1 leaves them plain"


def trial_step(draft: Draft, train: TrainSection) -> dict[str, Tensor]:
    """Return the loss and the weights' gradients, on the host, of a batch that is the same in every call."""
    config, device, generator = draft.config, draft.device, torch.Generator().manual_seed(0)
    sample = FakeRows(ROWS, config)
    sample.ids = torch.randint(0, config.vocab_size, (ROWS,), generator=generator)
    sample.aux, sample.final = (
        torch.randn(states.shape, generator=generator).to(states.dtype) for states in (sample.aux, sample.final)
    )
    cell = pack([sample], ["trial"], final=config.needs_final_states)
    blocks = lay_blocks(cell, torch.linspace(ROWS // 4, ROWS - 2, ANCHORS).long(), config).to(device)
    draft.zero_grad()
    with torch.autocast(device.type, torch.bfloat16, enabled=train.dtype == "bfloat16"):
        loss = draft.loss(
            cell.to(device), blocks, draft.schedule(train.steps // 2, train.steps), dens_of(draft, blocks)
        )
    loss.total.backward()
    gradients = {name: weight.grad.cpu() for name, weight in draft.named_parameters() if weight.grad is not None}
    return {LOSS: loss.total.detach().cpu(), **gradients}


def dens_of(draft: Draft, blocks) -> dict[str, Tensor]:
    return {name: den.to(draft.device) for name, den in draft.denominators(blocks).items()}


def difference(found: dict[str, Tensor], wanted: dict[str, Tensor], near: tuple[float, float]) -> str:
    """Return in words the first tensor that is not near to what is wanted, relative to its norm; "" without one."""
    if found.keys() != wanted.keys():
        return f"they give gradients to other weights: {', '.join(sorted(found.keys() ^ wanted.keys()))}"
    for name, tensor in wanted.items():
        off = float((found[name] - tensor).norm() / tensor.norm().clamp(min=torch.finfo(tensor.dtype).tiny))
        if not off <= near[name != LOSS]:  # a NaN, too
            return f"{name} differs by {off:.1e}"
    return ""
