"""No harm in silence: what the commands say, write and return where new weights do worse, or where
somebody else is at work.
"""

import inspect
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace

import jsonschema
import pytest
import torch

from hessian_surgery_nb.app import commands, run_control
from hessian_surgery_nb.app.cli import build_parser, main
from hessian_surgery_nb.app.options import HARM
from hessian_surgery_nb.app.result_schema import result_schema
from hessian_surgery_nb.app.run_control import LOCK, claimed
from hessian_surgery_nb.comparison import METHODS, compare
from hessian_surgery_nb.effective_rank import screen
from hessian_surgery_nb.foundations.adjusted import load_adjusted
from hessian_surgery_nb.foundations.checks import InputError
from hessian_surgery_nb.foundations.class_limits import class_limits
from hessian_surgery_nb.foundations.loading import load_network
from hessian_surgery_nb.foundations.networks import resnet20
from hessian_surgery_nb.foundations.testbed import tiny_data, tiny_mlp
from hessian_surgery_nb.foundations.training import train
from hessian_surgery_nb.foundations.weight_files import weights_bytes, write_atomic
from hessian_surgery_nb.app.own_network import own_sets
from hessian_surgery_nb.linearised import linearised_operate
from hessian_surgery_nb.settings import SurgeryConfig
from hessian_surgery_nb.surgery import HeldOutHarm, operate

FACTORY = ""


@pytest.fixture(scope="module")
def place(lay_out):
    d = lay_out("harm", FACTORY, train=30, test=16)
    torch.manual_seed(0)
    network = resnet20(classes=3, width=4, blocks=1)
    sets = own_sets(d / "toys")
    images = torch.cat([x for x, _ in sets.hessian])
    train(network, (images, sets.hessian.y), epochs=8, lr=0.02)
    write_atomic(d / "trained.safetensors", weights_bytes(network))
    return d


def flags(place, out, *more):
    given = ["--model", f"{place}/mine.py:net", "--weights", f"{place}/trained.safetensors"]
    given += ["--data", f"{place}/toys", "--hessian", "32"]
    return [*given, *(["--out", str(out)] if out else []), *more]


QUICK = ("--iterations", "1", "--eps", "0.2")


def spoiled(monkeypatch):
    "Surgery after which every held-out image that was right is wrong."

    def harmful(*args, **options):
        result = operate(*args, **options)
        right = torch.ones_like(result.correct[0])
        return replace(result, correct=(right, ~right))

    monkeypatch.setattr(commands, "operate", harmful)


def test_harm_is_said_in_text_json_and_exit_status(place, tmp_path, capsys, monkeypatch):
    spoiled(monkeypatch)
    assert main(["operate", *flags(place, tmp_path / "a", *QUICK)]) == 0
    out, err = capsys.readouterr()
    assert "Do not keep the new weights" in out and "Largest loser" in out
    assert "more than chance" in out and "The spread fell by more than chance" not in out
    assert "hessian-surgery: WARNING: do not keep the new weights: " in err
    asked = ["operate", *flags(place, tmp_path / "b", *QUICK, "--json", "--fail-on-harm")]
    assert main(asked) == HARM == 4
    out, err = capsys.readouterr()
    said = json.loads(out)
    assert said["verdict"]["outcome"] == "do not keep" and "WARNING" in err
    assert said["verdict"]["global"]["change_pp"] == -100
    assert said["verdict"]["says"] == said["change"]["says"]
    assert (tmp_path / "b" / "weights.safetensors").exists()
    assert "Do not keep the new weights" in (tmp_path / "b" / "report.html").read_text()


def test_python_warns_of_harm_too():
    "Half of a class of the sensitivity set has wrong labels: surgery serves them, others pay."
    X, y = tiny_data(1200)
    net = tiny_mlp()
    train(net, (X[:100], y[:100]), epochs=30, lr=0.05)
    tuned = y[100:300].clone()
    tuned[(tuned == 0) & (torch.arange(200) % 4 != 0)] = 2
    loss = torch.nn.CrossEntropyLoss()
    with pytest.warns(HeldOutHarm, match="Do not keep the new weights"):
        result = operate(
            net,
            loss,
            (X[:100], y[:100]),
            (X[100:300], tuned),
            held_out=(X[300:], y[300:]),
            config=SurgeryConfig(iterations=6),
            progress=False,
        )
    assert result.verdict().is_harmful and "global 99.8 ->" in repr(result)
    alone = replace(result, after=result.sensitivity_after)
    assert alone.verdict() is None  # on tuned images there is nothing to say


def test_front_and_compare_give_the_verdict(place, tmp_path, capsys):
    argv = ["front", *flags(place, tmp_path / "f", "--spikes", "2", "--rounds", "0", "--json")]
    assert main([*argv, "--folds", "2", "--prices", "1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["verdict"]["max_global_drop_pp"] == 0.5
    assert {"outcome", "largest_loser", "classes"} <= set(said["verdict"])
    page = (tmp_path / "f" / "report.html").read_text()
    assert "price paid (pp)" in page and "Held-out accuracy by class at the chosen price" in page
    argv = ["compare", *flags(place, tmp_path / "c", *QUICK, "--methods", "biases", "tau-norm")]
    assert main([*argv, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    names = [method["method"] for method in said["methods"]]
    assert names == ["no change", *METHODS["biases"], "tau-norm"]
    biases = said["methods"][1]
    assert set(biases["biases"]) == {"colour0", "colour1", "colour2"}
    assert biases["verdict"]["outcome"] in ("keep", "undecided", "do not keep", "no change")


def test_a_dry_run_of_front_screen_and_compare_writes_nothing(place, tmp_path, capsys):
    out = tmp_path / "never"
    for argv in (
        ["front", *flags(place, out, "--spikes", "2")],
        ["screen", *flags(place, None, "--spikes", "2")],
        ["compare", *flags(place, out, "--iterations", "2", "--controls")],
    ):
        assert main([*argv, "--dry-run"]) == 0
        assert "Hessian-vector products" in capsys.readouterr().out
    assert not out.exists()


SAVED = """
import sys, torch
sys.path.insert(0, sys.argv[2])
from mine import net
from safetensors.torch import load_file
network = net().eval()
network.load_state_dict(load_file(sys.argv[1]))
images, labels = torch.load(sys.argv[3])
with torch.no_grad():
    print(int((network(images).argmax(1) == labels).sum()))
"""


def test_the_best_method_is_saved_and_does_what_the_table_says(place, tmp_path, capsys):
    argv = ["compare", *flags(place, tmp_path / "c", "--methods", "biases", "--save-best")]
    assert main([*argv, "--max-global-drop", "20", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    start = said["methods"][0]["sensitivity"]
    allowed = [
        method
        for method in said["methods"]
        if method["sensitivity"]["global_percent"] >= start["global_percent"] - 20 - 1e-6
    ]
    best = min(allowed, key=lambda method: method["sensitivity"]["sigma_pp"])
    assert said["chosen"] == best["method"] != "no change"
    sets = own_sets(place / "toys", hessian=32)
    images = torch.cat([x for x, _ in sets.held_out])
    torch.save((images, sets.held_out.y), tmp_path / "held_out.pt")
    right = round(best["held_out"]["global_percent"] * len(images) / 100)
    weights = tmp_path / "c" / "weights.safetensors"
    # any file can be loaded back here; one of biases alone in a process without this package's code
    network = load_adjusted(load_network(f"{place}/mine.py:net", classes=3)[0], weights).eval()
    with torch.no_grad():
        assert int((network(images).argmax(1) == sets.held_out.y).sum()) == right
    if "scales" not in best:
        done = subprocess.run(
            [sys.executable, "-c", SAVED, weights, place, tmp_path / "held_out.pt"],
            capture_output=True,
            text=True,
        )
        assert done.stdout.strip() == str(right), done.stderr


def test_results_of_another_command_are_not_left_beside(place, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["operate", *flags(place, out, *QUICK)]) == 0
    argv = ["compare", *flags(place, out, "--methods", "biases")]
    assert main(argv) == 2 and "give --force" in capsys.readouterr().err
    assert main([*argv, "--force"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["report.html", "result.json"]


def test_two_runs_do_not_share_a_place(place, tmp_path, capsys):
    out = tmp_path / "out"
    with claimed(out):
        assert main(["operate", *flags(place, out, *QUICK)]) == 2
        assert "Another one is at work" in capsys.readouterr().err
        assert [p.name for p in out.iterdir()] == [LOCK]
    assert not out.exists()
    assert main(["operate", *flags(place, out, *QUICK)]) == 0


def test_of_many_runs_at_once_one_holds_the_place(tmp_path):
    inside, refused = [], []
    barrier = threading.Barrier(8)

    def run():
        barrier.wait()
        try:
            with claimed(tmp_path / "out"):
                inside.append(1)
                barrier_of_end.wait()
        except InputError:
            refused.append(1)
            barrier_of_end.wait()

    barrier_of_end = threading.Barrier(8)
    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert (len(inside), len(refused)) == (1, 7)
    # Empty it may stay: the run that made it may not be the one that got it.
    assert list(tmp_path.rglob("*")) in ([], [tmp_path / "out"])


def test_a_place_that_vanishes_is_made_again(tmp_path, monkeypatch):
    place = tmp_path / "out"

    def made_and_lost(path):
        path.mkdir()
        monkeypatch.setattr(os, "access", lambda *_: not path.rmdir())
        return []

    monkeypatch.setattr(run_control, "_make_directories", made_and_lost)
    with claimed(place):
        assert [file.name for file in place.iterdir()] == [LOCK]


def test_random_directions_keep_to_the_schema(place, tmp_path, capsys):
    argv = ["operate", *flags(place, tmp_path / "o", *QUICK, "--directions", "random", "--json")]
    assert main(argv) == 0
    said = json.loads(capsys.readouterr().out)
    jsonschema.validate(said, result_schema())
    assert said["spikes"] == [None, None]


def test_accuracies_are_percent_wherever_a_name_says_so(place, tmp_path, capsys):
    assert main(["operate", *flags(place, tmp_path / "o", *QUICK, "--json")]) == 0
    said = json.loads(capsys.readouterr().out)
    step = said["history"][0]
    assert step["global_percent"] > 1 and max(step["accuracy_percent"]) > 1
    assert not {"sigma", "overall", "accuracy"} & set(step)
    assert main(["screen", *flags(place, None, "--spikes", "2", "--json", "--quiet")]) == 0
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert len(found["accuracy_percent"]) == len(found["classes"]) == 3
    assert len(found["sensitivity_matrix"]["values"][0]) == 2
    assert "inputs " not in err


def test_limits_hold_on_the_sensitivity_set_and_names_are_checked(place, tmp_path, capsys):
    argv = ["operate", *flags(place, tmp_path / "o", "--iterations", "4", "--json")]
    limited = ["--protect", "colour1=0", "--floor", "colour2=10", "--max-global-drop", "0"]
    assert main([*argv, *limited]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["config"]["protect"] == {"colour1": 0} and said["config"]["floors"]
    before, after = said["sensitivity_before"], said["sensitivity_after"]
    was, is_now = ([each["accuracy_percent"] for each in r["classes"]] for r in (before, after))
    assert is_now[1] >= was[1] and is_now[2] >= min(was[2], 10)
    assert after["global_percent"] >= before["global_percent"] - 1e-9
    for step in said["history"]:  # what was kept on the way kept to them as well
        if step["accepted"]:
            assert step["accuracy_percent"][1] >= was[1] - 1e-9
    for wrong, says in (
        (["--protect", "color1=1"], "did you mean colour1"),
        (["--protect", "colour1"], "CLASS=NUMBER"),
        (["--floor", "colour1=101"], "from 0 to 100"),
    ):
        assert main(["operate", *flags(place, tmp_path / "x", *wrong)]) == 2
        err = capsys.readouterr().err
        assert says in err
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("seed", range(3))
def test_steps_that_break_a_limit_are_rolled_back(seed):
    X, y = tiny_data(300)
    sets = (X[:60], y[:60]), (X[60:], y[60:])
    limits = class_limits(["0", "1", "2"], {"1": 0.02}, {"0": 0.5})
    config = SurgeryConfig(
        iterations=8,
        eps=1.5,
        seed=seed,
        protect={"1": 0.02},
        floors={"0": 0.5},
        max_global_drop=0.01,
        rollback_drop=1.0,
        rollback_sigma=1.0,
        max_drop=1.0,
    )
    loss = torch.nn.CrossEntropyLoss()
    result = operate(tiny_mlp(), loss, *sets, config=config, progress=False)
    start = result.sensitivity_before
    for step in result.history:
        accuracy = torch.tensor(step.accuracy, dtype=torch.float64)
        breaks = bool(limits.broken(start.accuracy, accuracy))
        breaks |= step.overall < start.overall - 0.01 - 1e-9
        assert step.accepted == (not breaks)
    assert any(not step.accepted for step in result.history)  # the limits had work to do


def test_the_bare_command_helps_and_unknown_flags_are_named_once(capsys):
    assert main([]) == 0
    assert "COMMAND" in capsys.readouterr().out
    assert main(["screen", "--model", "a", "--data", "b", "--schedule", "adam"]) == 2
    err = capsys.readouterr().err
    assert err.count("--schedule") == 1 and "hessian-surgery screen --help" in err


def test_a_closed_pipe_is_no_traceback():
    code = "from hessian_surgery_nb.app.cli import main; import sys; sys.exit(main(['schema']))"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == b""


def test_colours_of_255_are_refused(place, tmp_path, capsys):
    argv = ["screen", *flags(place, None), "--mean", "127", "127", "127"]
    assert main(argv) == 2
    assert "127 of 255 is 0.498" in capsys.readouterr().err


def test_a_network_near_chance_is_doubted(place, tmp_path, capsys):
    argv = ["screen", *flags(place, None, "--spikes", "1")]
    argv[argv.index(f"{place}/trained.safetensors")] = f"{place}/w.safetensors"
    assert main(argv) == 0
    err = capsys.readouterr().err
    assert "guessing gives 33.3%" in err and "--mean, --std" in err


def test_defaults_are_the_same_in_python_and_on_the_command_line():
    _, parsers = build_parser()

    def flags_of(name):
        return {action.dest: action.default for action in parsers[name]._actions}

    def defaults_of(function):
        parameters = inspect.signature(function).parameters.values()
        return {each.name: each.default for each in parameters}

    settings, named = SurgeryConfig(), {"spikes": "num_spikes", "floor": "floors"}
    for command in ("operate", "compare"):
        for flag, value in flags_of(command).items():
            field = named.get(flag, flag)
            if hasattr(settings, field) and flag not in ("tau", "precision", "micro_batch"):
                if (command, flag) != ("compare", "max_global_drop"):
                    assert value == getattr(settings, field), (command, flag)
    front, of_front = flags_of("front"), defaults_of(linearised_operate)
    assert [price / 100 for price in front["prices"]] == list(of_front["prices"])
    assert (front["rounds"], front["folds"]) == (of_front["rounds"], of_front["folds"])
    table, of_table = flags_of("compare"), defaults_of(compare)
    assert table["max_global_drop"] / 100 == of_table["price"]
    for name in ("methods", "controls", "draws"):
        assert table[name] == of_table[name]
    screening, of_screening = flags_of("screen"), defaults_of(screen)
    for name in ("eps", "directions", "scheme", "params", "seed"):
        assert screening[name] == of_screening[name]
