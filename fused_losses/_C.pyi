from typing import TypedDict

class BuildInfo(TypedDict):
    version: str  # of fused_losses
    torch: str  # full version string of the torch whose headers it was compiled with
    torch_minimum: str  # the oldest torch that runs it, for instance "2.11"
    cuda: str | None  # toolkit version; None in a CPU-only build
    cuda_architectures: list[str]  # in CMake's notation, for instance ["80-real", "90", "100-real"]
    compiler: str
    isa: list[str]  # CPU kernels that exist, chosen among at run time
    build_type: str

class LossNeeds(TypedDict):
    num_params: int  # of the operators' params
    min_classes: int
    has_margin: bool  # takes a tensor of margins

def build_info() -> BuildInfo: ...
def loss_names() -> list[str]: ...
def loss_needs(loss: str) -> LossNeeds: ...
def stats_count(loss: str, params: list[float], soft_target: bool) -> int: ...
def most_classes_without_stats(loss: str) -> int: ...
