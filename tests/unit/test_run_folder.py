"""The run folder: a crash at any moment leaves the old file or the new one, and what is damaged says so."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from vpdeploy import run_folder
from vpdeploy.errors import RunFolderError
from vpdeploy.run_folder import Journal
from vpdeploy.values import EpochRecord, Found, Parities, Parity, PrunePlan

PARITIES = Parities((Parity("uint8", 32, (1, 3, 8), 1e-6, 1.0, 0.5),))
RECORD = EpochRecord("fit", 1, 2, 0.5, 0.75, 1.0, 200.0)


# --- one step -------------------------------------------------------------------------------------------------------


def test_writing_makes_the_folder_and_replaces_what_was_there(tmp_path):
    path = tmp_path / "a" / "b.json"
    run_folder.write_bytes(path, b"old")
    run_folder.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert os.listdir(path.parent) == ["b.json"]
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("step", ["open", "fsync", "rename"])
@pytest.mark.parametrize(
    ("number", "message"),
    [
        (
            errno.ENOSPC,
            "the disk is full; nothing that was there is lost. Free some space and run the same command again",
        ),
        (errno.EDQUOT, "the disk is full; nothing that was there is lost"),
        (
            errno.EACCES,
            "cannot be written: Permission denied; choose another folder with -o, or change its permissions",
        ),
        (errno.EROFS, "cannot be written: Read-only file system; choose another folder with -o"),
    ],
)
def test_a_disk_that_refuses_leaves_the_old_file(tmp_path, monkeypatch, step, number, message):
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")

    def refuse(*_, **__):
        raise OSError(number, os.strerror(number))

    place = {"open": (tempfile, "NamedTemporaryFile"), "fsync": (os, "fsync"), "rename": (Path, "replace")}[step]
    with monkeypatch.context() as patch:
        patch.setattr(*place, refuse)
        with pytest.raises(RunFolderError) as caught:
            run_folder.write_bytes(path, b"new")
    assert str(caught.value).startswith(f"{path}: {message}")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_ctrl_c_while_writing_leaves_the_old_file_alone(tmp_path, monkeypatch):
    path = tmp_path / "plan.json"
    path.write_bytes(b"old")

    def interrupted(_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_folder.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    for path in (tmp_path / "file" / "plan.json", tmp_path / "file" / "deeper" / "plan.json"):
        with pytest.raises(RunFolderError, match=r"plan\.json: cannot be written: .*; choose another folder with -o"):
            run_folder.write_bytes(path, b"new")
    with pytest.raises(RunFolderError, match="choose another folder"), run_folder.locked(tmp_path / "file"):
        pass


KILLED_WHILE_WRITING = """
import os, signal, sys
from pathlib import Path
from vpdeploy import run_folder
os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
with run_folder.locked(Path(sys.argv[1])):
    run_folder.write_bytes(Path(sys.argv[1]) / "export" / "pruned.onnx", b"new")
"""


def test_what_a_killed_process_left_behind_goes_with_the_next_lock(tmp_path):
    (tmp_path / "export").mkdir()
    kept = {tmp_path / "export" / "pruned.onnx": b"old", tmp_path / "export" / ".mine": b"", tmp_path / "a.part": b""}
    for path, content in kept.items():
        path.write_bytes(content)
    done = subprocess.run([sys.executable, "-c", KILLED_WHILE_WRITING, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path / "export")) == 3  # the half-written one, too
    with run_folder.locked(tmp_path):
        assert {path: path.read_bytes() for path in kept} == kept
        assert sorted(os.listdir(tmp_path / "export")) == [".mine", "pruned.onnx"]


# --- values ---------------------------------------------------------------------------------------------------------


def test_a_value_comes_back_with_its_schema_beside_it(tmp_path):
    path = tmp_path / "parity.json"
    run_folder.write_value(path, PARITIES)
    assert json.loads(path.read_bytes())["schema"] == run_folder.SCHEMA
    assert run_folder.read_value(path, Parities) == PARITIES


def test_integer_keys_of_a_plan_survive_json():
    plan = PrunePlan({"a.weight": (4, 3)}, {"a.weight": {0: (1, 3)}}, {"a": {"out": 2}}, {"a": (4, 2)})
    assert run_folder.load(PrunePlan, run_folder.dump(plan), where="here") == plan


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b"3", b'{"schema": 1}', b'{"schema": 1, "forms": [{"form": "uint8"}]}', b"\xff\xfe\x00"],
)
def test_damaged_json_names_the_file_and_the_way_on(tmp_path, content):
    path = tmp_path / "parity.json"
    path.write_bytes(content)
    with pytest.raises(RunFolderError, match=r"parity\.json: damaged: .*; remove it and run the same command again$"):
        run_folder.read_value(path, Parities)


def test_another_schema_is_another_version(tmp_path):
    path = tmp_path / "parity.json"
    path.write_bytes(run_folder.dump(PARITIES).replace(b'"schema": 1', b'"schema": 99'))
    with pytest.raises(
        RunFolderError, match=r"parity\.json: got schema 99; expected 1: it was written by another version"
    ):
        run_folder.read_value(path, Parities)


def test_a_missing_file_names_the_command_that_makes_it(tmp_path):
    with pytest.raises(RunFolderError, match=r"plan\.json: cannot be read: No such file .*; run `vpdeploy run`"):
        run_folder.read_value(tmp_path / "plan.json", PrunePlan)


def test_a_number_that_is_none_is_never_written():
    with pytest.raises(ValueError, match="JSON"):
        run_folder.dump(replace(PARITIES, forms=(replace(PARITIES.forms[0], relative_error=float("nan")),)))


# --- tensors and arrays -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_map", [None, (3, 1)])
def test_found_comes_back_bit_for_bit(tmp_path, label_map):
    found = Found({"conv/1": torch.randn(4)}, {"top": torch.randn(3, 1, 2)}, {"bn.mean": torch.randn(4)}, label_map)
    path = tmp_path / "found.safetensors"
    run_folder.write_found(path, found)
    again = run_folder.read_found(path)
    assert again.label_map == label_map
    for part in ("scores", "prompt", "tensors"):
        before, after = getattr(found, part), getattr(again, part)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


def test_tensors_that_share_memory_or_are_not_contiguous_are_written_whole(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"a": whole, "b": whole.T, "c": whole[1:], "d": whole.to(torch.bfloat16), "e": torch.tensor(3)}
    run_folder.write_network(tmp_path / "n.safetensors", state, prompt={}, about={"classes": 3})
    again, prompt, about = run_folder.read_network(tmp_path / "n.safetensors")
    assert prompt == {} and about == {"classes": 3}
    assert all(torch.equal(again[name], value) and again[name].dtype == value.dtype for name, value in state.items())


@pytest.mark.parametrize("share", [0, 0.05, 0.5, 0.99])
def test_cut_off_tensors_and_arrays(tmp_path, share):
    for name, write, read in (
        ("a.safetensors", lambda p: run_folder.write_tensors(p, {"a": torch.randn(50)}), run_folder.read_tensors),
        ("a.npz", lambda p: run_folder.write_arrays(p, {"a": np.arange(50)}), run_folder.read_arrays),
    ):
        path = tmp_path / name
        write(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        with pytest.raises(RunFolderError, match=rf"{name}: damaged: .*; remove it and run the same command again"):
            read(path)


def test_arrays_are_never_unpickled(tmp_path):
    np.savez(tmp_path / "a.npz", a=np.array([{"x": 1}], dtype=object))
    with pytest.raises(RunFolderError, match=r"a\.npz: damaged: .*allow_pickle"):
        run_folder.read_arrays(tmp_path / "a.npz")


# --- journal and history ----------------------------------------------------------------------------------------------


def journal(folder: Path, key: str = "k") -> Journal:
    return Journal("fit", key, folder / "state" / "fit.pt", folder / "history.jsonl")


def test_the_journal_gives_the_last_state_back_to_its_own_key_only(tmp_path):
    assert journal(tmp_path).resume() is None
    for epoch in (1, 2):
        journal(tmp_path).save({"w": torch.full((2,), float(epoch)), "epoch": epoch}, replace(RECORD, epoch=epoch))
    state = journal(tmp_path).resume()
    assert state is not None and state["epoch"] == 2 and torch.equal(state["w"], torch.full((2,), 2.0))
    assert journal(tmp_path, "another").resume() is None
    assert [record.epoch for record in run_folder.read_history(tmp_path / "history.jsonl")] == [1, 2]


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04cut off"])
def test_a_damaged_state_says_how_to_go_on(tmp_path, content):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "fit.pt").write_bytes(content)
    with pytest.raises(RunFolderError, match=r"fit\.pt: damaged: .*; remove it to start the stage again"):
        journal(tmp_path).resume()


def test_a_state_of_pickled_objects_is_refused(tmp_path):
    (tmp_path / "state").mkdir()
    torch.save({"key": "k", "x": Path("/")}, tmp_path / "state" / "fit.pt")
    with pytest.raises(RunFolderError, match=r"fit\.pt: damaged: "):
        journal(tmp_path).resume()


def test_history_takes_the_last_of_an_epoch_and_leaves_a_cut_off_line_out(tmp_path):
    path = tmp_path / "history.jsonl"
    assert run_folder.read_history(path) == ()
    second = replace(RECORD, epoch=2, loss=0.4)
    for record in (RECORD, second, replace(second, loss=0.3)):
        run_folder.append_history(path, record)
    with path.open("a") as file:
        file.write('{"schema": 1, "stage": "fit", "epo')
    assert run_folder.read_history(path) == (RECORD, replace(second, loss=0.3))


def test_an_epoch_after_a_cut_off_line_is_not_lost(tmp_path):
    path = tmp_path / "history.jsonl"
    path.write_text('{"schema": 1, "stage": "fit", "epo')
    run_folder.append_history(path, RECORD)
    assert run_folder.read_history(path) == (RECORD,)


def test_a_stage_that_is_trained_anew_forgets_its_own_epochs_only(tmp_path):
    path = tmp_path / "history.jsonl"
    search = replace(RECORD, stage="search:pruned")
    for record in (RECORD, search):
        run_folder.append_history(path, record)
    run_folder.drop_history(path, "fit")
    assert run_folder.read_history(path) == (search,)


def test_history_on_a_full_disk(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        with pytest.raises(RunFolderError, match="the disk is full"):
            run_folder.append_history(tmp_path / "history.jsonl", RECORD)


# --- lock -----------------------------------------------------------------------------------------------------------

HOLDER = """
import sys
from pathlib import Path
from vpdeploy import run_folder
with run_folder.locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_run_held_by_another_process(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        with pytest.raises(RunFolderError) as caught, run_folder.locked(tmp_path):
            pass
        assert str(caught.value) == (
            f"{tmp_path}: another vpdeploy process works on this run; wait for it, or choose another folder with -o"
        )
        holder.kill()  # the lock goes with its process, however that ends
    with run_folder.locked(tmp_path):
        pass
    with run_folder.locked(tmp_path):
        pass
