import os
import subprocess
import sys

import pytest
import torch

from ulfine_fast import _native, availability, backend, proto_logits, use_backend
from ulfine_fast.backend import BACKENDS, OPS, choose

CPU = torch.ones(2, 3)


@pytest.fixture
def no_extension(monkeypatch):
    """As if the package had been installed without a C++ compiler."""
    monkeypatch.setattr(_native, "_C", None)
    monkeypatch.setattr(_native, "error", "the compiled extension is missing (no module _C)")


def test_the_extension_is_built() -> None:
    assert _native.error == ""
    assert _native.isa() in ("baseline", "avx2", "avx512")


@pytest.mark.parametrize("name", ["baseline", "avx2"])
def test_the_instruction_set_can_be_limited(name) -> None:
    code = "from ulfine_fast import _native; print(_native.isa())"
    environment = os.environ | {"ULFINE_ISA": name}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() in (name, "baseline")


# availability


def test_availability_names_every_backend_in_order() -> None:
    assert tuple(availability()) == BACKENDS


def test_reference_and_cpp_are_available() -> None:
    state = availability()
    assert state["reference"][:2] == state["cpp"][:2] == (True, True)
    assert _native.isa() in state["cpp"].reason


def test_whatever_is_available_was_built() -> None:
    assert all(state.built for state in availability().values() if state.available)


def test_whatever_is_not_available_says_why() -> None:
    assert all(state.reason for state in availability().values() if not state.available)


def test_without_the_extension_cpp_is_not_built(no_extension) -> None:
    state = availability()
    assert state["cpp"] == (False, False, "the compiled extension is missing (no module _C)")
    assert state["cuda"][:2] == (False, False)
    assert _native.isa() == "none" and not _native.has_cuda()


def test_without_triton_the_reason_is_its_absence(monkeypatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert availability()["triton"] == (False, False, "the package triton is not installed")


# choose


@pytest.mark.parametrize("op", OPS)
def test_auto_takes_cpp_for_float32_on_the_cpu(op) -> None:
    assert choose(op, CPU, torch.float32) == "cpp"
    assert choose(op, CPU, torch.float32, "auto") == "cpp"


def test_auto_takes_the_reference_for_float64() -> None:
    assert choose("proto_logits", CPU, torch.float64) == "reference"


def test_auto_takes_the_reference_on_another_device() -> None:
    assert choose("proto_logits", CPU.to("meta"), torch.float32) == "reference"


def test_auto_takes_the_reference_without_the_extension(no_extension) -> None:
    assert choose("proto_logits", CPU, torch.float32) == "reference"
    assert proto_logits(CPU, CPU, 1.0).shape == (2, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_runs_everywhere(device, dtype) -> None:
    assert choose("proto_logits", CPU.to(device), dtype, "reference") == "reference"


def test_a_named_backend_never_falls_back_when_the_extension_is_missing(no_extension) -> None:
    with pytest.raises(
        RuntimeError, match="proto_logits: cpp is not available: the compiled extension is missing"
    ):
        choose("proto_logits", CPU, torch.float32, "cpp")


def test_a_named_backend_never_falls_back_to_another_dtype() -> None:
    with pytest.raises(RuntimeError, match="cpp computes in float32, got float64; use backend='reference'"):
        choose("proto_logits", CPU, torch.float64, "cpp")


def test_a_named_backend_never_falls_back_to_another_device() -> None:
    with pytest.raises(RuntimeError, match="cpp needs a CPU tensor, got meta"):
        choose("proto_logits", CPU.to("meta"), torch.float32, "cpp")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_backend_never_falls_back_to_the_cpu(name, monkeypatch) -> None:
    monkeypatch.setattr(backend, "_interpreting", lambda: False)
    with pytest.raises(
        RuntimeError, match=f"{name} needs a CUDA tensor, got cpu; here: auto, reference, cpp"
    ):
        choose("proto_logits", CPU, torch.float32, name)


def test_triton_takes_a_cpu_tensor_in_its_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(backend, "_interpreting", lambda: True)
    assert choose("proto_logits", CPU, torch.float32, "triton") == "triton"


@pytest.mark.parametrize("name", ["tpu", "", "CPP"])
def test_an_unknown_name_is_an_error(name) -> None:
    with pytest.raises(ValueError, match=f"backend must be auto, reference, cpp, triton, cuda, got '{name}'"):
        choose("proto_logits", CPU, torch.float32, name)


# use_backend


def test_use_backend_holds_within_the_block() -> None:
    with use_backend("reference"):
        assert choose("proto_logits", CPU, torch.float32) == "reference"
    assert choose("proto_logits", CPU, torch.float32) == "cpp"


def test_use_backend_nests() -> None:
    with use_backend("reference"):
        with use_backend("cpp"):
            assert choose("proto_logits", CPU, torch.float32) == "cpp"
        assert choose("proto_logits", CPU, torch.float32) == "reference"


def test_use_backend_is_restored_after_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose("proto_logits", CPU, torch.float32) == "cpp"


def test_use_backend_decorates_a_function() -> None:
    @use_backend("reference")
    def chosen() -> str:
        return choose("proto_logits", CPU, torch.float32)

    assert [chosen(), chosen()] == ["reference", "reference"]
    assert choose("proto_logits", CPU, torch.float32) == "cpp"


def test_the_argument_of_a_call_comes_before_use_backend() -> None:
    with use_backend("reference"):
        assert choose("proto_logits", CPU, torch.float32, "cpp") == "cpp"
        assert choose("proto_logits", CPU, torch.float32, "auto") == "cpp"


def test_use_backend_refuses_an_unknown_name_and_keeps_the_old_one() -> None:
    with pytest.raises(ValueError, match="backend must be auto"), use_backend("tpu"):
        pass
    assert choose("proto_logits", CPU, torch.float32) == "cpp"


def test_use_backend_never_falls_back() -> None:
    with use_backend("cpp"), pytest.raises(RuntimeError, match="cpp computes in float32, got float64"):
        proto_logits(CPU.double(), CPU.double())


def test_the_chosen_backend_is_the_one_that_runs(monkeypatch) -> None:
    calls = []
    kernel = _native.proto_logits
    monkeypatch.setattr(_native, "proto_logits", lambda *a: calls.append(1) or kernel(*a))
    proto_logits(CPU, CPU, backend="reference")
    assert not calls
    proto_logits(CPU, CPU, backend="cpp")
    assert calls == [1]
