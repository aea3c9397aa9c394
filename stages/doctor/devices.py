"""What computes: torch's build, the library of its products, GPUs and their driver, kernels and attention."""

import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

from pipeline.cache.atomic import size_text
from stages.doctor.finding import NOTE, OK, PROBLEM, Finding

DRIVER = Path("/proc/driver/nvidia/version")
SMI_S = 8.0  # for nvidia-smi, which waits for the driver


def torch_build() -> list[Finding]:
    """torch's build, its capability on this CPU, its threads, and which library multiplies float32 and why."""
    import torch

    from pipeline.matrix_products import onednn_is_faster

    threads, capability = torch.get_num_threads(), torch.backends.cpu.get_cpu_capability()
    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "ROCm" if torch.version.hip else "CPU only"
    facts = {"version": torch.__version__, "build": build, "cpu_capability": capability, "threads": threads}
    found = f"{torch.__version__} ({build}), CPU kernels {capability}, {threads} threads"
    lines = [Finding("torch", OK, found, facts=facts)]
    ours, mkl = onednn_is_faster(), torch.backends.mkl.is_available()
    library = "oneDNN" if ours else "MKL" if mkl else "torch's BLAS"
    maker = _cpu_maker()
    why = (
        f"the CPU is of {maker}, on which MKL leaves AVX-512 unused"
        if ours
        else f"torch's own choice; the CPU is of {maker}"
        if mkl
        else "this build of torch has no MKL"
    )
    facts = {"library": library, "cpu_maker": maker, "mkl": mkl, "onednn": torch.backends.mkldnn.is_available()}
    return [*lines, Finding("float32 on CPU", OK, f"products by {library}", why, facts=facts)]


def _cpu_maker() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        return "an unknown maker"
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("vendor_id")), "an unknown maker")


def gpus() -> list[Finding]:
    """GPUs, their driver and memory; where there are none, whether torch's build is what hides them."""
    import torch

    driver = _driver()
    if not torch.cuda.is_available():
        facts = {"gpus": [], "driver": driver}
        if driver is None:
            return [Finding("GPU", OK, "none", "everything runs on the CPU: for small targets", facts=facts)]
        what = "torch is built for CPUs" if torch.version.cuda is None else "torch cannot start CUDA with that driver"
        remedy = "install torch of https://download.pytorch.org/whl/cuXXX, XXX no newer than what `nvidia-smi` states"
        cost = f"{what}, so that everything runs on the CPU"
        return [Finding("GPU", PROBLEM, f"driver {driver} is there", cost, remedy, facts)]
    return [_gpu(number, driver) for number in range(torch.cuda.device_count())]


def _gpu(number: int, driver: str | None) -> Finding:
    import torch

    properties = torch.cuda.get_device_properties(number)
    free, total = torch.cuda.mem_get_info(number)
    bf16 = properties.major >= 8
    facts = {
        "name": properties.name, "driver": driver, "cuda": torch.version.cuda, "total_bytes": total,
        "free_bytes": free, "capability": f"{properties.major}.{properties.minor}", "bfloat16": bf16,
    }  # fmt: skip
    found = (
        f"{properties.name}, capability {facts['capability']}, {size_text(free)} free of {size_text(total)}, driver "
        f"{driver or 'unknown'}, CUDA {torch.version.cuda}"
    )
    name = f"GPU {number}"
    if not bf16:
        return Finding(name, NOTE, found, "bfloat16 is emulated: slow", "--dtype float32, train.dtype float32", facts)
    if free < total / 2:
        return Finding(name, NOTE, found, "others hold most of its memory", "see `nvidia-smi`", facts)
    return Finding(name, OK, found, "taken by default, in bfloat16", facts=facts)


def _driver() -> str | None:
    """Return the version of NVIDIA's driver; None where there is none. TimeoutError where it does not answer."""
    smi = shutil.which("nvidia-smi")
    if smi is not None:
        command = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SMI_S)
        except subprocess.TimeoutExpired:
            raise TimeoutError(f"the driver does not answer nvidia-smi within {SMI_S:g} s") from None
        if done.returncode == 0 and done.stdout.strip():
            return done.stdout.split()[0]
    try:
        words = DRIVER.read_text(errors="replace").split("Module", 1)[1].split()
        return next((word for word in words if word[0].isdigit()), "unknown")
    except (OSError, IndexError):
        return None


def kernels() -> list[Finding]:
    """Which kernels a training uses on the default device, and which attention."""
    import torch

    from pipeline.drafts.fused import DISABLED, kernels_of

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen, triton = kernels_of(device), find_spec("triton") is not None
    facts = {"kernels": chosen, "triton": triton, "flex_attention": chosen == "compiled"}
    if device.type == "cpu":
        why = "compiled ones, and flex attention, are for GPUs; a mask in plain attention computes the same"
        return [Finding("kernels", OK, "plain", why, facts=facts)]
    if chosen == "plain":
        why, remedy = ("triton is missing", "pip install triton")
        if triton:
            why, remedy = f"{' or '.join(DISABLED)} is 1", f"unset {' '.join(DISABLED)}"
        return [Finding("kernels", NOTE, "plain", f"{why}: a step takes about twice as long", remedy, facts)]
    why = "a run compares a trial step with the plain ones first, and says so where it goes back to them"
    return [Finding("kernels", OK, "compiled, flex attention", why, facts=facts)]
