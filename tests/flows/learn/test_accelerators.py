"""The plan of a model on GPUs: its arithmetic by hand, what fits, and what is refused."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from agent.errors import UserError
from agent.population.capacity import ModelSize
from flows.cli import app
from flows.learn.accelerators import (
    GPUS,
    PUBLISHED,
    Fleet,
    GpuRates,
    Seconds,
    Work,
    bus_bytes,
    engines_that_pay,
    fits,
    known_size,
    plan_model,
    seconds_of,
    with_stated,
    work_of,
)

WORK = Work(members=30, prompts=200, generations=100, max_num_seqs=100, max_model_len=4096)
ROUND = GpuRates(  # numbers with which every part can be worked out on paper
    normals_s=1e9, signs_s=4e9, share=0.5, step_s=0.01, launch_s=1e-3, reload_s=0.01, link=1e9,
    cores=10.0, core_render=1e8, core_normals_s=1e8, core_signs_s=5e8, core_sha256=1e9,
    prompt_tokens=0.0, answer_tokens=100.0,
)  # fmt: skip
SIZE = ModelSize(parameters=10**9, tensors=100, weight_bytes=2 * 10**9, kv_bytes=10**4, kv_heads=8)


def test_every_part_is_its_formula() -> None:
    read = 0.5 * GPUS["h100"].bandwidth
    step = (2e9 + 100 * 50 * 1e4) / read + 0.01  # the FLOPs take less than the reads
    seconds, lines = seconds_of(SIZE, Fleet(), WORK, ROUND, "cuda")
    assert seconds.generate == pytest.approx(200 * 100 / 100 * step)
    assert seconds.render == pytest.approx(1e9 / 1e9)  # drawing is slower than memory
    assert seconds.update == pytest.approx(30 * 1e9 / 1e9)
    assert seconds.hash == pytest.approx(100 * 1e-3)  # launches are slower than memory
    paired, _ = seconds_of(SIZE, Fleet(), replace(WORK, mirrored=True), ROUND, "cuda")
    assert paired == replace(seconds, update=pytest.approx(15 * 1e9 / 1e9))
    assert any("update = max(30 * 1.000" in line for line in lines)
    signs, _ = seconds_of(SIZE, Fleet(), replace(WORK, noise="rademacher"), ROUND, "cuda")
    drawn = pytest.approx(1e9 / 4e9), pytest.approx(30 * 1e9 / 4e9)
    assert signs == replace(seconds, render=drawn[0], update=drawn[1])
    host, _ = seconds_of(SIZE, Fleet(), WORK, ROUND, "cpu")
    assert host.render == pytest.approx(1e9 / (1e8 * 10) + 2e9 / 1e9 + 100 * 0.01)
    assert host.update == pytest.approx(30 * 1e9 / (1e8 * 10))
    assert host.hash == pytest.approx(4e9 / (1e9 * 10))
    signs, _ = seconds_of(SIZE, Fleet(), replace(WORK, noise="rademacher"), ROUND, "cpu")
    assert signs == replace(host, update=pytest.approx(30 * 1e9 / (5e8 * 10)))


def test_ranks_divide_reads_and_theta_unless_they_do_not_know_their_windows() -> None:
    two, _ = seconds_of(SIZE, Fleet(gpus=2, ranks=2), WORK, ROUND, "cuda")
    one, _ = seconds_of(SIZE, Fleet(), WORK, ROUND, "cuda")
    read = 0.5 * GPUS["h100"].bandwidth
    assert (two.update, two.render) == (one.update / 2, one.render / 2)
    assert two.generate < one.generate
    unknown = replace(SIZE, split=False)
    whole, _ = seconds_of(unknown, Fleet(gpus=2, ranks=2), WORK, ROUND, "cuda")
    assert whole.update == one.update
    assert whole.render - one.render == pytest.approx(100 * 0.01 + 2e9 / read)  # vLLM's reload


def test_a_generation_and_its_share_of_weight_work() -> None:
    seconds = Seconds(generate=3.0, render=1.0, update=2.0, hash=0.5)
    assert seconds.generation(30, 8) == 4 * 4.0 + 2.5
    assert seconds.weight_share(30, 8) == pytest.approx((4 * 1.0 + 2.5) / 18.5)


def test_engines_pay_while_a_generation_gets_shorter_by_their_share() -> None:
    free = Seconds(1.0, 0.0, 0.0, 0.0)
    assert engines_that_pay(free, 30) == 30
    assert engines_that_pay(free, 1) == 1
    half = Seconds(1.0, 0.0, 10.0, 0.0)  # 40 s on one engine; the update stays
    assert engines_that_pay(half, 30) == 5  # 16 s: 40 / 16 is half of 5


def test_what_crosses_the_bus() -> None:
    assert bus_bytes(SIZE, "cuda") == {
        "member": 0,
        "generation": 16 * 100 + 8 * (100 + 10**9 // 65536),
    }
    assert bus_bytes(SIZE, "cpu")["member"] == 2 * 10**9


@pytest.mark.parametrize(
    ("model", "fleet", "device"),
    [
        ("Qwen2.5-3B-Instruct", Fleet("h100", 1), "cuda"),
        ("Qwen2.5-3B-Instruct", Fleet("h100", 8), "cuda"),
        ("Qwen2.5-7B-Instruct", Fleet("h100", 8), "cuda"),
        ("Llama-3.1-70B-Instruct", Fleet("h100", 8, 8), "cuda"),
        ("Llama-3.1-70B-Instruct", Fleet("h200", 8, 8), "cuda"),
        ("Llama-3.1-70B-Instruct", Fleet("h200", 8, 4), "cpu"),
        ("Llama-3.1-70B-Instruct", Fleet("h100", 8, 4, host_gib=512), None),
    ],
)
def test_published_models_fit_or_are_refused(model: str, fleet: Fleet, device: str | None) -> None:
    planned = plan_model(model, fleet, WORK, GpuRates())
    assert planned["device"] == device
    assert ("refused" in planned) == (device is None)
    needs = planned["bytes"][device or "cuda"]["gpu"]
    within = sum(needs.values()) <= fleet.share * GPUS[fleet.gpu].memory
    assert within == (device is not None)
    if device is None:
        assert "delta on the GPU: gpu 1" in planned["refused"]
        assert "GiB of 512.0 GiB" in planned["refused"]


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_the_share_of_weight_work_of_3b(gpu: str) -> None:
    """By the defaults; on eight engines the noise of 30 addresses is most of what is left."""
    one, eight = (
        plan_model("Qwen2.5-3B-Instruct", Fleet(gpu, n), work_of({}), GpuRates()) for n in (1, 8)
    )
    assert one["weight_share"] <= 0.02
    assert eight["weight_share"] <= 0.03
    assert eight["weight_share_mirrored"] <= 0.02
    normals = plan_model(
        "Qwen2.5-3B-Instruct", Fleet(gpu, 8), work_of({"noise": "normal"}), GpuRates()
    )
    assert 0.03 < normals["weight_share"] <= 0.05


def test_the_defaults_are_those_of_real_models() -> None:
    assert work_of({}) == Work(30, 200, 100, 128, 4096, noise="rademacher")
    assert work_of({"population": 8, "batch": 50}).members == 8
    assert work_of({"batch": 50}).prompts == 50


def test_rates_are_stated_by_name_or_by_what_was_measured(tmp_path: Path) -> None:
    measured = tmp_path / "gpu.json"
    measured.write_text(json.dumps({"rates": {"normals_s": 3e11, "unknown": 1}}))
    stated = with_stated(GpuRates(), [str(measured), "answer_tokens=100"])
    assert stated == replace(GpuRates(), normals_s=3e11, answer_tokens=100.0)
    for wrong in ("normals=1", "normals_s=0", "normals_s=x"):
        with pytest.raises(UserError, match="allowed: answer_tokens, "):
            with_stated(GpuRates(), [wrong])


def test_a_model_is_a_name_a_config_or_a_directory(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    name = "Qwen/Qwen2.5-3B-Instruct"
    config.write_text(json.dumps(PUBLISHED[name]))
    assert known_size(str(config)) == known_size(name) == known_size("qwen2.5-3b-instruct")
    assert known_size("embedded").parameters < 10**6
    assert fits(known_size("embedded"), Fleet(), 512)[0] == "cuda"
    with pytest.raises(UserError, match=r"nothing\.json"):
        known_size(str(tmp_path / "nothing.json"))


def test_the_command_prints_the_arithmetic_and_ends_with_1_where_nothing_fits() -> None:
    run = CliRunner().invoke(app, ["plan", "qwen2.5-3b-instruct", "--gpus", "8", "--gpu", "h200"])
    assert run.exit_code == 0
    assert "0 a member" in run.output
    assert "update = max(30 * 0.015" in run.output
    arguments = ["plan", "llama-3.1-70b-instruct", "--gpus", "1", "--tensor-parallel", "1"]
    refused = CliRunner().invoke(app, [*arguments, "--json"])
    assert refused.exit_code == 1
    assert json.loads(refused.stdout)["device"] is None
    for wrong in (["--gpu", "h1"], ["--tensor-parallel", "2"]):
        assert CliRunner().invoke(app, ["plan", "embedded", *wrong]).exit_code != 0
