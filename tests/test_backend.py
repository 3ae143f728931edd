import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from ulfine_fast import PrototypeState, _native, availability, backend, proto_logits, use_backend
from ulfine_fast.backend import BACKENDS, COMPOSED, OPS, choose
from ulfine_fast.fastest import FASTEST
from ulfine_fast.head_loss import head_loss
from ulfine_fast.ops import dual_cross_entropy, orthogonality, proto_fit, pseudo_label

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
    assert choose(op, CPU, 2, torch.float32) == "cpp"
    assert choose(op, CPU, 2, torch.float32, "auto") == "cpp"


def test_auto_takes_the_reference_for_float64() -> None:
    assert choose("proto_logits", CPU, 2, torch.float64) == "reference"


def test_auto_takes_the_reference_on_another_device() -> None:
    assert choose("proto_logits", CPU.to("meta"), 2, torch.float32) == "reference"


ON_GPU = SimpleNamespace(device=torch.device("cuda", 1))


@pytest.fixture
def gpu(monkeypatch):
    """A machine whose second GPU was measured, with every GPU back end."""
    yes = dict.fromkeys(BACKENDS, backend.Availability(True, True, ""))
    monkeypatch.setattr(backend, "availability", lambda: yes)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: f"GPU {index or 0}")
    monkeypatch.setitem(FASTEST, "GPU 1", {"proto_fit": ("cuda", "triton", "reference", "triton")})
    return yes


@pytest.mark.parametrize(
    ("classes", "name"),
    [(1, "cuda"), (300, "cuda"), (301, "triton"), (3000, "triton"), (13000, "reference"), (13001, "triton")],
)
def test_auto_takes_what_was_fastest_on_the_gpu_for_the_number_of_classes(gpu, classes, name) -> None:
    assert choose("proto_fit", ON_GPU, classes, torch.float32) == name


def test_auto_takes_the_reference_for_what_was_not_measured(gpu) -> None:
    assert choose("pseudo_label", ON_GPU, 1, torch.float32) == "reference"
    assert choose("proto_fit", ON_GPU, 1, torch.float64) == "reference"
    other = SimpleNamespace(device=torch.device("cuda", 0))
    assert choose("proto_fit", other, 1, torch.float32) == "reference"


def test_auto_takes_the_reference_for_a_fast_backend_that_cannot_run(gpu) -> None:
    gpu["cuda"] = backend.Availability(False, False, "built without nvcc")
    assert choose("proto_fit", ON_GPU, 1, torch.float32) == "reference"
    assert choose("proto_fit", ON_GPU, 1000, torch.float32) == "triton"
    with pytest.raises(RuntimeError, match="cuda is not available: built without nvcc"):
        choose("proto_fit", ON_GPU, 1, torch.float32, "cuda")


def test_what_auto_does_is_said_with_its_reason(gpu, monkeypatch) -> None:
    assert backend.automatic("cpu") == f"cpp ({_native.isa()})"
    assert backend.automatic("cuda") == "reference (nothing was measured on GPU 0)"
    monkeypatch.setitem(FASTEST, "GPU 0", {})
    assert backend.automatic("cuda") == "the fastest by op and number of classes, as measured on GPU 0"
    monkeypatch.setattr(_native, "error", "no module _C")
    assert backend.automatic("cpu") == "reference (cpp is not available: no module _C)"


def one_call(op: str) -> None:
    """The op on 5 rows, 3 classes and 2 dimensions."""
    x, bank, y = torch.ones(5, 2), torch.eye(3, 2), torch.zeros(5, dtype=torch.int64)
    pseudo = pseudo_label(x, bank, bank, backend="reference")
    state = PrototypeState(bank)
    fitted = bank, torch.zeros(3, 2), torch.zeros(3, dtype=torch.bool), torch.zeros(3)
    rates = {"mu": 0.1, "beta": 0.5, "gamma": 0.5}
    {
        "proto_logits": lambda: proto_logits(x, bank),
        "pseudo_label": lambda: pseudo_label(x, bank, bank),
        "dual_cross_entropy": lambda: dual_cross_entropy(x, y, bank, bank),
        "proto_fit": lambda: proto_fit(x, y, torch.ones(3), *fitted),
        "orthogonality": lambda: orthogonality(bank),
        "head_loss": lambda: head_loss(torch.cat([x, x]), x, y, bank, bank),
        "advance": lambda: state.advance(
            x, y, x, pseudo, torch.ones(3).long(), torch.tensor(True), scale_decay=0.5, **rates
        ),
    }[op]()


@pytest.mark.parametrize("op", [*OPS, *COMPOSED, "advance"])
def test_every_op_chooses_by_its_number_of_classes(op, monkeypatch) -> None:
    def record(name, features, classes, *rest):
        asked.append((name, classes))
        return choose(name, features, classes, *rest)

    asked = []
    for room in (*(f"ops.{name}" for name in OPS), "head_loss", "state"):
        monkeypatch.setattr(sys.modules[f"ulfine_fast.{room}"], "choose", record)
    one_call(op)
    assert (op, 3) in asked and {classes for _, classes in asked} == {3}


def test_auto_takes_the_reference_without_the_extension(no_extension) -> None:
    assert choose("proto_logits", CPU, 2, torch.float32) == "reference"
    assert proto_logits(CPU, CPU, 1.0).shape == (2, 2)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reference_runs_everywhere(device, dtype) -> None:
    assert choose("proto_logits", CPU.to(device), 2, dtype, "reference") == "reference"


def test_a_named_backend_never_falls_back_when_the_extension_is_missing(no_extension) -> None:
    with pytest.raises(
        RuntimeError, match="proto_logits: cpp is not available: the compiled extension is missing"
    ):
        choose("proto_logits", CPU, 2, torch.float32, "cpp")


def test_a_named_backend_never_falls_back_to_another_dtype() -> None:
    with pytest.raises(RuntimeError, match="cpp computes in float32, got float64; use backend='reference'"):
        choose("proto_logits", CPU, 2, torch.float64, "cpp")


def test_a_named_backend_never_falls_back_to_another_device() -> None:
    with pytest.raises(RuntimeError, match="cpp needs a CPU tensor, got meta"):
        choose("proto_logits", CPU.to("meta"), 2, torch.float32, "cpp")


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_a_gpu_backend_never_falls_back_to_the_cpu(name, monkeypatch) -> None:
    monkeypatch.setattr(backend, "_interpreting", lambda: False)
    with pytest.raises(
        RuntimeError, match=f"{name} needs a CUDA tensor, got cpu; here: auto, reference, cpp"
    ):
        choose("proto_logits", CPU, 2, torch.float32, name)


def test_triton_takes_a_cpu_tensor_in_its_interpreter(monkeypatch) -> None:
    monkeypatch.setattr(backend, "_interpreting", lambda: True)
    assert choose("proto_logits", CPU, 2, torch.float32, "triton") == "triton"


@pytest.mark.parametrize("name", ["tpu", "", "CPP"])
def test_an_unknown_name_is_an_error(name) -> None:
    with pytest.raises(ValueError, match=f"backend must be auto, reference, cpp, triton, cuda, got '{name}'"):
        choose("proto_logits", CPU, 2, torch.float32, name)


# use_backend


def test_use_backend_holds_within_the_block() -> None:
    with use_backend("reference"):
        assert choose("proto_logits", CPU, 2, torch.float32) == "reference"
    assert choose("proto_logits", CPU, 2, torch.float32) == "cpp"


def test_use_backend_nests() -> None:
    with use_backend("reference"):
        with use_backend("cpp"):
            assert choose("proto_logits", CPU, 2, torch.float32) == "cpp"
        assert choose("proto_logits", CPU, 2, torch.float32) == "reference"


def test_use_backend_is_restored_after_an_exception() -> None:
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert choose("proto_logits", CPU, 2, torch.float32) == "cpp"


def test_use_backend_decorates_a_function() -> None:
    @use_backend("reference")
    def chosen() -> str:
        return choose("proto_logits", CPU, 2, torch.float32)

    assert [chosen(), chosen()] == ["reference", "reference"]
    assert choose("proto_logits", CPU, 2, torch.float32) == "cpp"


def test_the_argument_of_a_call_comes_before_use_backend() -> None:
    with use_backend("reference"):
        assert choose("proto_logits", CPU, 2, torch.float32, "cpp") == "cpp"
        assert choose("proto_logits", CPU, 2, torch.float32, "auto") == "cpp"


def test_use_backend_refuses_an_unknown_name_and_keeps_the_old_one() -> None:
    with pytest.raises(ValueError, match="backend must be auto"), use_backend("tpu"):
        pass
    assert choose("proto_logits", CPU, 2, torch.float32) == "cpp"


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
