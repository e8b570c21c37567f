"""The GPUs of a run: memory and speed, by name or as numbers, and price."""

import dataclasses
import difflib
import math
import re
from typing import NamedTuple

DEFAULT_MFU = 0.4
ALLOWANCE = 1.1
"""An estimate fits if the memory of the GPU is larger by this factor: allocators round and fragment."""


class Gpu(NamedTuple):
    """A GPU as its vendor's data sheet describes it."""

    name: str
    memory: float
    """GB, of 10^9 bytes."""
    tflops: float
    """Peak TFLOP/s of dense bfloat16 matmuls with float32 accumulation; half of the figure with sparsity where a data
    sheet gives only that."""
    source: str
    """The document with both; docs/plan.md says how far they were checked."""
    bfloat16: bool = True
    """False if the GPU has no bfloat16: `tflops` are those of float16."""
    forms: str = ""
    """Variants with the same numbers."""


_HOPPER = "NVIDIA H100 Tensor Core GPU Architecture, white paper, 2022"
_H200 = "NVIDIA H200 Tensor Core GPU, data sheet, 2024"
_A100 = "NVIDIA A100 Tensor Core GPU, data sheet, 2021"
_V100 = "NVIDIA V100 Tensor Core GPU, data sheet, 2020"
GPUS = (
    Gpu("H100 SXM 80GB", 80, 989.4, _HOPPER),
    Gpu("H100 PCIe 80GB", 80, 756, _HOPPER),
    Gpu("H100 NVL 94GB", 94, 835.5, "NVIDIA H100 Tensor Core GPU, data sheet, 2024 (1,671 with sparsity)"),
    Gpu("H200 SXM 141GB", 141, 989.5, f"{_H200} (1,979 with sparsity)"),
    Gpu("H200 NVL 141GB", 141, 835.5, f"{_H200} (1,671 with sparsity)"),
    Gpu("B200 180GB", 180, 2250, "NVIDIA DGX B200, data sheet, 2024 (1,440 GB and 36 PFLOP/s sparse for eight)"),
    Gpu("GH200 96GB", 96, 989.5, "NVIDIA GH200 Grace Hopper Superchip, data sheet, 2023 (1,979 with sparsity)"),
    Gpu("GH200 144GB", 144, 989.5, "NVIDIA GH200 Grace Hopper Superchip, data sheet, 2023 (1,979 with sparsity)"),
    Gpu("A100 80GB", 80, 312, _A100, forms="SXM PCIe"),
    Gpu("A100 40GB", 40, 312, _A100, forms="SXM PCIe"),
    Gpu("L40S 48GB", 48, 362.05, "NVIDIA L40S, data sheet, 2023"),
    Gpu("L4 24GB", 24, 121, "NVIDIA L4 Tensor Core GPU, data sheet, 2023 (242 with sparsity)"),
    Gpu("A10 24GB", 24, 125, "NVIDIA A10 Tensor Core GPU, data sheet, 2021"),
    Gpu("RTX A6000 48GB", 48, 154.8, "NVIDIA Ampere GA102 GPU Architecture, white paper, 2021"),
    Gpu("RTX 3090 24GB", 24, 71, "NVIDIA Ampere GA102 GPU Architecture, white paper, 2021"),
    Gpu("RTX 4090 24GB", 24, 165.2, "NVIDIA Ada GPU Architecture, white paper, 2022"),
    Gpu("RTX 5090 32GB", 32, 209.5, "NVIDIA RTX Blackwell GPU Architecture, white paper, 2025"),
    Gpu("V100 SXM 32GB", 32, 125, _V100, bfloat16=False),
    Gpu("V100 SXM 16GB", 16, 125, _V100, bfloat16=False),
    Gpu("V100 PCIe 32GB", 32, 112, _V100, bfloat16=False),
    Gpu("V100 PCIe 16GB", 16, 112, _V100, bfloat16=False),
    Gpu("MI250X GCD 64GB", 64, 191.5, "AMD Instinct MI250X, data sheet, 2021 (half of a card, which is two devices)"),
    Gpu("MI300X 192GB", 192, 1307.4, "AMD Instinct MI300X, data sheet, 2023"),
    Gpu("MI325X 256GB", 256, 1307.4, "AMD Instinct MI325X, data sheet, 2024"),
)
"""Known GPUs; a name that matches several means the first: "H100" is an H100 SXM."""
_NOISE = {"", "nvidia", "amd", "geforce", "instinct", "tesla", "rtx", "tensor", "core", "gpu", "gb"}
_PARTS = re.compile(r"(?<![a-z])(nvidia|amd|geforce|instinct|tesla|rtx)|(sxm|pcie|nvl|oam|gcd|hbm)\d*e?|(\d+) ?gb")


def find_gpu(name: str) -> Gpu:
    """Find a GPU by name, as people write it ("h100", "rtx-4090", "A100 40GB") or torch does ("NVIDIA H100 NVL").

    Raises:
        ValueError: if it is none of `GPUS`.
    """
    wanted = _words(name)
    if wanted[:1] == ["gh200"] and "480" in wanted:  # the memory of its CPU, which is part of the name
        wanted.remove("480")
    found = [gpu for gpu in GPUS if wanted and set(wanted) <= set(_words(f"{gpu.name} {gpu.forms}"))]
    found = [gpu for gpu in found if _words(gpu.name)[0] in wanted]
    if not found:
        known = list(dict.fromkeys(_words(gpu.name)[0].upper() for gpu in GPUS))
        close = difflib.get_close_matches(name.upper(), known, n=1)
        hint = f"did you mean {close[0]}? Expected" if close else "expected"
        raise ValueError(f"gpu {name}: {hint} one of {', '.join(known)}, or gpu_memory and gpu_tflops in its place")
    return found[0]


def _words(name: str) -> list[str]:
    """Words that identify a GPU: its model, then its variant and GB if given."""
    spaced = _PARTS.sub(lambda part: f" {part[2] or part[3] or ''} ", name.lower().replace("_", " "))
    return [word for word in re.split(r"[^a-z0-9]+", spaced) if word not in _NOISE and word != "hbm"]


@dataclasses.dataclass(frozen=True)
class Hardware:
    """The GPUs that train: memory and speed of each, by name or as numbers.

    Raises:
        ValueError: for an unknown name, numbers that are not above 0, and conflicting or incomplete numbers.
    """

    gpu: str | None = None
    """Name of one of `GPUS`, in any case."""
    num_gpus: int = 1
    """Number of training GPUs."""
    gpu_memory: float | None = None
    """GB (10^9 bytes) of one, in place of the named one's."""
    gpu_tflops: float | None = None
    """Peak TFLOP/s of one in dense 16-bit products, in place of the named one's."""
    mfu: float | None = None
    """Fraction of the peak that a step reaches: an assumption, by default 0.4."""
    tokens_per_s: float | None = None
    """Measured throughput of a uniform run on all GPUs together, in place of any peak."""
    price: float | None = None
    """Dollars for an hour of one GPU."""

    def __post_init__(self) -> None:
        if self.num_gpus < 1:
            raise ValueError(f"num_gpus {self.num_gpus}: expected at least 1")
        for name in ("gpu_memory", "gpu_tflops", "tokens_per_s", "price"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value:g}: expected a number above 0")
        peak = self.peak_flops
        if self.mfu is not None and (peak is None or self.tokens_per_s is not None or not 0 < self.mfu <= 1):
            raise ValueError(f"mfu {self.mfu:g}: expected a fraction of the peak of a gpu, above 0 and up to 1")
        if self.price is not None and peak is None and self.tokens_per_s is None:
            raise ValueError(f"price {self.price:g}: needs a speed: expected gpu, gpu_tflops or tokens_per_s beside it")

    @property
    def found(self) -> Gpu | None:
        """The GPU with that name."""
        return None if self.gpu is None else find_gpu(self.gpu)

    @property
    def memory(self) -> float | None:
        """Bytes of one GPU, if known."""
        if self.gpu_memory is not None:
            return self.gpu_memory * 1e9
        return None if self.found is None else self.found.memory * 1e9

    @property
    def peak_flops(self) -> float | None:
        """Peak FLOP/s of one GPU, if known."""
        if self.gpu_tflops is not None:
            return self.gpu_tflops * 1e12
        return None if self.found is None else self.found.tflops * 1e12

    @property
    def has_bfloat16(self) -> bool:
        """Whether it computes in bfloat16, which is assumed of a GPU given as numbers."""
        return self.found is None or self.found.bfloat16

    def fits(self, needed: float) -> bool | None:
        """Whether an estimate in bytes fits one GPU with a tenth to spare; None if its memory is not known."""
        return None if self.memory is None else needed * ALLOWANCE <= self.memory

    def flops_per_s(self, flops_per_token: float) -> float | None:
        """FLOP/s of all GPUs; None if nothing is known.

        Args:
            flops_per_token: FLOPs of the uniform run per token.
        """
        if self.tokens_per_s is not None:
            return self.tokens_per_s * flops_per_token
        return None if self.peak_flops is None else self.peak_flops * (self.mfu or DEFAULT_MFU) * self.num_gpus

    @property
    def speed(self) -> str:
        """The basis of the hours, in words."""
        if self.tokens_per_s is not None:
            return f"{self.tokens_per_s:,g} tokens/s measured in the uniform run"
        if self.peak_flops is None:
            return "unknown"
        return f"{self.mfu or DEFAULT_MFU:.0%} of {self.peak_flops / 1e12:,g} TFLOP/s on each GPU: an assumption (mfu)"

    @property
    def name(self) -> str:
        """One of the GPUs, in words."""
        model = "GPU" if self.found is None else self.found.name
        return model if self.gpu_memory is None else f"{model.rpartition(' ')[0] or model} of {self.gpu_memory:g} GB"


UNKNOWN = Hardware()
