"""Checkpoints: read without running code, checked whole, and loaded whole or not at all."""

import copy
import zipfile

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from efficient_attention import insert, load_checkpoint


def model():
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Linear(4, 2))


def state(value=None):
    weights = model().state_dict()
    return weights if value is None else {k: torch.full_like(v, value) for k, v in weights.items()}


def holds(network, weights):
    own = network.state_dict()
    return all(torch.equal(own[key], weights[key]) for key in weights)


@pytest.mark.parametrize("envelope", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("wrapper", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_weights_are_found_under_what_frameworks_put_around_them(envelope, wrapper, tmp_path):
    wrapped = {wrapper + key: value for key, value in state(3).items()}
    content = wrapped if envelope is None else {"epoch": 7, envelope: wrapped}
    torch.save(content, tmp_path / "weights.tar")
    network = model()
    assert load_checkpoint(network, tmp_path / "weights.tar") == ()
    assert holds(network, state(3))


def test_safetensors_files_load(tmp_path):
    save_file(state(2), tmp_path / "weights.safetensors")
    network = model()
    load_checkpoint(network, str(tmp_path / "weights.safetensors"))
    assert holds(network, state(2))


def test_a_prefix_picks_the_part_of_a_larger_model():
    weights = {f"network.{key}": value for key, value in state(5).items()}
    network = model()
    load_checkpoint(
        network, {"state_dict": {**weights, "loss.weight": torch.ones(1)}}, prefix="network."
    )
    assert holds(network, state(5))


def test_what_may_be_missing_keeps_its_values_and_is_named():
    network = model()
    insert(network, "0", in_channels=4, dimensions=2)
    before = copy.deepcopy(network.state_dict())
    new = load_checkpoint(network, state(3), allow_missing=["*inserted_attention*"])
    assert set(new) == {key for key in before if "inserted_attention" in key}
    assert holds(network, {**before, **state(3)})


def test_what_is_ignored_is_neither_unexpected_nor_loaded():
    model = nn.Linear(2, 3)
    bias = model.bias.detach().clone()
    weights = {"weight": torch.ones(3, 2), "bias": torch.ones(7), "fc.weight": torch.ones(1)}
    missing = load_checkpoint(model, weights, ignore=["fc.*", "bias"], allow_missing=["bias"])
    assert missing == ("bias",)
    assert torch.equal(model.weight, torch.ones(3, 2))
    assert torch.equal(model.bias, bias)


def test_counters_of_old_files_may_be_missing():
    network, weights = model(), state(3)
    del weights["1.num_batches_tracked"]
    assert load_checkpoint(network, weights) == ("1.num_batches_tracked",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("0.bias"), "1 missing: 0.bias. Nothing was loaded"),
        (lambda w: w.update(extra=torch.ones(1)), "1 unexpected: extra"),
        (
            lambda w: w.update({"2.weight": torch.ones(3, 4)}),
            r"1 of another shape: 2.weight \(3, 4\) for \(2, 4\)",
        ),
        (
            lambda w: (w.pop("0.bias"), w.update(extra=torch.ones(1))),
            "1 missing: 0.bias; 1 unexpected: extra",
        ),
        (lambda w: w.update(epoch=3), "tensors; got other things: epoch"),
        (lambda w: w.clear(), "must hold a state_dict of tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(change, message):
    network, weights = model(), state(9)
    before = copy.deepcopy(network.state_dict())
    change(weights)
    with pytest.raises(ValueError, match=message):
        load_checkpoint(network, weights)
    assert holds(network, before)


def test_many_names_are_cut_short():
    network = nn.ModuleList(nn.Linear(1, 1) for _ in range(10))
    with pytest.raises(ValueError, match=r"20 missing: 0.weight, .* and 14 more"):
        load_checkpoint(network, {"x": torch.ones(1)})


class Payload:
    def __reduce__(self):
        return (pytest.fail, ("code of a checkpoint was run",))


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_files_that_are_no_checkpoints_are_errors_with_name_and_size(suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(b"hello")
    with pytest.raises(ValueError, match=rf"weights{suffix} \(5 bytes\) cannot be read"):
        load_checkpoint(model(), path)


def test_a_truncated_file_is_an_error(tmp_path):
    path = tmp_path / "weights.pth"
    torch.save(state(), path)
    path.write_bytes(path.read_bytes()[:-300])
    assert not zipfile.is_zipfile(path)
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of weights alone"):
        load_checkpoint(model(), path)


def test_code_in_a_file_is_refused_and_not_run(tmp_path):
    torch.save({"state_dict": Payload()}, tmp_path / "weights.pth")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint of weights alone"):
        load_checkpoint(model(), tmp_path / "weights.pth")


def test_an_absent_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"must be a file; got .*absent.pth"):
        load_checkpoint(model(), tmp_path / "absent.pth")


@pytest.mark.parametrize("wrapper", ["", "module.", "module._orig_mod."])
def test_wrappers_are_dropped_before_and_behind_a_prefix(wrapper):
    network = model()
    for keys in (f"{wrapper}network.", f"network.{wrapper}"):
        weights = {keys + key: value for key, value in state(4).items()}
        load_checkpoint(network, weights, prefix="network.")
        assert holds(network, state(4))
        nn.init.zeros_(network[0].weight)


def test_a_name_that_looks_like_a_wrapper_is_kept_where_it_is_by_right():
    network = nn.ModuleDict({"module": model()})
    load_checkpoint(network, {f"module.{key}": value for key, value in state(4).items()})
    assert holds(network["module"], state(4))
    load_checkpoint(model(), network.state_dict(), prefix="module.")


@pytest.mark.parametrize("option", ["allow_missing", "ignore"])
def test_one_pattern_may_be_given_as_a_string(option):
    network, weights = model(), state(3)
    del weights["0.bias"]
    if option == "ignore":
        weights["fc.weight"] = torch.ones(1)
    patterns = {"allow_missing": "0.bias", option: "0.bias" if option[0] == "a" else "fc.*"}
    assert load_checkpoint(network, weights, **patterns) == ("0.bias",)
    with pytest.raises(ValueError, match="2 missing"):
        load_checkpoint(network, {"2.bias": torch.ones(2)}, allow_missing="[01].*", ignore="2.*")


def test_counters_that_the_network_does_not_have_are_left_out():
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, track_running_stats=False))
    weights = {**network.state_dict(), "1.num_batches_tracked": torch.tensor(3)}
    assert load_checkpoint(network, weights) == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"0.bias": torch.ones(4, dtype=torch.int8)}, "1 of another kind: 0.bias torch.int8"),
        ({"0.bias": torch.ones(4, dtype=torch.complex64)}, "torch.complex64 for torch.float32"),
        ({7: torch.ones(4)}, "got other things: 7"),
    ],
)
def test_numbers_of_another_kind_are_errors(change, message):
    with pytest.raises(ValueError, match=message):
        load_checkpoint(model(), {**state(), **change})


def test_a_model_without_memory_is_an_error():
    with torch.device("meta"):
        network = model()
    with pytest.raises(ValueError, match="model must have memory to load into"):
        load_checkpoint(network, state())
