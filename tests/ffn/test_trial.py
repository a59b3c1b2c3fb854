"""The trial of a backend: right ones pass, wrong and broken ones are told by what is wrong."""

import pytest
import torch

from ssd_megatron.errors import ConfigError
from ssd_megatron.ffn import kernels
from ssd_megatron.ffn.kernels import cpp_router, torch_bmm
from ssd_megatron.ffn.kernels.trial import trial
from ssd_megatron.parallel.topology import Topology
from ssd_megatron.training import assembly
from tests.ffn.helpers import HAS_CPP
from tests.ranks import run_ranks
from tests.small_engine import run_config

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("backend", "dtype", "activation"),
    [
        ("torch", torch.float32, "relu"),
        ("torch", torch.bfloat16, "reglu"),
        ("torch", torch.float16, "squared_relu"),
        *([("cpp", torch.float32, "reglu"), ("cpp", torch.bfloat16, "relu")] if HAS_CPP else []),
        ("triton", torch.float32, "swiglu"),
        ("triton", torch.float16, "relu"),
    ],
)
def test_right_kernels_pass(backend: str, dtype: torch.dtype, activation: str) -> None:
    assert trial(backend, CPU, dtype, activation) is None


def test_wrong_and_broken_kernels_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*arguments: object) -> torch.Tensor:
        return torch_bmm.sparse_ffn(*arguments) * 1.1

    def broken(*_: object) -> torch.Tensor:
        raise RuntimeError("no kernel image is available\nand more")

    monkeypatch.setitem(kernels.BACKENDS, "triton", wrong)
    told = "the output, router centroid, differs from brute force by 1e-01"
    assert trial("triton", CPU, torch.bfloat16, "relu") == told
    monkeypatch.setitem(kernels.BACKENDS, "triton", broken)
    assert trial("triton", CPU, torch.float32, "relu") == "RuntimeError: no kernel image is available"


def test_gates_that_are_forgotten_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def unscaled(*arguments: object) -> torch.Tensor:
        return torch_bmm.sparse_ffn(*arguments[:-1], False)

    monkeypatch.setitem(kernels.BACKENDS, "triton", unscaled)
    wrong = trial("triton", CPU, torch.bfloat16, "relu")
    assert wrong is not None and wrong.startswith("the output, router switch, differs from brute force by ")


@pytest.mark.skipif(not HAS_CPP, reason="needs AVX-512, AMX and a C++ compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wrong_scores_and_choices_of_cpp_are_told(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    right = cpp_router.top_k

    def second_best(scores_TE: torch.Tensor, k: int) -> torch.Tensor:
        return right(scores_TE, k + 1)[:, 1:].contiguous()

    with monkeypatch.context() as patch:
        patch.setattr(cpp_router, "top_k", second_best)
        wrong = trial("cpp", CPU, dtype, "relu")
    assert wrong is not None and wrong.startswith("the output, router centroid, differs from brute force by ")

    gradients = cpp_router.score_gradients
    monkeypatch.setattr(cpp_router, "score_gradients", lambda *args: [1.1 * gradient for gradient in gradients(*args)])
    wrong = trial("cpp", CPU, dtype, "relu")
    assert wrong is not None and wrong.startswith("the gradient of the ")


def choices(topology: Topology) -> tuple[str, str, str]:
    """What is chosen when the kernels fail on the second rank alone."""
    verdict = "the output differs from brute force by 1e-01" if topology.world.rank == 1 else None
    assembly.choose_backend = lambda *arguments: ("triton", "sparse kernels: triton")
    assembly.trial = lambda *arguments: verdict
    config = run_config(2)

    def ask_for(backend: str) -> None:
        ssd = config.ssd_megatron.ssd.model_copy(update={"backend": backend})
        vars(config)["ssd_megatron"] = config.ssd_megatron.model_copy(update={"ssd": ssd})

    ask_for("auto")
    name, reason = assembly.choose_kernels(config, topology)
    ask_for("triton")
    with pytest.raises(ConfigError) as error:
        assembly.choose_kernels(config, topology)
    return name, reason, str(error.value)


def test_all_ranks_leave_kernels_that_fail_on_one() -> None:
    for name, reason, error in run_ranks(2, choices):
        assert name == "torch"
        assert reason.endswith("fails its trial: on rank 1 the output differs from brute force by 1e-01)")
        assert error.startswith("ssd.backend (triton) fails its trial: on rank 1 the output differs")
